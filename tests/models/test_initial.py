"""What a class initialises: as `from_pretrained` does, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES

from epmq.models.checkpoint import Checkpoint
from epmq.models.initial import fill_absent, initial_values
from epmq.models.meta import build_meta_model, materialize, rename, tie, tied_names

CPU = torch.device("cpu")
SIZES = {
    **{"vocab_size": 32, "d_model": 32, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
    **{f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in (("layers", 2), ("ffn_dim", 64))},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
}


def marian() -> Any:
    return transformers.MarianMTModel(transformers.MarianConfig(**SIZES, max_position_embeddings=32)).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "marian"])
def test_a_model_that_is_filled_is_the_one_that_transformers_loads(tmp_path, family):
    """All tensors, stored or not, and all buffers."""
    model = marian() if family == "marian" else FAMILIES[family].build()
    model.save_pretrained(tmp_path)
    expected = type(model).from_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    meta = build_meta_model(checkpoint)
    stored, tied = rename(meta, checkpoint.names)[0], tied_names(meta)
    absent = [name for name in meta.state_dict() if name not in stored and name not in tied]
    assert bool(absent) is (family == "marian")
    fill_absent(meta, absent, initial_values(meta, absent), CPU)
    materialize(meta, stored, lambda name: checkpoint.tensor(stored[name]), CPU)
    tie(meta, tied)
    for found, wanted in (
        (meta.state_dict(), expected.state_dict()),
        *[[dict(m.named_buffers()) for m in (meta, expected)]],
    ):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_is_drawn_has_no_initial_value_nor_has_what_belongs_to_it(tmp_path):
    FAMILIES["bert"].build().save_pretrained(tmp_path)
    meta, state = build_meta_model(Checkpoint(tmp_path)), torch.get_rng_state()
    names = ["pooler.dense.weight", "pooler.dense.bias", "embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"]
    values = initial_values(meta, names)
    assert values.keys() == set(names[2:]) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(values[names[2]], torch.ones(64)) and torch.equal(values[names[3]], torch.zeros(64))
    assert initial_values(meta, []) == {} and all(parameter.is_meta for parameter in meta.parameters())
    fill_absent(meta, names, values, CPU)
    assert not meta.pooler.dense.weight.any() and meta.embeddings.LayerNorm.weight.all()
