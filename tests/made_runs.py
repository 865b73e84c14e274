"""Runs without reports, and what experts score, for tests of what compares them."""

from epmq.reporting.runs import Run, Scores


def made(method: str, mean: float, bits: int | None = 4, merge: str = "task_arithmetic", **fields) -> Run:
    """A run without a report."""
    group, symmetric = (None, None) if bits is None else (-1, True)
    scores = {"one": mean - 0.1, "two": mean + 0.1}
    return Run("run", merge, method, bits, group, symmetric, "accuracy", scores, mean, 1000 * (bits or 32), **fields)


RUNS = [made("none", 0.6, None), made("gptq", 0.5), made("expert_guided", 0.7), made("gptq", 0.4, 2)]
EXPERTS = Scores({"one": 0.8, "two": 1.0}, 0.9)
