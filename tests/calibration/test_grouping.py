"""Which layers of a block share an input, and which see some tokens only."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from epmq.calibration.grouping import LayerTarget, find_targets
from epmq.calibration.residual import ResidualAdd


class Mixture(nn.Module):
    """Tokens whose first entry is positive go to `routed`, all to `shared`, and none to `idle`."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.routed, self.idle = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, routes: bool = True) -> Tensor:
        h = x + self.shared(x)
        chosen = x[..., 0] > 0
        if routes and bool(chosen.any()):
            h[chosen] = self.routed(x[chosen])
        return h


class Windows(nn.Module):
    """Reads tokens in windows that are filled up: shapes alone tell how many rows there are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (0, 0, 0, 1))
        return self.inner(padded)[:, :-1]


def step_of(block: nn.Module, *inputs: Any) -> Any:
    """A step whose block is called with these, batch by batch."""
    return SimpleNamespace(
        name="",
        block=block,
        lockstep=True,
        members=[(index, None) for index in range(len(inputs))],
        run=lambda position: block(inputs[position]),
    )


@torch.no_grad()
def test_layers_that_see_some_tokens_only_are_found_on_all_batches():
    none, some = -torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    some[0] = -1
    for inputs in ([none, some], [some, none], [some, some]):
        targets, idle = find_targets(step_of(Mixture(), *inputs), stream=False)
        assert targets == [LayerTarget(["shared"]), LayerTarget(["routed"], waits=False, routed=True)]
        assert idle == ["idle"]


@torch.no_grad()
def test_rows_that_follow_from_shapes_are_not_routed():
    inputs = torch.randn(2, 3, 4)
    assert find_targets(step_of(Windows(), inputs, inputs), stream=False) == ([LayerTarget(["inner"])], [])


def test_an_expert_is_asked_only_for_what_has_the_same_tokens():
    add = ResidualAdd("norm", torch.ones(2), "x")
    assert LayerTarget(["a"]).points(features=True) == ["a"] and LayerTarget(["a"]).points(features=False) == []
    assert LayerTarget(["a"], routed=True).points(features=True) == []
    assert LayerTarget(["a"], add=add).points(features=False) == ["norm"]
