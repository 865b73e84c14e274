"""FeatCal's closed forms beside direct solves, what must not change, and which features each layer is fitted to."""

import copy
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import build_pool, padded_batches, perturbed, recipe_for, tiny_bert, tiny_dinov2
from torch import nn

from benchmarks.accuracy import merges
from benchmarks.accuracy.featcal import (
    Call,
    FeatCal,
    LinearFit,
    NormFit,
    calibrate,
    mixing_layers,
    write_calibrated,
)
from epmq import evaluate_checkpoint
from epmq.merging.compatibility import open_experts
from epmq.models.blocks import find_stacks
from epmq.models.heads import HEAD_FILE, Head, save_head
from epmq.recipe import Expert
from epmq.recipe_file import load_recipe

PLAIN = FeatCal(anchor_scale=1.0)


def rows(count, width):
    return 0.5 + torch.randn(count, width)


def least_squares(left, right):
    return torch.linalg.lstsq(left.double(), right.double()).solution


def close(one, other, within=1e-5):
    torch.testing.assert_close(one.double(), other.double(), rtol=within, atol=within)


@pytest.fixture
def tasks():
    """What two experts and the merged model read at a layer of 5 × 6, how much each row counts, and their tensors."""
    return [
        (rows(20, 6), rows(20, 6), torch.rand(20), torch.randn(5, 6), torch.randn(5), torch.randn(6), torch.randn(6))
        for _ in range(2)
    ]


def test_a_linear_layer_is_the_least_squares_solution(tasks):
    settings, anchor, start = FeatCal(features=0.3, anchor_strength=0.2), torch.randn(5, 6), torch.randn(5)
    fit = LinearFit(nn.Linear(6, 5), settings)
    lefts, rights, shifts, shares = [0.2**0.5 * torch.eye(6)], [0.2**0.5 * anchor.T], [], []
    for ours, theirs, weights, weight, bias, *_ in tasks:
        for part in (slice(8), slice(8, None)):  # in batches
            fit.gather(ours[part], theirs[part], weights[part])
        fit.end_task(weight, bias)
        targets, weights = 0.7 * ours + 0.3 * theirs, weights / weights.sum()
        share = 1 / (ours.T @ (ours * weights[:, None])).norm()
        root = (share * weights).sqrt()[:, None]
        lefts.append(root * ours)
        rights.append(root * (targets @ weight.T))
        shares.append(share * weights)
        shifts.append((ours, targets @ weight.T + bias))
    solved = fit.solve(anchor, start)
    close(solved["weight"].T, least_squares(torch.cat(lefts), torch.cat(rights)))
    # The bias alone, with that weight: a column of ones.
    residuals = [wanted - ours @ solved["weight"].T for ours, wanted in shifts]
    roots = [share.sqrt()[:, None] for share in shares] + [torch.full((1, 1), 0.2**0.5)]
    right = torch.cat([root * rest for root, rest in zip(roots, [*residuals, start[None]])])
    close(solved["bias"], least_squares(torch.cat(roots), right)[0])


def test_a_norm_is_the_least_squares_solution(tasks):
    settings, layer = FeatCal(anchor_strength=0.2), nn.LayerNorm(6)
    fit, gamma, beta = NormFit(layer, settings), torch.randn(6), torch.randn(6)
    lefts, rights = [0.2**0.5 * torch.eye(2).repeat(6, 1, 1)], [0.2**0.5 * torch.stack([gamma, beta], 1)]
    for ours, theirs, weights, _, _, gain, shift in tasks:
        fit.gather(ours, theirs, weights)
        fit.end_task(gain, shift)
        root = (weights / weights.sum()).sqrt()
        normal = nn.functional.layer_norm(ours, (6,))
        lefts.append(torch.stack([root[:, None] * normal, root[:, None].expand(-1, 6)], -1).transpose(0, 1))
        rights.append((root[:, None] * (normal * gain + shift)).T)
    solved, left, right = fit.solve(gamma, beta), torch.cat(lefts, 1), torch.cat(rights, 1)
    for feature in range(6):
        wanted = least_squares(left[feature], right[feature][:, None])[:, 0]
        close(torch.stack([solved["weight"][feature], solved["bias"][feature]]), wanted)


def opened(folder, base, tuned, pooling="mean"):
    """Base and fine-tunes of it with heads, as experts of tasks 0, 1 …"""
    base.save_pretrained(folder / "base")
    for task, model in enumerate(tuned):
        model.save_pretrained(folder / str(task))
        save_head(Head(torch.randn(3, 64), torch.zeros(3), pooling), folder / str(task) / HEAD_FILE)
    experts = [Expert(name=str(task), model=str(folder / str(task))) for task in range(len(tuned))]
    return open_experts(str(folder / "base"), experts)


def images():
    return [{"pixel_values": torch.randn(4, 3, 28, 28)} for _ in range(2)]


def model_of(kind):
    return (tiny_bert, padded_batches) if kind == "bert" else (tiny_dinov2, images)


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("kind", ["bert", "dinov2"])
def test_one_expert_that_is_the_merge_stays_as_it_is(kind, by_layer, tmp_path):
    make, batches = model_of(kind)
    base = make()
    experts = opened(tmp_path, base, [perturbed(copy.deepcopy(base), 1)], "cls")
    expert = experts.experts["0"]
    fitted = calibrate(experts, expert, {"0": batches()}, replace(PLAIN, by_layer=by_layer))
    norms_and_layers = [name for name in experts.names if ".layer." in name and "layer_scale" not in name]
    assert set(fitted) == set(norms_and_layers)
    for name, tensor in fitted.items():
        close(tensor, expert.tensor(name))


def test_a_strong_anchor_is_all_that_is_left(tmp_path):
    base = tiny_bert()
    experts = opened(tmp_path, base, [perturbed(copy.deepcopy(base), seed) for seed in (1, 2)])
    merged = experts.experts["1"]
    inputs = {"0": padded_batches(), "1": padded_batches()}
    settings = FeatCal(features=0.0, anchor_scale=2.0, anchor_strength=1e9)
    for name, tensor in calibrate(experts, merged, inputs, settings).items():
        close(tensor, anchor(experts, merged, name))


@pytest.fixture
def two(tmp_path):
    base = tiny_dinov2()
    experts = opened(tmp_path, base, [perturbed(copy.deepcopy(base), seed) for seed in (1, 2)], "cls")
    return experts, {"0": images(), "1": images()}


@pytest.mark.parametrize("by_layer", [False, True])
def test_each_layer_is_fitted_on_what_the_calibrated_ones_before_it_give(two, by_layer):
    experts, inputs = two
    settings, merged, block = FeatCal(by_layer=by_layer), experts.experts["0"], "encoder.layer.1"
    fitted = calibrate(experts, merged, inputs, settings)
    order = list(fitted)
    for layer in ("k_proj", "fc1"):
        path = next(
            name.removesuffix(".weight") for name in fitted if name.endswith(f"{layer}.weight") and block in name
        )
        # The model as it is when that layer's turn has come: with all blocks before it, and with all layers before it.
        model = experts.whole_model(merged, torch.device("cpu"))
        before = order[: order.index(f"{path}.weight")] if by_layer else [name for name in fitted if block not in name]
        for name in before:
            model.get_parameter(name).copy_(fitted[name])
        fit = LinearFit(model.get_submodule(path), settings)
        for task, batches in inputs.items():
            expert = experts.whole_model(experts.experts[task], torch.device("cpu"))
            for batch in batches:
                ours, theirs = (read_by(one, path, batch) for one in (model, expert))
                counts = torch.full(ours.shape[:2], 1.0 if layer == "k_proj" else settings.unread)
                counts[:, 0] = 1
                fit.gather(ours.flatten(0, 1), theirs.flatten(0, 1), counts.flatten())
            fit.end_task(expert.get_parameter(f"{path}.weight"), expert.get_parameter(f"{path}.bias"))
        for leaf, tensor in fit.solve(
            *(anchor(experts, merged, f"{path}.{leaf}") for leaf in ("weight", "bias"))
        ).items():
            close(tensor, fitted[f"{path}.{leaf}"])


def anchor(experts, merged, name, scale=2.0):
    start = experts.base.tensor(name)
    return start + scale * (merged.tensor(name) - start)


def test_padding_counts_nothing(tmp_path):
    base, batches = tiny_bert(), padded_batches()
    experts = opened(tmp_path, base, [perturbed(copy.deepcopy(base), 1)], "cls")
    wider = [{name: nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.items()} for batch in batches]
    fitted, again = (calibrate(experts, experts.base, {"0": given}) for given in (batches, wider))
    for name, tensor in fitted.items():
        close(tensor, again[name], 1e-4)


def read_by(model, layer, batch):
    seen = []
    with (
        model.get_submodule(layer).register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        torch.no_grad(),
    ):
        model(**batch)
    return seen[0]


@pytest.mark.parametrize("kind, ends", [("bert", {"key", "value"}), ("dinov2", {"k_proj", "v_proj"})])
def test_unread_tokens_count_in_keys_and_values_alone(kind, ends):
    make, batches = model_of(kind)
    model = make().requires_grad_(False)
    block = find_stacks(model)[0].blocks[-1]
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    mixing = mixing_layers(block, names, Call(model, block, batches()[0]))
    assert {name.rpartition(".")[2] for name in mixing} == ends


def test_norms_and_biases_may_stay(two):
    experts, inputs = two
    settings = FeatCal(norms=False, biases=False)
    fitted = calibrate(experts, experts.experts["0"], inputs, settings)
    assert len(fitted) == 2 * 6 and all(name.endswith("weight") and "norm" not in name for name in fitted)


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A suite of two tasks whose pool is there."""
    root = build_pool(tmp_path / "pool")
    for task in ("one", "two"):
        (root / "data" / task).mkdir()
        for split in ("train", "validation", "test"):
            (root / "data" / task / f"{split}.jsonl").symlink_to(root / "data" / f"{task}.jsonl")
    monkeypatch.setattr(merges, "build", lambda suite: root)
    made = ModuleType("text8")
    made.NAME, made.TASKS, made.MAX_LENGTH = "text8", {"one": None, "two": None}, 16
    yield made
    merges.calibrated.cache_clear()


def test_rows_of_a_suite(suite):
    fields = {"seed": 0, "split": "validation", "test_samples": 8, "samples": 6}
    asked = merges.rows_of(suite, ["featcal"])
    assert asked[:2] == [("experts", merges.FULL), merges.BASELINE] and len(asked) == 2 + 2 * 3
    assert merges.rows_of(SimpleNamespace(NAME="causal3", KIND="causal"), ["featcal"]) == asked[:2]
    measured = {
        method: merges.run_row(suite, merge, method, fields)
        for merge, method in asked
        if merge == "featcal on task_arithmetic"
    }
    assert merges.calibrated.cache_info().misses == 1
    full, plain, following = (measured[name] for name in (merges.FULL, merges.PLAIN, merges.FOLLOWING))
    assert full["bits"] is None and plain["bits"] == following["bits"] == 4
    assert plain["bytes"] < full["bytes"] and plain["seconds"] > full["seconds"]


def test_what_is_written_is_a_checkpoint_with_heads(tmp_path):
    pool = build_pool(tmp_path / "pool")
    recipe = load_recipe(recipe_for(pool, samples=6, quantize={"method": "none"}))
    folder = tmp_path / "out"
    folder.mkdir()
    cost = write_calibrated(recipe, folder)
    assert cost["seconds"] > 0 and {file.stem for file in (folder / "heads").iterdir()} == {"one", "two"}
    assert evaluate_checkpoint(folder, recipe, progress=False)["scores"].keys() == {"one", "two"}
