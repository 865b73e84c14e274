from typing import Any

import pytest
import torch
from conftest import padded_batches, tiny_bert, tiny_dinov2
from transformers import (
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from epmq.blocks import find_stacks, input_groups, linears
from epmq.walk import Walk


def image_batches() -> list[dict[str, torch.Tensor]]:
    return [{"pixel_values": torch.randn(3, 3, 28, 28)} for _ in range(2)]


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ).eval()


def t5_batches() -> list[dict[str, torch.Tensor]]:
    targets = padded_batches(3)[::-1]
    return [
        {**source, "decoder_input_ids": target["input_ids"], "decoder_attention_mask": target["attention_mask"]}
        for source, target in zip(padded_batches(3), targets)
    ]


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4)).eval()


def clip() -> CLIPModel:
    text = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    heads = {"num_attention_heads": 4}
    config = CLIPConfig(text_config={**text, **heads, "eos_token_id": 31}, vision_config={**vision, **heads})
    return CLIPModel(config).eval()


def clip_batches() -> list[dict[str, torch.Tensor]]:
    return [{**text, "pixel_values": torch.randn(2, 3, 28, 28)} for text in padded_batches(2)]


FAMILIES = {
    "bert": (tiny_bert, padded_batches, {"encoder.layer": 2}),
    "dinov2": (tiny_dinov2, image_batches, {"encoder.layer": 2}),
    "t5": (t5, t5_batches, {"encoder.block": 2, "decoder.block": 2}),
    "llama": (llama, padded_batches, {"model.layers": 3}),
    "gpt2": (gpt2, padded_batches, {"transformer.h": 2}),
    "clip": (clip, clip_batches, {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 2}),
}


def tensors_of(output: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_chained_blocks_are_the_models_own_forward(family):
    build, make_batches, stacks = FAMILIES[family]
    model, batches = build(), make_batches()
    assert {stack.name: len(stack.blocks) for stack in find_stacks(model)} == stacks
    expected = [tensors_of(model(**batch)) for batch in batches]

    walk = Walk(model, batches)
    names = []
    for step in walk:
        names.append(step.name)
        step.finish()
    assert sorted(names) == sorted(f"{name}.{i}" for name, count in stacks.items() for i in range(count))

    # The stored outputs of the last blocks, put through what follows them, must be the model's own output.
    for i, batch in enumerate(batches):
        for stack in walk.stacks:
            for block in stack.blocks:
                block.forward = lambda *args, stack=stack, i=i, **kwargs: stack.outputs[i]
        found = tensors_of(model(**batch))
        assert found.keys() == expected[i].keys() and found
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[i][name]), name
        for stack in walk.stacks:
            for block in stack.blocks:
                del block.forward


def groups_of(family: str) -> list[list[str]]:
    build, make_batches, _ = FAMILIES[family]
    found = []
    for step in Walk(build(), make_batches()):
        groups = input_groups(step.block, lambda step=step: step.run(0))
        assert sorted(name for group in groups for name in group.names) == sorted(n for n, _ in linears(step.block))
        found.append([group.names for group in groups])
        step.finish()
    return found


@torch.no_grad()
def test_layers_that_share_an_input_are_found():
    assert {frozenset(group) for group in groups_of("bert")[0]} == {
        frozenset(f"attention.self.{x}" for x in ("query", "key", "value")),
        frozenset({"attention.output.dense"}),
        frozenset({"intermediate.dense"}),
        frozenset({"output.dense"}),
    }
    assert len(groups_of("llama")[0]) == 4
    decoder = groups_of("t5")[-1]
    assert {frozenset(group) for group in decoder[:4]} == {
        frozenset({f"layer.0.SelfAttention.{x}" for x in "qkv"}),
        frozenset({"layer.0.SelfAttention.o"}),
        frozenset({"layer.1.EncDecAttention.q"}),
        frozenset({"layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"}),
    }


def test_a_layer_without_data_is_an_error():
    block = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "idle": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="idle"):
        input_groups(block, lambda: block["used"](torch.randn(1, 2)))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no list of repeated blocks"):
        find_stacks(torch.nn.Linear(2, 2))
