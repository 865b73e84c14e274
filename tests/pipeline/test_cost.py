import pytest
import yaml
from conftest import recipe_for
from families import FAMILIES
from test_cli import call  # noqa: F401

import epmq
from epmq.pipeline.cost import dry_run
from tests.kit.architectures import ARCHITECTURES
from tests.kit.identity import save_pair

METHODS = {
    "none": {"method": "none"},
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq", "group_size": 32, "symmetric": False, "bits": 3},
    "gptq, heads follow": {"method": "gptq", "adapt_heads": True},
    "e_pmq": {"method": "e_pmq", "scales": "minmax"},
    "expert_guided": {"method": "expert_guided"},
    "features": {"method": "expert_guided", "adapt_heads": False, "expert_features": 0.5},
}


@pytest.mark.parametrize("form", ["pack-quantized", "dequantized"])
@pytest.mark.parametrize("name", METHODS)
def test_a_plan_tells_the_size_and_writes_nothing(pool, tmp_path, name, form):
    recipe = recipe_for(pool, output=str(tmp_path / "out"), samples=16, quantize=METHODS[name], format=form)
    plan = dry_run(recipe, progress=False)
    assert list(tmp_path.iterdir()) == []
    report = epmq.run(recipe, progress=False, evaluate=False)
    assert (plan.output_bytes, plan.parameters) == (report["bytes"], report["parameters"])
    assert plan.layers == len(report["layers"])
    assert plan.recipe.model_dump(mode="json") == report["recipe"]
    assert all(seconds > 0 for seconds in plan.seconds.values()) and {"open", "merge"} <= plan.seconds.keys()
    # What the process holds beside these tiny models is most of both.
    assert plan.peak_memory_mb == pytest.approx(report["peak_memory_mb"], rel=0.25)
    if tokens := max((layer["tokens"] for layer in report["layers"]), default=0):
        # Batches are padded alike but not equally; the first stands for all.
        assert plan.tokens == pytest.approx(tokens, rel=0.25)
    else:
        assert plan.tokens == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_planned(tmp_path, name):
    family = FAMILIES[name]
    model = family.build()
    for folder in ("base", "expert"):
        model.save_pretrained(tmp_path / folder)
    recipe = {
        "base": str(tmp_path / "base"),
        "experts": [{"name": "one", "model": str(tmp_path / "expert")}],
        "format": "dequantized",
    }
    plan = dry_run(recipe, calibration={"one": family.batches()}, progress=False)
    assert plan.blocks == sum(family.stacks.values())
    assert {"open", "merge", "collect", "solve", "write", "read back"} == plan.seconds.keys()
    assert plan.tokens > 0 and plan.output_bytes > 0


@pytest.mark.parametrize(("name", "method"), [("resnet", "none"), ("llava", "expert_guided"), ("qwen2vl", "gptq")])
def test_models_without_blocks_and_with_towers_can_be_planned(tmp_path, name, method):
    architecture = ARCHITECTURES[name]
    save_pair(architecture, tmp_path)
    experts = [{"name": "one", "model": str(tmp_path / "expert")}]
    recipe = {"base": str(tmp_path / "base"), "experts": experts, "quantize": {"method": method}}
    plan = dry_run(recipe, calibration=None if method == "none" else {"one": architecture.batches()}, progress=False)
    assert plan.seconds["merge"] > 0 and plan.blocks == (0 if name == "resnet" else 4)


def test_a_dry_run_checks_what_a_run_checks(pool):
    with pytest.raises(ValueError, match=r"group size 64 does not divide|quantize"):
        dry_run(recipe_for(pool, quantize={"method": "gptq", "group_size": 128}), progress=False)
    with pytest.raises(FileNotFoundError):
        dry_run({**recipe_for(pool), "base": "nowhere/at-all/x"}, progress=False)


def test_the_command_line_prints_a_plan(call, pool, tmp_path):  # noqa: F811
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_for(pool, output=str(tmp_path / "out"))))
    status, out, _ = call("run", file, "--dry-run", "--quiet")
    assert status == 0 and not (tmp_path / "out").exists()
    for said in (
        "task_arithmetic, 2 experts",
        "2 blocks, 14 layers and tables",
        "peak memory",
        "MB while it is written",
    ):
        assert said in out
    for said in ("4 bits, a row", "8 bits, a row", "float16", "bits a weight"):
        assert said in out
