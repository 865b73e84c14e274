"""A large layer that is solved a tile of its rows at a time."""

import pytest
import torch
from conftest import padded_batches
from families import FAMILIES
from odd_families import prepared_run

from epmq.calibration import tiles
from epmq.pipeline.run import calibration_batches, calibration_engine

DATA = {"one": padded_batches(2), "two": padded_batches(3)[2:]}


@pytest.mark.parametrize("method", ["gptq", "e_pmq", "expert_guided"])
def test_tiles_give_the_codes_of_the_whole(tmp_path, method, monkeypatch):
    prepared = prepared_run(tmp_path, FAMILIES["llama"].build, DATA, method)
    blocks = []
    for tile in (tiles.TILE, 64 * 16):
        monkeypatch.setattr(tiles, "TILE", tile)
        blocks.append(list(calibration_engine(prepared, calibration_batches(prepared)))[-1])
    whole, tiled = (block.layers["lm_head"] for block in blocks)
    # Products of other shapes round otherwise, and a near tie falls to the other side.
    plain = whole.dequantize()
    assert (tiled.dequantize() - plain).norm() < 0.02 * plain.norm()
    before, after = (block.reports[0] for block in blocks)
    assert (before.tokens, before.shape) == (after.tokens, after.shape)
    assert after.loss == pytest.approx(before.loss, rel=0.1)
    assert after.merge_loss == pytest.approx(before.merge_loss, rel=1e-2, abs=1e-9)


def test_a_tile_has_as_many_rows_as_fit():
    assert tiles.tile_height(torch.empty(8, 1 << 20, device="meta")) == 64
    assert tiles.tile_height(torch.empty(8, 1 << 30, device="meta")) == 1
