"""Tests of epmq; `tests.kit` is what benchmarks share with them."""
