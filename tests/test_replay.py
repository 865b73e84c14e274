import pytest
import torch
from torch import nn

from epmq.replay import Replay


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return self.query(x) * self.key(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = Inner(), nn.Linear(4, 4)
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return self.out(self.inner(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.twice = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x) + self.attention(2 * x)
        for layer in self.twice:
            x = layer(x)
        return x + self.down(torch.relu(self.up(x)))


READERS = {"attention.inner.query", "attention.inner.key"}


@torch.no_grad()
def test_finished_modules_run_once_more_and_give_the_same():
    torch.manual_seed(0)
    block, batches = Block(), [torch.randn(3, 4), torch.randn(2, 4)]
    replay = Replay(block)

    def run():
        outputs = []
        for i, batch in enumerate(batches):
            replay.start(i)
            outputs.append(block(batch))
        return outputs

    attention, inner = block.attention, block.attention.inner
    before = run()
    replay.settle(READERS)
    for _ in range(3):
        assert all(map(torch.equal, before, run()))
    assert (inner.runs, attention.runs) == (8, 16)
    attention.out.weight.mul_(2)  # solved on what has run since
    changed = [block(batch) for i, batch in enumerate(batches) if replay.start(i) is None]
    assert not torch.equal(changed[0], before[0]) and inner.runs == 8
    replay.settle(READERS | {"attention.out", "twice.0", "twice.1"})
    for _ in range(3):
        assert all(map(torch.equal, changed, run()))
    assert (inner.runs, attention.runs) == (10, 24)
    replay.close()
    assert all(map(torch.equal, changed, run())) and attention.runs == 28
    assert not any("forward" in module.__dict__ for module in block.modules())


@torch.no_grad()
def test_a_block_that_changes_what_is_kept_is_found_out():
    block = Block()
    replay = Replay(block)
    replay.settle({*READERS, "attention.out"})
    replay.start(0)
    block.attention(torch.randn(3, 4)).add_(1)
    replay.start(0)
    with pytest.raises(RuntimeError, match="Attention gives in place"):
        block.attention(torch.randn(3, 4))


class Telling(Attention):
    """Attention that gives the weights of all pairs beside its output."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), torch.zeros(len(x), 100, 100)


@torch.no_grad()
def test_what_is_much_larger_than_the_input_is_not_kept():
    block = nn.ModuleDict({"attention": Telling()})
    replay = Replay(block)
    replay.settle({*READERS, "attention.out"})
    for _ in range(3):
        replay.start(0)
        block["attention"](torch.ones(3, 4))
    assert block["attention"].runs == 3
