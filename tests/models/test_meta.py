"""Models without their weights."""

import json

import pytest
import torch
from conftest import padded_batches, tiny_bert
from families import FAMILIES, clip
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from epmq.models.blocks import find_stacks
from epmq.models.checkpoint import Checkpoint
from epmq.models.meta import (
    UsedRows,
    build_meta_model,
    has_task_head,
    hold_used_rows,
    load_outside,
    materialize,
    named_class,
    no_larger,
    rename,
    set_tensor,
    tied_names,
    to_meta,
    vocabulary,
)
from tests.kit.architectures import ARCHITECTURES

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("BertModel", False),
        ("LlamaForCausalLM", False),
        ("T5ForConditionalGeneration", False),
        ("GPT2LMHeadModel", False),
        ("BertForSequenceClassification", True),
        (None, False),
    ],
)
def test_what_has_a_task_head(architecture, head):
    assert has_task_head(architecture) is head


def test_only_models_of_transformers_have_a_class():
    assert named_class("BertModel") is BertModel
    assert [named_class(name) for name in ("pipeline", "BertConfig", "NoSuchModel", None, 3)] == [None] * 5


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_that_is_filled_again_is_the_model(family, tmp_path):
    """Built on the meta device, every tensor read from the file under the name that it has there."""
    model, batch = FAMILIES[family].build(), FAMILIES[family].batches()[0]
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    meta = build_meta_model(checkpoint)
    assert type(meta) is type(model) and all(parameter.is_meta for parameter in meta.parameters())
    stored, extra = rename(meta, checkpoint.names)
    assert extra == [] and not meta.training
    inside = tuple(stack.name + "." for stack in find_stacks(meta))

    def read(name: str) -> torch.Tensor:
        return checkpoint.tensor(stored[name])

    load_outside(meta, [name for name in stored if not name.startswith(inside)], read, CPU, tied_names(meta))
    materialize(meta, [name for name in stored if name.startswith(inside)], read, CPU)
    expected = model(**batch)
    for name, tensor in meta(**batch).items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    block = find_stacks(meta)[0].blocks[0]
    to_meta(block)
    assert all(parameter.is_meta for parameter in block.parameters())


def test_a_quantized_model_is_refused(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"bits": 4}}))
    with pytest.raises(ValueError, match=r"config\.json: the model is quantized already"):
        build_meta_model(Checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"num_hidden_layers": 10_000}, "far more tensors than the"),
        ({"vocab_size": 10**12}, "more than there is in all"),
    ],
)
def test_a_config_that_describes_far_more_than_there_is_is_refused(tmp_path, size, message):
    tiny_bert().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **size}))
    with pytest.raises(ValueError, match=message):
        build_meta_model(Checkpoint(tmp_path))


def test_nothing_is_refused_after_the_block():
    with pytest.raises(ValueError, match="here describes a weight"), no_larger("here", 1, 3):
        nn.Linear(2, 2)
    nn.Linear(2, 2)


def test_a_task_heads_tensors_are_extra(tmp_path):
    BertForSequenceClassification(BertConfig(**tiny_bert().config.to_dict())).save_pretrained(tmp_path)
    stored, extra = rename(build_meta_model(Checkpoint(tmp_path)), Checkpoint(tmp_path).names)
    assert sorted(extra) == ["classifier.bias", "classifier.weight"]
    assert all(name == "bert." + key for key, name in stored.items())


def test_parameters_and_buffers_are_set():
    module = nn.BatchNorm1d(2)
    set_tensor(module, "weight", torch.full((2,), 3.0))
    set_tensor(module, "running_mean", torch.full((2,), 4.0))
    assert module.weight.tolist() == [3, 3] and not module.weight.requires_grad
    assert module.running_mean.tolist() == [4, 4] and "running_mean" in dict(module.named_buffers())


def test_only_rows_that_are_used_are_held():
    table, reads = torch.randn(10, 3).half(), []
    embedding = nn.Embedding(10, 3)
    rows = UsedRows(10, lambda: reads.append(1) or table, CPU)
    embedding.register_forward_pre_hook(rows)
    for ids, held, count in (([[1, 2], [2, 7]], 3, 1), ([[7, 1], [1, 1]], 3, 1), ([[0, 1], [9, 2]], 5, 2)):
        ids = torch.tensor(ids)
        assert torch.equal(embedding(ids), table.float()[ids])
        assert len(embedding.weight) == held and len(reads) == count


@torch.no_grad()
def test_a_model_that_holds_used_rows_gives_the_same():
    model, meta = tiny_bert(), tiny_bert()
    state = model.state_dict()
    others = hold_used_rows(meta, state, {}, state.__getitem__, CPU)
    assert set(state) - set(others) == {"embeddings.word_embeddings.weight"}
    meta.load_state_dict({name: state[name] for name in others}, strict=False)
    for batch in padded_batches(2):
        assert torch.equal(meta(**batch).last_hidden_state, model(**batch).last_hidden_state)
    vision = clip()
    assert hold_used_rows(vision, ["a"], {}, state.__getitem__, CPU) == ["a"]


def test_how_many_tokens_a_model_knows():
    assert [vocabulary(FAMILIES[family].build()) for family in ("bert", "clip", "dinov2")] == [32, 32, None]


def test_tokens_stay_in_the_dtype_on_disk_and_other_embeddings_are_float32(tmp_path):
    """DeBERTa multiplies by the table of its relative positions, without a look-up."""
    ARCHITECTURES["debertav2"].build().half().save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    meta = build_meta_model(checkpoint)
    load_outside(meta, list(meta.state_dict()), checkpoint.tensor, CPU, {})
    assert meta.embeddings.word_embeddings.weight.dtype == torch.float16
    assert meta.encoder.rel_embeddings.weight.dtype == torch.float32
