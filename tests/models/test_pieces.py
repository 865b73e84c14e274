"""Pieces of tensors on disk: their names, shapes and places."""

from __future__ import annotations

import pytest
import torch

from epmq.errors import InputError
from epmq.models.pieces import Piece, piece_of, tensor_on_disk

PIECES = [
    Piece("a.experts.down_proj", 3, 8),
    Piece("a.experts.gate_up_proj", 3, 8, 1, 2),
    Piece("a.experts.gate_up_proj", 0, 8, 1, 2, interleaved=True, turned=True),
    Piece("a.experts.gate_up_proj_bias", 7, 8, 0, 2, interleaved=True, leaf="bias"),
    Piece("a.experts.down_proj", 1, 8, unturned=(64, 32)),
    Piece("a.experts.3.w13.weight", part=1, parts=2),
]


@pytest.mark.parametrize("piece", PIECES)
def test_a_name_says_all_of_a_piece(piece):
    assert piece_of(piece.name) == piece and tensor_on_disk(piece.name) == piece.tensor
    assert piece.name.endswith(f".{piece.leaf}") and piece_of(piece.tensor) is None


def test_pieces_are_where_the_model_looks_for_them():
    whole = torch.arange(2 * 6 * 4).reshape(2, 6, 4)
    halves = [Piece("x", 1, 2, part, 2) for part in (0, 1)]
    assert torch.cat([half.take(whole[1]) for half in halves]).equal(whole[1])
    turned = Piece("x", 1, 2, 1, 2, interleaved=True, turned=True)
    assert turned.take(whole[1]).equal(whole[1].T[1::2]) and turned.shape(whole.shape) == (2, 6)


@pytest.mark.parametrize(
    ("shape", "message"), [((3, 6, 4), "says 2 experts"), ((2, 5, 4), "no weight of 2 parts"), ((2, 6), "no weight")]
)
def test_what_does_not_fit_is_named(shape, message):
    with pytest.raises(InputError, match=rf"'x' is .*{message}"):
        Piece("x", 1, 2, 0, 2).shape(shape)
