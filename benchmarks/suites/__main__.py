"""`python -m benchmarks.suites text8|text8lora|vision8|causal3|seq2seq [--tasks a,b] [--quick]`: build a suite."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from benchmarks.suites.build import build_suite

SUITES = ("text8", "text8lora", "vision8", "causal3", "seq2seq")


def build(suite: ModuleType, tasks: Sequence[str] | None = None, quick: bool = False) -> Path:
    """Build a suite, or the named tasks of it, and return its folder; what is there is kept."""
    # language models have a build of their own: no heads, and metrics other than accuracy
    own: Callable[..., Path] | None = getattr(suite, "build", None)
    return own(tasks, quick) if own else build_suite(suite, tasks, quick)


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--tasks", help="comma-separated names; all by default")
    parser.add_argument("--quick", action="store_true", help="small splits and little training")
    arguments = parser.parse_args()
    suite = importlib.import_module(f"benchmarks.suites.{arguments.suite}")
    try:
        build(suite, arguments.tasks.split(",") if arguments.tasks else None, arguments.quick)
    except (ValueError, RuntimeError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
