"""Suites of real tasks, and epmq beside its peers on them."""
