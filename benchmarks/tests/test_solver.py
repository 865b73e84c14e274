"""The benchmark of the solver, without the peers: they live in an environment of their own."""

import pytest
import torch

from benchmarks.speed import solver_worker
from benchmarks.tables.speed import solver_table
from epmq.quantization.gptq import gptq


@pytest.mark.slow
@pytest.mark.rare
def test_a_row_says_what_was_measured(monkeypatch):
    def peer(weight, hessian):
        damped = hessian + solver_worker.DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
        return lambda: gptq(weight, damped, solver_worker.GRID)[0].dequantize()

    monkeypatch.setattr(solver_worker, "PEERS", {"same": peer})
    monkeypatch.setattr(solver_worker, "TOKENS", 512)
    (row,) = solver_worker.measure(64, 256, 2, torch.device("cpu"))
    assert (row["out"], row["in"], row["rounds"], row["peer"]) == (64, 256, 2, "same")
    assert row["hessian_error_ours"] == row["hessian_error_peer"] > 0
    assert min(row["ours_seconds"], row["peer_seconds"], row["floor_seconds"]) >= 0
    row |= {"date": "2026-01-01T00:00:00+00:00", "hardware": {"machine": "any"}, "versions": {"torch": "2"}}
    assert "| 64 × 256 | 2 |" in solver_table([row])
