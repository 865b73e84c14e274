"""Rows of tables of tokens, looked up by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epmq.merging.token_rows import STRETCHES, TokenRows, Vocabulary, read_rows

TABLE = torch.arange(40.0).view(20, 2)


def rows_of(index, dimension=0):
    """Token rows over `TABLE`, or over its transpose; what is lacking is -1."""
    table = TABLE if dimension == 0 else TABLE.T

    def fill(name, positions):
        shape = [len(positions) if i == dimension else size for i, size in enumerate(table.shape)]
        return torch.full(shape, -1.0)

    return TokenRows(
        {"t": dimension},
        torch.tensor(index),
        {"t": 20},
        lambda name, rows: table if rows is None else table[rows],
        fill,
    )


@given(st.lists(st.integers(0, 19), min_size=1, max_size=30))
def test_rows_by_number(numbers):
    found = read_rows(lambda name, rows: TABLE[rows], "t", torch.tensor(numbers))
    assert torch.equal(found, TABLE[numbers])


def test_many_stretches_are_read_at_once():
    reads, numbers = [], torch.tensor([3, 5] * STRETCHES)

    def read(name, rows):
        reads.append(rows)
        return TABLE[rows]

    assert torch.equal(read_rows(read, "t", numbers), TABLE[numbers]) and reads == [slice(3, 6)]


@pytest.mark.parametrize("dimension", [0, 1])
def test_what_a_model_lacks_is_filled_in(dimension):
    tokens = rows_of([4, -1, 0, 25], dimension)
    expected = torch.stack([TABLE[4], -torch.ones(2), TABLE[0], -torch.ones(2)], dimension)
    assert torch.equal(tokens.tensor("t"), expected)
    assert torch.equal(tokens.tensor("t", slice(1, 3)), expected[1:3])
    assert torch.equal(tokens.lacking("t").expand_as(expected), expected == -1)
    assert tokens.shape("t", tuple(expected.shape)) == tuple(expected.shape)
    assert tokens.shape("other", (7, 7)) == (7, 7)


def test_a_head_that_scores_tokens_has_the_merged_rows():
    found = rows_of([4, -1, 0]).of_head({"bias": torch.arange(20.0), "weight": torch.ones(3, 20)})
    assert found["bias"].tolist() == [4, 0, 0] and found["weight"].shape == (3, 20)


def test_numbers_in_configs_follow_their_tokens():
    vocabulary = Vocabulary({"a": 0, "b": 1, "c": 2}, theirs={"one": {"a": 2, "b": 1, "d": 0}})
    config = {"pad_token_id": 2, "eos_token_id": [1, 2], "hidden_size": 2, "text_config": {"bos_token_id": 2}}
    expected = {"pad_token_id": 0, "eos_token_id": [1, 0], "hidden_size": 2, "text_config": {"bos_token_id": 0}}
    assert vocabulary.renumbered("one", config) == expected
    assert vocabulary.renumbered("two", config) == config
    assert vocabulary.merged_numbers("one") == {2: 0, 1: 1}
