"""From settings to how every tensor is stored."""

from typing import Any

import pytest
import torch
from checkpoints import edit_weights, weights
from conftest import recipe_for, tiny_bert
from families import FAMILIES
from odd_families import llava, saved_recipe
from transformers import AutoModelForCausalLM

import epmq
from epmq.models.storage import Layout
from epmq.pipeline.prepare import prepare
from epmq.pipeline.run import merge, run
from epmq.quantization.grid import Grid
from epmq.recipe_file import load_recipe
from tests.kit.architectures import ARCHITECTURES

QUIET: dict[str, Any] = {"progress": False, "evaluate": False}
TABLE, QUERY = "embeddings.word_embeddings", "encoder.layer.0.attention.self.query"


def recipe(pool, **quantize: Any) -> dict[str, Any]:
    return recipe_for(pool, quantize={"method": "rtn", **quantize})


def layout(pool, **quantize: Any) -> Layout:
    return prepare(load_recipe(recipe(pool, **quantize)), evaluate=False).layout


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> dict[str, Any]:
    """A recipe over language models whose output layer is their table."""
    folder = tmp_path_factory.mktemp("tied")
    return saved_recipe(folder, FAMILIES["smollm2"].build, "rtn", format="pack-quantized")


def tied_layout(tied: dict[str, Any], **quantize: Any) -> Layout:
    return prepare(load_recipe({**tied, "quantize": {"method": "rtn", **quantize}}), evaluate=False).layout


def test_by_default_tables_have_8_bits_and_the_rest_is_float16(pool):
    """There are as many positions as tokens, and only tokens are counted."""
    found = layout(pool, bits=3, group_size=32, symmetric=False)
    grids = found.quantized()
    assert grids.pop(TABLE) == Grid(8, -1, False) and len(grids) == 13 and set(grids.values()) == {Grid(3, 32, False)}
    for name, storage in found.of.items():
        plain = name.removesuffix(".weight") not in {TABLE, *grids}
        assert storage.dtype == (torch.float16 if plain else torch.float32), name
        assert storage.scale == (None if plain else torch.float16), name
    assert found.solves(QUERY) and not found.solves(TABLE) and found.late == () == found.dropped


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_model_without_blocks_is_not_quantized(tmp_path, method):
    recipe = load_recipe(saved_recipe(tmp_path, ARCHITECTURES["resnet"].build, method))
    data = {name: ARCHITECTURES["resnet"].batches() for name in ("one", "two")}
    with pytest.raises(ValueError, match=r"ResNetModel has no list of repeated blocks .* quantize: use method: none"):
        prepare(recipe, evaluate=False, calibration=data)


@pytest.mark.parametrize("bits", [None, 8, 16])
def test_towers_beside_a_language_model_are_stored_as_norms_are_unless_an_override_names_them(tmp_path, bits):
    overrides = [] if bits is None else [{"layers": "model.vision_tower.*", "bits": bits}]
    recipe = saved_recipe(tmp_path, llava, "rtn")
    recipe["quantize"] |= {"overrides": overrides, "embeddings": 16, "output_layer": 16}
    prepared = prepare(load_recipe(recipe), evaluate=False)
    tower, projector = "model.vision_tower.encoder.layers.1.mlp.fc1", "model.multi_modal_projector"
    found, parts = prepared.layout, ["vision_tower", "multi_modal"][bits is not None :]
    quantized = {name.split(".")[1] for name in found.quantized()}
    assert quantized == {"language_model", *(["vision_tower"] if bits == 8 else [])}
    assert found.solves(tower) == (bits is not None) and not found.solves(f"{projector}.linear_1")
    assert found.of[f"{projector}.linear_1.weight"] == found.of["model.language_model.norm.weight"]
    (note,) = [note for note in prepared.experts.notes if note.startswith("beside the language model, not quantized")]
    assert [part for part in ("vision_tower", "multi_modal") if part in note] == parts


def test_an_override_is_the_first_that_matches(pool):
    overrides = [
        {"layers": "*.layer.0.*.query", "bits": 8},
        {"layers": r"re:encoder\.layer\.\d\.attention\..*", "group_size": 32},
        {"layers": "*.intermediate.dense", "skip": True},
        {"layers": "*.output.dense", "bits": 16},
        {"layers": TABLE, "bits": 4, "group_size": 64},
    ]
    found = layout(pool, overrides=overrides)
    assert found.grid(QUERY) == Grid(8) and found.grid(TABLE) == Grid(4, 64)
    assert found.grid(QUERY.replace("0", "1")) == Grid(4, 32)
    skipped, unrounded = "encoder.layer.1.intermediate.dense", "encoder.layer.1.output.dense"
    assert found.grid(skipped) is found.grid(unrounded) is None
    assert not found.solves(skipped) and found.solves(unrounded)
    assert found.of[f"{skipped}.weight"].dtype == torch.float32


def test_what_is_tied_goes_by_any_of_its_names(tied):
    assert tied_layout(tied).grid("model.embed_tokens") == Grid(8)
    for settings in (
        {"output_layer": 4},
        {"embeddings": 4},
        {"embeddings": 4, "output_layer": {"bits": 4, "group_size": 32}},
        {"overrides": [{"layers": "lm_head", "bits": 4, "group_size": 32}]},
        {
            "overrides": [
                {"layers": "*embed*", "bits": 4, "group_size": 32},
                {"layers": "lm_head", "bits": 4, "group_size": 32},
            ]
        },
    ):
        assert tied_layout(tied, **settings).grid("model.embed_tokens") == Grid(4, 32), settings


WRONG = [
    (
        {"overrides": [{"layers": "*", "bits": 8}, {"layers": "mlp", "bits": 8}]},
        r"quantize\.overrides\.1\.layers: 'mlp' matches no layer",
    ),
    (
        {"embeddings": {"bits": 4, "group_size": 128}},
        rf"quantize\.embeddings: {TABLE}: group size 128 does not divide 64",
    ),
    ({"overrides": [{"layers": QUERY, "group_size": 128}]}, r"quantize\.overrides\.0: .*query: group size 128"),
    ({"drop_unused": True}, r"quantize\.drop_unused: .* rtn has none"),
]


@pytest.mark.parametrize("settings, message", WRONG)
def test_what_does_not_fit_is_named(pool, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        layout(pool, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"embeddings": 8, "output_layer": 4}, r"quantize\.output_layer: lm_head is tied to model\.embed_tokens"),
        (
            {"overrides": [{"layers": "lm_head", "bits": 4}, {"layers": "model.embed_tokens", "bits": 8}]},
            r"quantize\.overrides: .*lm_head.* are one tensor",
        ),
    ],
)
def test_one_tensor_has_one_setting(tied, settings, message):
    with pytest.raises(ValueError, match=message):
        tied_layout(tied, **settings)


def test_a_tied_table_is_one_tensor_that_transformers_opens(tied, tmp_path):
    run({**tied, "quantize": {"method": "rtn"}, "output": str(tmp_path / "out")}, **QUIET)
    stored = weights(tmp_path / "out")
    assert stored["model.embed_tokens.weight"].dtype == torch.int8 and "lm_head.weight" not in stored
    assert stored["lm_head.weight_scale"].equal(stored["model.embed_tokens.weight_scale"])
    table = stored["model.embed_tokens.weight"].float() * stored["model.embed_tokens.weight_scale"].float()
    ours = epmq.load(tmp_path / "out").backbone
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for module in (ours.get_input_embeddings(), ours.get_output_embeddings()):
        assert torch.equal(module.weight, table)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("method", ["gptq", "e_pmq", "expert_guided"])
def test_16_bits_are_the_targets_themselves(pool, tmp_path, method):
    fields = recipe_for(pool, output=str(tmp_path / "out"), quantize={"method": method, "bits": 16})
    report = run(fields, **QUIET)
    assert '"quantization_config"' not in (tmp_path / "out" / "config.json").read_text()
    stored = weights(tmp_path / "out")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    solved = {layer["name"]: layer for layer in report["layers"]}
    assert len(solved) == 12 and {(layer["bits"], layer["loss"]) for layer in solved.values()} == {(16, 0.0)}
    merge(recipe_for(pool, output=str(tmp_path / "merged")), progress=False)
    for name, tensor in weights(tmp_path / "merged").items():
        guided = method != "gptq" and name.removesuffix(".weight") in solved
        assert torch.equal(stored[name], tensor) != guided, name
        if guided:
            assert solved[name.removesuffix(".weight")]["merge_loss"] > 0


def test_what_no_head_reads_may_be_left_out(pool, tmp_path):
    quantize = {"method": "gptq"}
    whole = run(recipe_for(pool, output=str(tmp_path / "whole"), quantize=quantize), progress=False)
    quantize = {"method": "gptq", "drop_unused": True}
    less = run(recipe_for(pool, output=str(tmp_path / "less"), quantize=quantize), progress=False)
    gone = weights(tmp_path / "whole").keys() - weights(tmp_path / "less").keys()
    assert gone and all(name.startswith("pooler.") for name in gone) and less["scores"] == whole["scores"]
    assert less["bytes"] < whole["bytes"]
    assert "no head reads pooler.dense.weight, pooler.dense.bias: left out" in less["notes"]


def test_what_float16_cannot_hold_stays_or_is_refused(own_pool, tmp_path):
    large = {"embeddings__LayerNorm__weight": lambda tensor: tensor * 1e5}
    for folder in ("base", "experts/one", "experts/two"):
        edit_weights(own_pool / folder, **large)
    with pytest.raises(ValueError, match=r"quantize\.rest: embeddings\.LayerNorm\.weight reaches 1"):
        layout(own_pool, rest="float16")
    report = run({**recipe(own_pool), "output": str(tmp_path / "out")}, **QUIET)
    assert any(note.startswith("embeddings.LayerNorm.weight reaches") for note in report["notes"])
    stored = weights(tmp_path / "out")
    assert stored["embeddings.LayerNorm.weight"].dtype == torch.float32
    assert stored["embeddings.LayerNorm.bias"].dtype == torch.float16


@pytest.mark.parametrize("scale", ["float16", "bfloat16", "float32", "as-stored"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_are_read_back_in_their_own_dtype_whatever_the_scales(tmp_path, scale, stored):
    fields = saved_recipe(tmp_path, lambda: tiny_bert().to(stored), "gptq", format="pack-quantized")
    fields["quantize"] |= {"scale_dtype": scale, "embeddings": 16}
    batch = {"input_ids": torch.randint(5, 32, (2, 8))}
    run({**fields, "output": str(tmp_path / "out")}, calibration={"one": [batch], "two": [batch]}, **QUIET)
    tensor = weights(tmp_path / "out")[f"{QUERY}.weight_scale"]
    assert tensor.dtype == (stored if scale == "as-stored" else getattr(torch, scale))
