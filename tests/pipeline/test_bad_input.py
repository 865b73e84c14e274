"""What a user may get wrong is named before anything is computed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_weights, weights, with_nan
from conftest import recipe_for, tiny_bert, tiny_dinov2
from safetensors.torch import save_file

from epmq.models.heads import HEAD_FILE, Head, save_head
from epmq.pipeline import run as pipeline
from epmq.pipeline.run import run


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


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
def test_bad_input_is_named_before_anything_is_computed(own_pool, tmp_path, monkeypatch, spoil, error, message):
    recipe = recipe_for(own_pool, output=str(tmp_path / "out"))
    spoil(own_pool, recipe)
    for step in ("write_merged", "write_quantized"):
        monkeypatch.setattr(pipeline, step, lambda *args: pytest.fail("the computation began"))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(error, match=message):
        run(recipe, progress=False)
    assert sorted(os.listdir(tmp_path)) == before and not (own_pool / "sprung").exists()


@pytest.mark.parametrize("step", ["write_quantized", "evaluate_model", "write_json"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_half_way_leaves_no_output(pool, tmp_path, monkeypatch, step, error):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, step, fail)
    with pytest.raises(error):
        run(recipe_for(pool, output=str(tmp_path / "out")), progress=False)
    assert os.listdir(tmp_path) == ([] if step == "write_quantized" else [".out.work"])
