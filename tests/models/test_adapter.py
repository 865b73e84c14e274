"""LoRA experts against PEFT itself: what is read is what `merge_and_unload` makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import WEIGHTS, adapt, edit, open_adapters, rewrite
from conftest import perturbed, tiny_bert, tiny_dinov2
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertModel

from epmq.merge_settings import TaskArithmetic, Wudi
from epmq.merging.matrices import wudi
from epmq.merging.merged import MergedWeights
from epmq.models.adapter import CONFIG, Adapter

TARGETS = {
    "bert": ["query", "value", "output.dense"],
    "llama": ["q_proj", "down_proj"],
    "t5": ["q", "wi"],
    "gpt2": ["c_attn", "mlp.c_proj"],
}
EMBEDDINGS = {"bert": "word_embeddings", "llama": "embed_tokens", "t5": "shared", "gpt2": "wte"}
SAVED = {"bert": ["pooler"], "llama": ["norm", "lm_head"], "t5": ["final_layer_norm"], "gpt2": ["ln_f"]}
VARIANTS = ["plain", "rslora", "patterns", "embedding", "modules_to_save", "bias_all", "bias_lora_only"]


def settings_of(variant: str, family: str) -> dict[str, Any]:
    """Arguments of a `LoraConfig`."""
    targets = TARGETS[family]
    deep = r"^.*\.1\..*" + targets[0].replace(".", r"\.")
    return {
        "plain": {"lora_alpha": 3, "target_modules": targets},
        "rslora": {"use_rslora": True, "target_modules": targets},
        "patterns": {
            "target_modules": targets,
            "rank_pattern": {targets[0]: 2, targets[1]: 5},
            "alpha_pattern": {deep: 1, targets[0]: 12, f"nothing.{targets[1]}": 99},
        },
        "embedding": {"target_modules": [*targets, EMBEDDINGS[family]]},
        "modules_to_save": {"target_modules": targets[:1], "modules_to_save": SAVED[family]},
        "bias_all": {"target_modules": targets, "bias": "all"},
        "bias_lora_only": {"target_modules": targets, "bias": "lora_only"},
    }[variant]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    for family in [*TARGETS, "smollm2"]:
        FAMILIES[family].build().save_pretrained(folder / family)
    return {family: folder / family for family in [*TARGETS, "smollm2"]}


@pytest.fixture
def plain(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A good adapter of the small BERT, to be spoilt."""
    adapt(BertModel.from_pretrained(bases["bert"]), tmp_path / "lora", target_modules=["query"])
    return tmp_path / "lora"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", TARGETS)
def test_an_adapter_is_what_peft_merges(bases, tmp_path, family, variant):
    """Of tied embeddings, PEFT changes the one that was trained, and its merge all: what was trained is the expert."""
    model_class = type(FAMILIES[family].build())
    adapt(model_class.from_pretrained(bases[family]), tmp_path / "lora", **settings_of(variant, family))
    merged = PeftModel.from_pretrained(model_class.from_pretrained(bases[family]), tmp_path / "lora").merge_and_unload()
    expected, base = merged.state_dict(), model_class.from_pretrained(bases[family]).state_dict()
    opened = open_adapters(bases[family], tmp_path / "lora")
    expert = opened.experts["t0"]
    assert not opened.absent and expert.head_tensors() == {}
    apart = [name for name in opened.base.ties if name not in opened.tied]
    assert bool(apart) is (variant == "embedding" and bool(opened.base.ties))
    moved = 0
    for name in opened.names:
        tensor = base[name] if name in apart else expected[name]
        torch.testing.assert_close(expert.tensor(name), tensor, rtol=0, atol=1e-6, msg=name)
        moved += not torch.equal(expected[name], base[name])
    assert moved >= 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["embedding", "modules_to_save"])
@pytest.mark.parametrize("family", TARGETS)
def test_rows_of_an_adapter_are_those_of_the_whole(bases, tmp_path, monkeypatch, family, variant):
    """What a large tensor goes through, on small ones."""
    model_class = type(FAMILIES[family].build())
    adapt(model_class.from_pretrained(bases[family]), tmp_path / "lora", **settings_of(variant, family))
    opened = open_adapters(bases[family], tmp_path / "lora")
    merged = MergedWeights(opened, TaskArithmetic())
    whole = {name: merged.tensor(name) for name in opened.names}
    monkeypatch.setattr("epmq.merging.merged.ROWS", 200)
    for name, tensor in whole.items():
        torch.testing.assert_close(merged.tensor(name), tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_methods_that_see_matrices_merge_adapters_in_the_span_of_their_factors(bases, tmp_path, family):
    model_class, folders = type(FAMILIES[family].build()), [tmp_path / "one", tmp_path / "two"]
    for folder, targets in zip(folders, (TARGETS[family], TARGETS[family][:1])):
        adapt(model_class.from_pretrained(bases[family]), folder, target_modules=targets)
    opened = open_adapters(bases[family], *folders)
    merged, names = MergedWeights(opened, Wudi()), [name for name in opened.names if name.endswith("weight")]
    assert merged.uses_factors
    changed = 0
    for name in names:
        base = opened.base.tensor(name)
        vectors = [expert.tensor(name) - base for expert in opened.experts.values()]
        turned = [vector.T if opened.experts["t0"].is_transposed(name) else vector for vector in vectors]
        if any(vector.any() for vector in vectors):
            expected = wudi(turned)
            expected = base + (expected.T if opened.experts["t0"].is_transposed(name) else expected)
            torch.testing.assert_close(merged.tensor(name), expected, rtol=1e-5, atol=1e-5, msg=name)
            changed += 1
        else:
            assert torch.equal(merged.tensor(name), base)
    assert changed >= 4


@settings(deadline=None, max_examples=20)
@given(
    rank=st.integers(1, 9),
    alpha=st.one_of(st.integers(1, 64), st.floats(0.1, 64)),
    rslora=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_change_is_scaled_by_alpha_over_the_rank_or_its_root(tmp_path_factory, rank, alpha, rslora, dtype):
    folder = tmp_path_factory.mktemp("lora")
    config = {"peft_type": "LORA", "r": 99, "lora_alpha": alpha, "use_rslora": rslora}
    (folder / CONFIG).write_text(json.dumps(config))
    down, up = torch.randn(rank, 6).to(dtype), torch.randn(5, rank).to(dtype)
    save_file({"base_model.model.x.lora_A.weight": down, "base_model.model.x.lora_B.weight": up}, folder / WEIGHTS)
    adapter = Adapter(folder)
    assert adapter.names == ["x.weight"] and adapter.change_shape("x.weight") == (5, 6)
    expected = alpha / (rank**0.5 if rslora else rank) * (up.double() @ down.double())
    torch.testing.assert_close(adapter.change("x.weight").double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", TARGETS)
def test_an_adapter_that_was_not_trained_is_the_base(bases, tmp_path, family):
    model_class = type(FAMILIES[family].build())
    adapt(model_class.from_pretrained(bases[family]), tmp_path, moved=False, target_modules=TARGETS[family])
    opened = open_adapters(bases[family], tmp_path)
    for name in opened.names:
        assert torch.equal(opened.experts["t0"].tensor(name), opened.base.tensor(name)), name


def test_a_base_in_half_precision_is_changed_in_float32(tmp_path):
    model = perturbed(tiny_bert(), 1).bfloat16()
    model.save_pretrained(tmp_path / "base")
    adapt(model.float(), tmp_path / "lora", target_modules=["query"])
    opened, name = open_adapters(tmp_path / "base", tmp_path / "lora"), "encoder.layer.0.attention.self.query.weight"
    merged = PeftModel.from_pretrained(
        BertModel.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "lora"
    ).merge_and_unload()
    adapted = opened.experts["t0"].tensor(name)
    assert adapted.dtype == torch.float32
    assert MergedWeights(opened, TaskArithmetic()).tensor(name).dtype == torch.bfloat16
    torch.testing.assert_close(adapted, merged.state_dict()[name], rtol=0, atol=1e-6)


# --- tied weights ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
)
@torch.no_grad()
def test_tied_embeddings_that_were_trained_together_are_the_trained_model(bases, tmp_path, fields):
    """The trained model, not its merge: PEFT 0.21 adds the change to the shared weight twice."""
    model = adapt(type(FAMILIES["smollm2"].build()).from_pretrained(bases["smollm2"]), tmp_path, **fields)
    opened, ids = open_adapters(bases["smollm2"], tmp_path), torch.arange(32)[None]
    logits = opened.whole_model(opened.experts["t0"], torch.device("cpu"))(ids).logits
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-5)
    assert opened.notes == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ],
)
@torch.no_grad()
def test_one_half_of_a_tied_pair_that_was_trained_alone_makes_two(bases, tmp_path, fields):
    """The trained model again: the half that was not trained is the base's."""
    model = adapt(type(FAMILIES["smollm2"].build()).from_pretrained(bases["smollm2"]), tmp_path, **fields)
    opened, ids = open_adapters(bases["smollm2"], tmp_path), torch.arange(32)[None]
    logits = opened.whole_model(opened.experts["t0"], torch.device("cpu"))(ids).logits
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-5)
    assert "lm_head.weight" in opened.names and opened.is_untied
    note = "lm_head.weight is model.embed_tokens.weight in the base, another in expert t0: they are two"
    assert opened.notes == [note]


# --- what is not applied -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora is not applied here"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not applied here, only LORA"),
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' moves the base's weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights 'pissa_niter_16'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights 'OLoRA'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights 'lora_ga'"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication is not applied here"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters is not applied here"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is not applied here"),
        ({"lora_bias": True}, "lora_bias is not applied here"),
        ({"use_qalora": True}, "use_qalora is not applied here"),
        ({"some_day": {"a": 1}, "another": 1}, "some_day, another is not applied here"),
    ],
)
def test_what_an_adapter_asks_for_in_vain_is_named(bases, plain, fields, message):
    open_adapters(bases["bert"], plain)
    edit(plain, **fields)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}"):
        open_adapters(bases["bert"], plain)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_how_the_factors_started_does_not_matter(bases, plain, start):
    edit(plain, init_lora_weights=start, some_day=None, another=[])
    open_adapters(bases["bert"], plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "0.attention.self.query.lora_B" not in k}, "only one of its two"),
        (lambda t: {k.replace("lora_A.weight", "lora_magnitude_vector"): v for k, v in t.items()}, "of no kind"),
        (lambda t: {k.replace("query", "quarry"): v for k, v in t.items()}, "changes no tensor of the base"),
        (lambda t: {k.replace("layer.1", "layer.7"): v for k, v in t.items()}, r"'encoder\.layer\.7.*the base lacks"),
        (
            lambda t: {k: v[:, :3].clone() if "lora_A" in k else v for k, v in t.items()},
            r"is \[64, 3\], but \[64, 64\]",
        ),
        (lambda t: {k: v[..., None] for k, v in t.items()}, "is not a linear layer or an embedding"),
        (lambda t: {k: v * float("nan") for k, v in t.items()}, "NaN"),
        (lambda t: {}, "changes no tensor of the base"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(bases, plain, change, message):
    rewrite(plain, change)
    with pytest.raises(ValueError, match=message):
        open_adapters(bases["bert"], plain).experts["t0"].check_finite()


def test_an_adapter_of_a_convolution_is_refused(tmp_path):
    tiny_dinov2().save_pretrained(tmp_path / "base")
    adapt(tiny_dinov2(), tmp_path / "lora", target_modules=["projection"])
    with pytest.raises(ValueError, match=r"projection\.weight' is not a linear layer or an embedding"):
        open_adapters(tmp_path / "base", tmp_path / "lora")


def test_an_adapter_of_another_family_is_refused(bases, plain):
    with pytest.raises(ValueError, match="expert t0: the adapter changes"):
        open_adapters(bases["llama"], plain)


# --- files -------------------------------------------------------------------------------------------------------


def test_a_pickled_adapter_is_opened_only_by_name(bases, plain):
    names = ["encoder.layer.1.attention.self.query.weight", "encoder.layer.0.attention.self.key.weight"]
    expected = {name: open_adapters(bases["bert"], plain).experts["t0"].tensor(name) for name in names}
    torch.save(load_file(plain / WEIGHTS), plain / "adapter_model.bin")
    (plain / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is a pickle: name that file"):
        open_adapters(bases["bert"], plain)
    expert = open_adapters(bases["bert"], plain / "adapter_model.bin").experts["t0"]
    assert all(torch.equal(expert.tensor(name), expected[name]) for name in names)


def test_an_adapter_without_weights_names_the_folder(bases, plain):
    (plain / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"lora: no adapter_model\.safetensors"):
        open_adapters(bases["bert"], plain)


def test_weights_of_the_whole_model_come_before_an_adapter_beside_them(bases, plain):
    perturbed(BertModel.from_pretrained(bases["bert"]), 4).save_pretrained(plain, max_shard_size="50KB")
    expert = open_adapters(bases["bert"], plain).experts["t0"]
    assert expert.adapter is None and "pooler.dense.weight" in expert.checkpoint


def test_an_adapter_on_the_hub_is_an_adapter(bases, plain, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **settings: str(plain))
    assert open_adapters(bases["bert"], Path("owner/name")).experts["t0"].adapter is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": "4"},
        {"lora_alpha": None},
        {"lora_alpha": True},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 10**30},
        {"alpha_pattern": ["query"]},
        {"alpha_pattern": {"query": []}},
        {"alpha_pattern": {"(": 1}},
        {"auto_mapping": "BertModel"},
    ],
)
def test_an_adapter_config_with_something_else_in_it_is_refused(plain, fields):
    edit(plain, **fields)
    with pytest.raises(ValueError, match=r"adapter_config\.json: .*(must be|is no pattern)"):
        Adapter(plain)


def test_a_class_that_is_no_model_is_not_looked_up(plain):
    edit(plain, auto_mapping={"base_model_class": "pipeline"})
    assert Adapter(plain).names  # it brings no head, so no class is asked for
