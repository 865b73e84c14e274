"""Suites of real tasks, and epmq beside its peers on them.

A command may be named without its folder: `python -m benchmarks.compare` is `python -m benchmarks.accuracy.compare`.
"""

from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
__path__ += [str(ROOT / "benchmarks" / folder) for folder in ("accuracy", "speed", "faults")]
