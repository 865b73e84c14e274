"""What libraries raise at damaged files becomes one error that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def reason(error: BaseException) -> str:
    """An error in one line; its type, where it says nothing."""
    lines = str(error).strip().splitlines()
    return " ".join(line.strip() for line in lines[:2]) if lines else type(error).__name__


@contextmanager
def error_context(place: str | Path, what: str) -> Iterator[None]:
    """Say of everything that is raised in a `with` block where it comes from.

    Damaged files make libraries raise what they were never meant to raise, and which of it differs from version to
    version. So this belongs around one call of a library, and nothing of ours.

    Args:
        place: the file or folder that is read.
        what: what is wrong with it, such as `not a readable parquet file`.

    Raises:
        FileNotFoundError: as it was raised.
        ValueError: something else was raised; `place` is named.
    """
    try:
        yield
    except FileNotFoundError:  # which names the file, and is no fault of what it holds
        raise
    except Exception as error:
        raise ValueError(f"{place}: {what} ({reason(error)})") from error
