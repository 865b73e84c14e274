"""`python -m benchmarks.suites text8|vision8 [--tasks a,b] [--quick]`: build a suite."""

from __future__ import annotations

import argparse
import importlib

from benchmarks.suites.build import build_suite

SUITES = ("text8", "vision8")


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--tasks", help="comma-separated names; all by default")
    parser.add_argument("--quick", action="store_true", help="small splits and little training")
    arguments = parser.parse_args()
    suite = importlib.import_module(f"benchmarks.suites.{arguments.suite}")
    try:
        build_suite(suite, arguments.tasks.split(",") if arguments.tasks else None, arguments.quick)
    except (ValueError, RuntimeError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
