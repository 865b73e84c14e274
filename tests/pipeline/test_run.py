import copy
import gc
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import perturbed, recipe_for, tiny_bert, tiny_dinov2
from greenlet import greenlet
from safetensors.torch import load_file, save_file
from transformers import BertModel

import epmq
from epmq.data.encoding import encode, load_processor
from epmq.data.readers import read_examples
from epmq.merging.methods import METHODS
from epmq.models.heads import HEAD_FILE, Head, save_head
from epmq.pipeline import run as pipeline
from epmq.pipeline.run import evaluate_checkpoint, evaluate_experts, merge, run
from epmq.quantization.grid import Grid
from epmq.quantization.rtn import rtn
from epmq.reporting.report import TIMED

QUIET = {"progress": False, "evaluate": False}


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def plain(pool: Path, output: Path, **fields: Any) -> dict[str, torch.Tensor]:
    """The dequantized weights of a run over the pool."""
    recipe = {"format": "dequantized", **fields}
    run(recipe_for(pool, output=str(output), **recipe), **QUIET)
    return weights(output)


def is_quantized(name: str) -> bool:
    ends = ("query.weight", "key.weight", "value.weight", "dense.weight")
    return name.startswith("encoder.layer.") and name.endswith(ends)


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mine(pool: Path, tmp_path: Path) -> Path:
    """A copy of the pool that a test may spoil."""
    shutil.copytree(pool, tmp_path / "pool")
    return tmp_path / "pool"


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(folder: Path, **changes: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Replace tensors by a function of them, or drop them; `__` stands for a dot."""
    tensors = weights(folder)
    for key, change in changes.items():
        name = key.replace("__", ".")
        old = tensors.pop(name, torch.zeros(1))
        if change is not None:
            tensors[name] = change(old)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[5] = float("nan")
    return tensor


def missing_base(pool: Path, recipe: dict) -> None:
    shutil.rmtree(pool / "base")


def missing_expert(pool: Path, recipe: dict) -> None:
    shutil.rmtree(pool / "experts" / "two")


def expert_without_config(pool: Path, recipe: dict) -> None:
    (pool / "experts" / "two" / "config.json").unlink()


def expert_truncated(pool: Path, recipe: dict) -> None:
    path = pool / "experts" / "two" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def expert_of_another_width(pool: Path, recipe: dict) -> None:
    tiny_bert(hidden_act="relu").save_pretrained(pool / "experts" / "two")
    edit_weights(pool / "experts" / "two", encoder__layer__1__output__dense__weight=lambda x: x[:, :64].contiguous())


def expert_with_fewer_layers(pool: Path, recipe: dict) -> None:
    tensors = {name: value for name, value in weights(pool / "experts" / "two").items() if ".layer.1." not in name}
    save_file(tensors, pool / "experts" / "two" / "model.safetensors", metadata={"format": "pt"})


def expert_with_more_layers(pool: Path, recipe: dict) -> None:
    tensors = weights(pool / "experts" / "two")
    extra = {name.replace(".1.", ".2."): value.clone() for name, value in tensors.items() if ".layer.1." in name}
    save_file({**tensors, **extra}, pool / "experts" / "two" / "model.safetensors", metadata={"format": "pt"})


def expert_of_another_architecture(pool: Path, recipe: dict) -> None:
    tiny_dinov2().save_pretrained(pool / "experts" / "two")


def expert_that_shares_nothing(pool: Path, recipe: dict) -> None:
    save_file({"x": torch.ones(1)}, pool / "experts" / "two" / "model.safetensors", metadata={"format": "pt"})


def nan_in_an_expert(pool: Path, recipe: dict) -> None:
    edit_weights(pool / "experts" / "two", encoder__layer__0__output__dense__bias=with_nan)


def nan_in_the_base(pool: Path, recipe: dict) -> None:
    edit_weights(pool / "base", embeddings__LayerNorm__weight=with_nan)


def base_without_a_layer(pool: Path, recipe: dict) -> None:
    edit_weights(pool / "base", encoder__layer__0__output__dense__weight=None)


def base_that_its_config_does_not_fit(pool: Path, recipe: dict) -> None:
    edit_json(pool / "base" / "config.json", intermediate_size=96)


def base_of_an_unknown_type(pool: Path, recipe: dict) -> None:
    edit_json(pool / "base" / "config.json", model_type="mystery")


def base_with_remote_code(pool: Path, recipe: dict) -> None:
    remote = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    edit_json(pool / "base" / "config.json", model_type="mystery", auto_map=remote)
    (pool / "base" / "evil.py").write_text(f"open({str(pool / 'sprung')!r}, 'w')")


def base_without_a_tokenizer(pool: Path, recipe: dict) -> None:
    for path in [*pool.glob("base/*token*"), *pool.glob("base/vocab*")]:
        path.unlink()


def group_size_that_does_not_fit(pool: Path, recipe: dict) -> None:
    recipe["quantize"] = {"group_size": 128}


def empty_calibration(pool: Path, recipe: dict) -> None:
    (pool / "data" / "one.jsonl").write_text("")


def missing_calibration(pool: Path, recipe: dict) -> None:
    recipe["experts"][0]["calibration"]["path"] = str(pool / "data" / "none.jsonl")


def no_calibration(pool: Path, recipe: dict) -> None:
    del recipe["experts"][1]["calibration"]


def bad_calibration(pool: Path, recipe: dict) -> None:
    (pool / "data" / "two.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')


def undecodable_calibration(pool: Path, recipe: dict) -> None:
    (pool / "data" / "two.jsonl").write_bytes(b'{"text": "na\xefve"}\n')


def evaluation_without_labels(pool: Path, recipe: dict) -> None:
    path = pool / "data" / "unlabelled.jsonl"
    path.write_text('{"text": "a"}\n')
    recipe["experts"][1]["evaluation"] = {"path": str(path)}


def evaluation_with_a_label_too_many(pool: Path, recipe: dict) -> None:
    with (pool / "data" / "two.jsonl").open("a") as file:
        file.write('{"text": "a", "label": 3}\n')


def no_head(pool: Path, recipe: dict) -> None:
    (pool / "experts" / "one" / HEAD_FILE).unlink()


def named_head_missing(pool: Path, recipe: dict) -> None:
    recipe["experts"][0]["head"] = str(pool / "none.safetensors")


def head_that_is_broken(pool: Path, recipe: dict) -> None:
    (pool / "experts" / "one" / HEAD_FILE).write_bytes(b"broken")


def head_of_another_width(pool: Path, recipe: dict) -> None:
    save_head(Head(torch.randn(3, 48), torch.randn(3), "mean"), pool / "experts" / "one" / HEAD_FILE)


def output_that_exists(pool: Path, recipe: dict) -> None:
    Path(recipe["output"]).mkdir()


def no_output(pool: Path, recipe: dict) -> None:
    del recipe["output"]


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (missing_base, FileNotFoundError, r"pool/base: no such directory"),
        (missing_expert, FileNotFoundError, r"experts/two: no such directory"),
        (expert_without_config, FileNotFoundError, r"experts/two/config\.json: missing"),
        (expert_truncated, ValueError, r"experts/two/model\.safetensors: not a readable safetensors file"),
        (
            expert_of_another_width,
            ValueError,
            r"expert two: tensor 'encoder\.layer\.1\.output\.dense\.weight' is \[64, 64\], but \[64, 128\] in the base",
        ),
        (expert_with_fewer_layers, ValueError, r"expert two: tensor 'encoder\.layer\.1\..*' is missing in .*two"),
        (expert_with_more_layers, ValueError, r"expert two: tensor 'encoder\.layer\.2\..*two"),
        (expert_of_another_architecture, ValueError, r"expert two: model type 'dinov2', but the base is 'bert'"),
        (expert_that_shares_nothing, ValueError, r"expert two: shares no tensor with the base"),
        (
            nan_in_an_expert,
            ValueError,
            r"two/model\.safetensors: tensor 'encoder\.layer\.0\.output\.dense\.bias' has 1 NaN or Inf",
        ),
        (nan_in_the_base, ValueError, r"base/model\.safetensors: tensor 'embeddings\.LayerNorm\.weight' has 1 NaN"),
        (base_without_a_layer, ValueError, r"base: no tensor for 'encoder\.layer\.0\.output\.dense\.weight'"),
        (base_that_its_config_does_not_fit, ValueError, r"base.*'encoder\.layer\.0\.intermediate\.dense\.weight'.*96"),
        (base_of_an_unknown_type, ValueError, r"base/config\.json: transformers cannot open this model"),
        (base_with_remote_code, ValueError, r"base/config\.json: transformers cannot open this model"),
        (
            base_without_a_tokenizer,
            ValueError,
            r"experts\.one\.calibration: text examples need the base model's tokenizer",
        ),
        (
            group_size_that_does_not_fit,
            ValueError,
            r"quantize\.group_size: encoder\.layer\.0\.attention\.self\.query: group size 128 does not divide 64",
        ),
        (empty_calibration, ValueError, r"experts\.one\.calibration: .*one\.jsonl: holds no examples"),
        (missing_calibration, FileNotFoundError, r"experts\.one\.calibration: .*none\.jsonl: no such data file"),
        (no_calibration, ValueError, r"experts\.two\.calibration: expert_guided needs calibration data"),
        (bad_calibration, ValueError, r"experts\.two\.calibration: .*two\.jsonl, line 2: no text field"),
        (undecodable_calibration, ValueError, r"experts\.two\.calibration: .*two\.jsonl, line 1: not UTF-8"),
        (evaluation_without_labels, ValueError, r"experts\.two\.evaluation: .*unlabelled\.jsonl has no labels"),
        (evaluation_with_a_label_too_many, ValueError, r"two.*label 3"),
        (no_head, ValueError, r"experts\.one: evaluation needs a head, and neither head\.safetensors nor a task head"),
        (named_head_missing, FileNotFoundError, r"none\.safetensors"),
        (head_that_is_broken, ValueError, r"head\.safetensors: not a readable safetensors file"),
        (head_of_another_width, ValueError, r"experts.one.*48"),
        (output_that_exists, FileExistsError, r"out exists already"),
        (no_output, ValueError, r"field 'output' is missing"),
    ],
)
def test_bad_input_is_named_before_anything_is_computed(mine, tmp_path, monkeypatch, spoil, error, message):
    recipe = recipe_for(mine, output=str(tmp_path / "out"))
    spoil(mine, recipe)
    monkeypatch.setattr(pipeline, "write_model", lambda *args: pytest.fail("the computation began"))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(error, match=message):
        run(recipe, progress=False)
    assert sorted(os.listdir(tmp_path)) == before and not (mine / "sprung").exists()


@pytest.mark.parametrize("phase", ["write_model", "evaluate_model", "write_json"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_half_way_leaves_no_output(pool, tmp_path, monkeypatch, phase, error):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, phase, fail)
    with pytest.raises(error):
        run(recipe_for(pool, output=str(tmp_path / "out")), progress=False)
    assert os.listdir(tmp_path) == ([] if phase == "write_model" else [".out.work"])


# --- results -----------------------------------------------------------------------------------------------------


def test_the_report_says_what_was_done(pool, tmp_path):
    recipe = recipe_for(pool, output=str(tmp_path / "out"), merge={"scaling": 0.4})
    report = run(recipe, progress=False)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    asked = epmq.load_recipe(recipe)
    assert epmq.load_recipe(report["recipe"]) == asked.model_copy(update={"quantize": asked.quantize.resolved(True)})
    assert report["output"] == recipe["output"]
    assert report["versions"]["torch"] == version("torch")
    assert {"python", "epmq", "transformers", "compressed-tensors"} <= report["versions"].keys()
    assert set(report["seconds"]) == set(report["cpu_seconds"]) == {"open", "merge and quantize", "evaluate"}
    assert all(seconds >= 0 for seconds in report["seconds"].values()) and report["peak_memory_mb"] > 0
    assert report["bytes"] == sum(tensor.nbytes for tensor in weights(tmp_path / "out").values())
    assert report["notes"] == []

    state = BertModel.from_pretrained(pool / "base").state_dict()
    shapes = {name.removesuffix(".weight"): list(state[name].shape) for name in state if is_quantized(name)}
    assert {layer["name"]: layer["shape"] for layer in report["layers"]} == shapes
    for layer in report["layers"]:
        assert layer["loss"] >= 0 and layer["merge_loss"] >= 0 and layer["seconds"] >= 0
        assert layer["strength"] == report["recipe"]["quantize"]["anchor_strength"]
        assert layer["damping"] == report["recipe"]["quantize"]["damping"] == 0.03
    assert report["loss"] == pytest.approx(sum(layer["loss"] for layer in report["layers"]))

    assert report["scores"].keys() == {"one", "two"}
    assert report["mean_score"] == pytest.approx(sum(report["scores"].values()) / 2)
    assert evaluate_checkpoint(tmp_path / "out", recipe, progress=False)["scores"] == report["scores"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "task_arithmetic" in card and "4 bits" in card and f"{100 * report['scores']['one']:.1f} %" in card


def test_every_real_token_is_counted_and_no_padding(pool, tmp_path):
    """The number of tokens is that of the drawn examples, whatever the batch size."""
    expected, tokenizer = 0, load_processor(pool / "base")
    for task in ("one", "two"):
        examples = read_examples(pool / "data" / f"{task}.jsonl").draw(10, 3)
        expected += sum(int(batch["attention_mask"].sum()) for batch in encode(examples, tokenizer, 1, 16))
    losses = []
    for size in (1, 4, 10):
        fields = {"samples": 10, "seed": 3, "batch_size": size, "output": str(tmp_path / str(size))}
        report = run(recipe_for(pool, **fields), **QUIET)
        assert {layer["tokens"] for layer in report["layers"]} == {expected}
        losses.append([layer["merge_loss"] for layer in report["layers"][:3]])
    # The first input group sees no quantized layer: padding and batch size must not show in it.
    torch.testing.assert_close(torch.tensor(losses[1:]), torch.tensor(losses[:1] * 2), rtol=1e-4, atol=1e-9)


def test_a_run_can_be_repeated_bit_for_bit(pool, tmp_path):
    for name in ("first", "second"):
        torch.manual_seed(len(name))
        recipe = recipe_for(pool, merge={"method": "dare"}, samples=8, output=str(tmp_path / name))
        run(recipe, **QUIET)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert Path("model.safetensors") in files
    for file in files:
        if file.name not in TIMED:
            assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_the_seed_decides_the_draw(pool, tmp_path):
    first, second = (plain(pool, tmp_path / str(seed), samples=4, seed=seed, quantize={"bits": 8}) for seed in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first if is_quantized(name))
    assert all(torch.equal(first[name], second[name]) for name in first if not is_quantized(name))


@pytest.mark.parametrize("method", ["expert_guided", "rtn", "none"])
def test_the_global_generator_is_left_alone(pool, tmp_path, method):
    recipe = recipe_for(pool, output=str(tmp_path / "out"), quantize={"method": method}, merge={"method": "dare"})
    state = torch.get_rng_state()
    run(recipe, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


MERGES: list[dict[str, Any]] = [
    {"method": "average"},
    {"method": "average", "weights": [1, 3]},
    {"method": "task_arithmetic", "scaling": 0.4},
    {"method": "task_arithmetic", "scaling": [0.2, 0.7]},
    {"method": "ties", "density": 0.3},
    {"method": "ties", "density": 0.3, "trim": "tensor", "scaling": 0.5},
    {"method": "dare", "density": 0.4},
    {"method": "dare", "combine": "ties"},
]


def merged_by_hand(base: dict, experts: list[dict], settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What `merge` should write, from whole state dicts."""
    tau = [{name: expert[name] - base[name] for name in base} for expert in experts]
    method = settings["method"]
    if method == "average":
        share = torch.tensor(settings.get("weights", [1, 1])).float()
        share /= share.sum()
        return {name: sum(s * expert[name] for s, expert in zip(share, experts)) for name in base}
    if method == "task_arithmetic":
        scaling = settings["scaling"]
        scaling = scaling if isinstance(scaling, list) else [scaling] * 2
        return {name: base[name] + sum(s * t[name] for s, t in zip(scaling, tau)) for name in base}
    if method == "dare":
        extra = {key: value for key, value in settings.items() if key != "method"}
        return {name: METHODS["dare"](base[name], [e[name] for e in experts], name=name, **extra) for name in base}
    merged = {}
    whole = [torch.cat([vector.flatten() for vector in t.values()]).abs().sort(descending=True).values for t in tau]
    for name in base:
        kept = []
        for t, ranked in zip(tau, whole):
            if settings.get("trim") == "tensor":
                ranked = t[name].flatten().abs().sort(descending=True).values
            keep = int(settings["density"] * len(ranked))
            kept.append(torch.where(t[name].abs() >= ranked[keep - 1], t[name], 0.0))
        sign = torch.where(kept[0] + kept[1] >= 0, 1.0, -1.0)
        agree = [(vector.sign() == sign).float() for vector in kept]
        total = sum(vector * same for vector, same in zip(kept, agree))
        merged[name] = base[name] + settings.get("scaling", 1.0) * total / (agree[0] + agree[1]).clamp(min=1)
    return merged


@pytest.mark.parametrize("settings", MERGES, ids=str)
def test_merging_a_checkpoint_is_merging_its_tensors(pool, tmp_path, settings):
    recipe = recipe_for(pool, output=str(tmp_path / "out"), merge=settings)
    report = merge(recipe, progress=False)
    found = weights(tmp_path / "out")
    experts = [weights(expert["model"]) for expert in recipe["experts"]]
    expected = merged_by_hand(weights(recipe["base"]), experts, settings)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    assert report["layers"] == [] and report["loss"] == 0 and "scores" not in report
    assert report["recipe"]["quantize"]["method"] == "none"
    BertModel.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("settings", MERGES[::2], ids=str)
@pytest.mark.parametrize("change", [with_nan, lambda tensor: tensor.fill_(float("nan"))], ids=["one", "all"])
def test_a_mere_merge_names_what_is_not_finite(mine, tmp_path, settings, change):
    """It looks while it merges."""
    edit_weights(mine / "experts" / "two", encoder__layer__1__output__dense__weight=change)
    with pytest.raises(ValueError, match=r"two/model\.safetensors: tensor 'encoder\.layer\.1\..* NaN or Inf"):
        merge(recipe_for(mine, output=str(tmp_path / "out"), merge=settings), progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["pool"]


def test_merging_needs_no_calibration_data(pool, tmp_path):
    recipe = recipe_for(pool, output=str(tmp_path / "out"))
    for expert in recipe["experts"]:
        del expert["calibration"], expert["evaluation"]
    merge(recipe, progress=False)
    assert epmq.load(tmp_path / "out").tasks == ["one", "two"]


def test_the_order_of_experts_does_not_matter(pool, tmp_path):
    recipe = recipe_for(
        pool, output=str(tmp_path / "there"), merge={"method": "task_arithmetic", "scaling": [0.2, 0.6]}
    )
    merge(recipe, progress=False)
    back = {"experts": recipe["experts"][::-1], "merge": {"scaling": [0.6, 0.2]}, "output": str(tmp_path / "back")}
    merge({**recipe, **back}, progress=False)
    there, back = weights(tmp_path / "there"), weights(tmp_path / "back")
    for name, tensor in there.items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scales", ["minmax", "search"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_rounding_of_the_merge(pool, tmp_path, symmetric, scales):
    merge(recipe_for(pool, output=str(tmp_path / "merged")), progress=False)
    settings, grid = {"bits": 3, "group_size": 32, "symmetric": symmetric}, Grid(3, 32, symmetric)
    settings |= {"method": "rtn", "scales": scales}
    found, merged = plain(pool, tmp_path / "out", quantize=settings), weights(tmp_path / "merged")
    for name, tensor in merged.items():
        if is_quantized(name):
            tensor = rtn(tensor, grid, search=scales == "search").dequantize()
        assert torch.equal(found[name], tensor), name


def test_rounding_needs_no_calibration_data(pool, tmp_path):
    recipe = recipe_for(pool, output=str(tmp_path / "out"), quantize={"method": "rtn"})
    for expert in recipe["experts"]:
        del expert["calibration"]
    report = run(recipe, progress=False)
    assert {layer["loss"] for layer in report["layers"]} == {None} and report["scores"]


@pytest.mark.parametrize("copies", [1, 2])
def test_experts_that_are_copies_of_one_model_give_gptq(pool, tmp_path, copies):
    """With nothing to correct, the guided target is the merged one: GPTQ is the special case W_k = W_m."""
    recipe = recipe_for(pool, merge={"method": "average"}, format="dequantized")
    for expert in recipe["experts"]:
        expert["model"] = recipe["experts"][0]["model"]
    recipe["experts"] = recipe["experts"][:copies]
    found = {}
    methods = {
        "gptq": {"damping": 0.02},
        "e_pmq": {"anchor_strength": 0.02},
        "expert_guided": {"anchor_strength": 0.5, "anchor_scale": 1.0, "damping": 0.02},
    }
    for method, more in methods.items():
        settings = {"method": method, "bits": 3, "group_size": 32, **more}
        report = run({**recipe, "quantize": settings, "output": str(tmp_path / method)}, **QUIET)
        found[method] = weights(tmp_path / method)
        assert all(layer["merge_loss"] < 1e-12 for layer in report["layers"])
    for guided in ("e_pmq", "expert_guided"):
        assert all(torch.equal(found["gptq"][name], tensor) for name, tensor in found[guided].items())
    rounded = {
        name: rtn(tensor, Grid(3, 32)).dequantize()
        for name, tensor in weights(pool / "experts/one").items()
        if is_quantized(name)
    }
    assert any(not torch.equal(found["gptq"][name], tensor) for name, tensor in rounded.items())


def test_a_task_of_no_weight_has_no_say(pool, tmp_path):
    """Task two is replaced by other data and another expert; with weight 0 nothing in the target may change."""
    recipe = recipe_for(pool, merge={"method": "task_arithmetic", "scaling": [0.5, 0.0]}, format="dequantized")
    other = copy.deepcopy(recipe)
    perturbed(BertModel.from_pretrained(pool / "base"), 9).save_pretrained(tmp_path / "other")
    other["experts"][1]["model"] = str(tmp_path / "other")
    results = []
    for i, candidate in enumerate((recipe, other)):
        quantize = {"task_weights": {"one": 1.0, "two": 0.0}, "adapt_heads": False}  # the other has no head
        settings = {"quantize": quantize, "output": str(tmp_path / str(i))}
        run({**candidate, **settings}, **QUIET)
        results.append(weights(tmp_path / str(i)))
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())


def test_a_strong_anchor_is_rounding_of_the_merge(pool, tmp_path):
    paper = {"method": "e_pmq", "anchor_strength": 1e6, "scales": "minmax"}  # its anchor is in the Hessian too
    strong = plain(pool, tmp_path / "strong", quantize=paper)
    nearest = plain(pool, tmp_path / "nearest", quantize={"method": "rtn", "scales": "minmax"})
    names = [name for name in nearest if is_quantized(name)]
    off = torch.cat([((strong[name] - nearest[name]).abs() / nearest[name].abs().amax()).flatten() for name in names])
    # The scales differ by what is left of the correction; a code differs where a weight lies between two levels.
    assert (off < 1e-4).float().mean() > 0.99


def test_experts_are_measured_on_their_own_tasks(pool, tmp_path):
    recipe = recipe_for(pool)
    scores, base = (evaluate_experts(recipe, base=base, progress=False)["scores"] for base in (False, True))
    for task in ("one", "two"):
        # An expert alone, merged with itself, is itself.
        alone = {
            **recipe,
            "experts": [e for e in recipe["experts"] if e["name"] == task],
            "merge": {"method": "average"},
        }
        report = merge({**alone, "output": str(tmp_path / task)}, progress=False, evaluate=True)
        assert report["scores"] == {task: scores[task]}
        report = run(
            {**alone, "merge": {"scaling": 0.0}, "quantize": {"method": "none"}, "output": str(tmp_path / f"{task}0")},
            progress=False,
        )
        assert report["scores"] == {task: base[task]}


def test_nothing_to_evaluate_on(pool):
    recipe = recipe_for(pool)
    for expert in recipe["experts"]:
        del expert["evaluation"]
    for measure in (lambda: evaluate_experts(recipe), lambda: evaluate_checkpoint(pool / "base", recipe)):
        with pytest.raises(ValueError, match="no expert has evaluation data"):
            measure()


def test_the_output_stands_on_its_own(pool, tmp_path):
    """Everything that answering needs is in the directory, and no path leads out of it."""
    run(recipe_for(pool, output=str(tmp_path / "out")), **QUIET)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    names = sorted(str(path.relative_to(tmp_path / "moved")) for path in (tmp_path / "moved").rglob("*"))
    assert {"config.json", "model.safetensors", "report.json", "README.md", "heads/one.safetensors"} <= set(names)
    assert not any(path.is_symlink() for path in (tmp_path / "moved").rglob("*"))
    assert epmq.load(tmp_path / "moved").answer("two", ["the cat"])[0] in "xyz"


def test_what_cannot_be_scored_is_refused_before_any_compute(pool, tmp_path):
    recipe = recipe_for(pool, output=str(tmp_path / "out"))
    chat = [{"messages": [{"role": "user", "content": "the cat"}]}]
    with pytest.raises(ValueError, match=r"experts\.one\.evaluation: "):
        run(recipe, evaluation={"one": chat}, progress=False)
    recipe["experts"][0]["evaluation"] = recipe["experts"][1]["evaluation"] = None
    with pytest.raises(ValueError, match="data for 'three', but the recipe has no expert of that name"):
        run(recipe, calibration={"three": chat}, progress=False)
    assert not (tmp_path / "out").exists()


def test_nothing_waits_when_a_run_has_ended(pool, tmp_path, monkeypatch):
    """A greenlet that waits is never collected, and with it a model and its activations."""

    def waiting() -> int:
        gc.collect()
        return sum(type(thing) is greenlet and bool(thing) for thing in gc.get_objects())

    before = waiting()
    run(recipe_for(pool, output=str(tmp_path / "one")), progress=False, evaluate=False)
    assert waiting() == before
    with monkeypatch.context() as patch:
        patch.setattr("epmq.calibration.engine.rtn_fallback", None)  # the first layer that is solved fails
        with pytest.raises(TypeError):
            run(recipe_for(pool, output=str(tmp_path / "two")), progress=False, evaluate=False)
    assert waiting() == before
