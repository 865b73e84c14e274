import pytest
import torch

from epmq.calibration import held_out
from epmq.calibration.held_out import hold_out
from epmq.errors import InputError


def batches(*sizes: int, tokens: int = 3) -> list[dict[str, torch.Tensor]]:
    """Batches whose first token numbers the examples."""
    ids = torch.arange(sum(sizes))[:, None].repeat(1, tokens)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(list(sizes))]


def numbers(parts: list[dict[str, torch.Tensor]]) -> list[int]:
    return [int(row[0]) for part in parts for row in part["input_ids"]]


def test_every_eighth_example_is_apart():
    train, held = hold_out(batches(10, 10, 4))
    assert numbers(held) == [7, 15, 23] and sorted(numbers(train) + numbers(held)) == list(range(24))
    assert all(part["attention_mask"].shape == part["input_ids"].shape for part in train + held)


@pytest.mark.parametrize("sizes", [(2,), (1, 1), (3, 2), (7,)])
def test_one_example_is_held_out_at_least(sizes):
    train, held = hold_out(batches(*sizes))
    assert numbers(held) == [sum(sizes) - 1] and len(numbers(train)) == sum(sizes) - 1


def test_a_single_example_is_refused():
    with pytest.raises(InputError, match="two examples at least"):
        hold_out(batches(1))


def test_long_batches_are_cut(monkeypatch):
    monkeypatch.setattr(held_out, "MOST_TOKENS", 12)
    train, _ = hold_out(batches(16, tokens=4))
    assert [len(part["input_ids"]) for part in train] == [3, 3, 3, 3, 2]
    assert [len(part["input_ids"]) for part in hold_out(batches(16, tokens=40))[0]] == [1] * 14


def test_pictures_are_cut_by_nothing_but_the_share():
    train, held = hold_out([{"pixel_values": torch.zeros(16, 3, 4, 4)}])
    assert [len(part["pixel_values"]) for part in train + held] == [14, 2]


def test_what_cannot_be_cut_is_held_out_whole():
    odd = [{"input_ids": torch.full((2, 3), number), "image": torch.zeros(5, 2)} for number in range(9)]
    train, held = hold_out(odd)
    assert numbers(held) == [7, 7] and len(train) == 8
