import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recipe_for

import epmq
from epmq.errors import InputError
from epmq.export import onnx, packed, vllm
from epmq.export.form import Form
from epmq.export.target import Coded, Contents
from epmq.quantization.grid import Grid
from epmq.reporting.report import export_line

HALF = Form(Grid(4, 32), scale=torch.float16)
ATTENTION = {f"model.layers.0.self_attn.{name}_proj": HALF for name in "qkvo"}
MLP = {f"model.layers.0.mlp.{name}_proj": HALF for name in ("gate", "up", "down")}
GRIDS = [Grid(4, 32), Grid(4, 64, False), Grid(4, 128), Grid(4), Grid(4, -1, False), Grid(8), Grid(8, 128)]


def contents(forms: dict[str, Form | None] | None = None, **config: Any) -> Contents:
    """A decoder of one block, with other forms for some layers, or None for what is plain."""
    given: dict[str, Form | None] = {**ATTENTION, **MLP, "model.embed_tokens": None, **(forms or {})}
    layers = {name: Coded((64, 128), form) for name, form in given.items() if form is not None}
    plain = {f"{name}.weight": (64, 128) for name, form in given.items() if form is None}
    return Contents({"model_type": "llama", "vocab_size": 64, **config}, layers, plain)


def everywhere(grid: Grid) -> dict[str, Form | None]:
    return dict.fromkeys([*ATTENTION, *MLP], replace(HALF, grid=grid))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_grids_that_its_kernels_take_pass(grid: Grid) -> None:
    vllm.check(contents(everywhere(grid)))
    vllm.check(contents({**everywhere(grid), "lm_head": HALF}))


@pytest.mark.parametrize(
    ("grid", "nearest"),
    [
        (Grid(2, 32), "bits: 4, group_size: 32, symmetric: true"),
        (Grid(3, 64, False), "bits: 4, group_size: 64, symmetric: false"),
        (Grid(8, 32, False), "bits: 8, group_size: 32, symmetric: true"),
    ],
    ids=str,
)
def test_other_grids_are_refused_with_the_nearest(grid: Grid, nearest: str) -> None:
    with pytest.raises(InputError, match=rf"vllm cannot hold model\.layers\.0\.\S+ .*fits: {nearest}"):
        vllm.check(contents(everywhere(grid)))


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ({"model.embed_tokens": replace(HALF, grid=Grid(8), table=True)}, r"model\.embed_tokens.*embeddings: 16"),
        ({"model.embed_tokens": HALF}, r"model\.embed_tokens.*embeddings: 16"),
        ({"text_projection": replace(HALF, grid=Grid(4))}, r"text_projection.*embeddings: 16"),
        ({"model.layers.0.self_attn.k_proj": replace(HALF, grid=Grid(8, 32))}, r"q_proj and .*k_proj .*one grid"),
        ({"model.layers.0.mlp.up_proj": None}, r"gate_proj and .*up_proj: they need one grid"),
        ({"model.layers.0.mlp.down_proj": replace(HALF, transposed=True)}, r"down_proj is stored as \[in, out\]"),
    ],
)
def test_what_it_does_not_open_is_named(forms: dict[str, Form | None], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vllm.check(contents(forms))


def test_layers_outside_the_blocks_are_read_only_plain() -> None:
    with pytest.raises(InputError, match=r"text_projection.*overrides: \[\{layers: text_projection, skip: true\}\]"):
        vllm.check(contents({"text_projection": HALF}, vocab_size=1000))


def test_layers_that_are_not_fused_may_differ() -> None:
    other = replace(HALF, grid=Grid(8, 64))
    vllm.check(contents({"model.layers.0.mlp.down_proj": other, "model.layers.0.self_attn.o_proj": None}))


def test_models_that_it_has_no_class_for_are_named() -> None:
    with pytest.raises(InputError, match="no class for models of type t5"):
        vllm.check(contents(model_type="t5"))


def test_zero_points_must_fill_their_words() -> None:
    layer = Coded((60, 64), replace(HALF, grid=Grid(4, 32, False)))
    with pytest.raises(InputError, match=r"zero points of the 60 rows of layers\.0\.a fill no whole words"):
        vllm.check(Contents({}, {"layers.0.a": layer}, {}))


def test_a_checkpoint_is_checked_and_nothing_written(pool: Path, tmp_path: Path) -> None:
    recipe = recipe_for(pool, quantize={"method": "rtn"}, output=str(tmp_path / "default"))
    epmq.run(recipe, progress=False, evaluate=False)
    with pytest.raises(InputError, match=r"embeddings\.word_embeddings.*embeddings: 16"):
        epmq.export_checkpoint(tmp_path / "default", "vllm", progress=False)
    with pytest.raises(InputError, match=r"formats\.0: .*embeddings: 16"):
        epmq.dry_run({**recipe, "formats": ["vllm"], "output": str(tmp_path / "no")}, progress=False)
    plain = {"method": "rtn", "embeddings": 16}
    out = {**recipe, "quantize": plain, "formats": ["vllm"], "output": str(tmp_path / "plain")}
    report = epmq.run(out, progress=False, evaluate=False)
    [export] = report["exports"]
    assert export["bytes"] == 0 and export_line(export).startswith("vllm; for vLLM, which should open")
    assert epmq.export_checkpoint(tmp_path / "plain", "vllm", progress=False) == export
    assert not (tmp_path / "plain-vllm").exists()


# --- what vLLM's own code says, where it is installed ------------------------------------------------------------


def scheme(forms: dict[str, Form], layer: str, ignore: tuple[str, ...] = ()) -> Any:
    """The scheme that vLLM gives a layer of its own by the config that we write."""
    module = pytest.importorskip("vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors")
    content = json.loads(json.dumps(packed.config(forms, list(ignore))))
    config = module.CompressedTensorsConfig.from_config(content)
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    linear = type("RowParallelLinear", (torch.nn.Module,), {})()
    return config.get_scheme(linear, layer)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_vllm_finds_the_grid_of_every_layer(grid: Grid) -> None:
    other = replace(HALF, grid=Grid(4, 64))
    forms = {**dict.fromkeys(ATTENTION, replace(HALF, grid=grid)), **dict.fromkeys(MLP, other), "lm_head": HALF}
    expected = {"self_attn.qkv_proj": grid, "self_attn.o_proj": grid, "mlp.gate_up_proj": other.grid}
    for name, own in expected.items():
        found = scheme(forms, f"model.layers.0.{name}")
        assert (found.num_bits, found.group_size, found.symmetric) == (own.bits, own.group_size, own.symmetric)
    assert scheme({**forms, "lm_head": replace(HALF, grid=grid)}, "lm_head").num_bits == grid.bits


def test_vllm_refuses_what_we_refuse() -> None:
    table = {"model.embed_tokens": replace(HALF, grid=Grid(8), table=True)}
    with pytest.raises(AssertionError):
        scheme({**ATTENTION, **table}, "model.layers.0.self_attn.o_proj")
    skipped = "model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match="same scheme"):
        scheme(ATTENTION, "model.layers.0.self_attn.qkv_proj", ignore=(skipped,))


def experts(forms: dict[str, Form | None] | None = None, leaves: tuple[str, ...] = ("gate", "up", "down")) -> Contents:
    """A decoder of one block with two experts, with other forms for some of their layers."""
    names = [f"model.layers.0.mlp.experts.{expert}.{leaf}_proj" for expert in (0, 1) for leaf in leaves]
    dense = dict.fromkeys(MLP)
    return contents({**dense, **dict.fromkeys(names, HALF), **(forms or {})})


FIRST = "model.layers.0.mlp.experts.0.up_proj"


def test_mixtures_on_one_grid_pass() -> None:
    vllm.check(experts())
    vllm.check(experts(dict.fromkeys(ATTENTION, replace(HALF, grid=Grid(8)))))
    plain = [f"model.layers.0.mlp.experts.{expert}.{leaf}_proj" for expert in (0, 1) for leaf in ("gate", "up", "down")]
    vllm.check(experts(dict.fromkeys(plain)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (experts({FIRST: replace(HALF, grid=Grid(8))}), "one layer of"),
        (experts({FIRST.replace("up", "down"): None}), r"one layer of all experts of model\.layers\.0\.mlp\.experts"),
        (
            contents(dict.fromkeys([FIRST, FIRST.replace("0.up", "1.up")], replace(HALF, grid=Grid(4, 32, False)))),
            "zero",
        ),
        (
            experts(dict.fromkeys(ATTENTION, replace(HALF, grid=Grid(8))), leaves=("w1", "w2", "w3")),
            "only where all linear layers are on it",
        ),
    ],
)
def test_other_mixtures_are_refused(given: Contents, message: str) -> None:
    with pytest.raises(InputError, match=f"vllm: .*{message}"):
        vllm.check(given)


def test_experts_with_biases_are_refused() -> None:
    given = experts()
    with pytest.raises(InputError, match="vllm: it reads experts that have biases"):
        vllm.check(replace(given, plain={**given.plain, f"{FIRST}.bias": (64,)}))


def test_a_graph_holds_no_mixture() -> None:
    given = experts()
    with pytest.raises(InputError, match=r"onnx: which experts of model\.layers\.0\.mlp\.experts are called"):
        onnx.check(replace(given, config={"architectures": ["Qwen3MoeForCausalLM"]}))
