"""What all results files have in common: rows that are read back, and where and when they were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from epmq.runtime import hardware, now, versions


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none if there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def provenance() -> dict[str, Any]:
    """Versions, hardware and date of a measurement that ends now."""
    return {"versions": versions(), "hardware": hardware(), "date": now()}
