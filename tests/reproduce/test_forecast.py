import pytest
import torch
import transformers
from typer.testing import CliRunner

from epmq.cli import app
from epmq.reproduce.forecast import Forecast, downloads, forecast, stub_models
from epmq.reproduce.tables import RunOptions, Shape, Table, load_table
from tests.kit.mirror import TINY, build


def small(name: str) -> Table:
    """A table whose published shapes are tiny."""
    table = load_table(name)
    tiny = {role: Shape(**{**shape.model_dump(), "config": TINY[shape.model]}) for role, shape in table.shapes.items()}
    return table.model_copy(update={"shapes": tiny})


@pytest.fixture(scope="module")
def clip() -> Table:
    return small("clip-vit-b32-8")


@pytest.fixture(scope="module")
def predicted(clip) -> Forecast:
    return forecast(clip, RunOptions(["ties"], ["rtn", "expert_guided"], [4, 2], limit=6), progress=False)


def test_a_forecast_is_made_before_anything_is_fetched(clip, predicted, monkeypatch):
    assert {(one.role, one.path) for one in predicted.downloads} == {("base", None), ("expert", None), ("data", None)}
    names = [one.hub_id for one in predicted.downloads]
    assert names[0] == clip.base and names[1:9] == [clip.expert(task) for task in clip.tasks]
    assert names[9:] == [task.data.dataset for task in clip.tasks.values()]
    assert [one.bytes is None for one in predicted.downloads] == [False] * 9 + [True] * 8
    assert "pytorch_model.bin without safetensors" in predicted.downloads[0].files
    assert set(predicted.plans) == {("ties", "none"), ("ties", "rtn"), ("ties", "expert_guided")}
    guided = predicted.plans["ties", "expert_guided"]
    assert guided.tokens == 8 * 6 and guided.layers == 2 * 6 and guided.blocks == 2  # of images there are no tokens
    assert guided.recipe.quantize.anchor_scale == 3 and guided.peak_memory_mb > 0  # heads that follow
    assert {"open", "merge", "collect", "solve", "write", "read back"} <= guided.seconds.keys()
    assert predicted.scored == 48 and predicted.scoring > 0
    rows = {row.name: predicted.seconds(row) for row in predicted.rows}
    assert rows["base"] is None and rows["ties-rtn-4"] == rows["ties-rtn-2"] > 0


@pytest.mark.slow
def test_sizes_are_those_of_the_files(clip, tmp_path):
    build(clip, tmp_path, tiny=True, rows=1)
    remote, here = list(downloads(clip, None)), list(downloads(clip, tmp_path))
    for one, other in zip(remote, here):
        assert one.path is None and other.path is not None and other.path.is_dir()
        if one.role == "expert":
            weights = (other.path / "model.safetensors").stat().st_size
            assert 0 < weights - one.bytes < 10_000 and other.bytes > one.bytes  # a header is all there is beside


def test_holes_open_as_the_models_they_stand_for(clip):
    with stub_models(clip) as folder:
        model = transformers.CLIPModel.from_pretrained(folder / clip.base)
        expert = folder / clip.expert("dtd")
        assert model.config.vision_config.hidden_size == 32 and (expert / "model.safetensors").is_file()
        opened = transformers.CLIPVisionModel.from_pretrained(expert)
        assert all(torch.isfinite(value).all() for value in opened.state_dict().values() if value.is_floating_point())
    assert not folder.exists()


def test_a_forecast_in_the_terminal(clip, predicted, monkeypatch):
    asked: list[RunOptions] = []
    monkeypatch.setattr(
        "epmq.reproduce.forecast.forecast", lambda name, options, **settings: asked.append(options) or predicted
    )
    arguments = ["reproduce", "clip-vit-b32-8", "--dry-run", "--limit", "6", "--merge", "ties", "--bits", "4"]
    printed = CliRunner().invoke(app, arguments, env={"COLUMNS": "220"})
    assert printed.exit_code == 0, printed.output
    assert asked == [RunOptions(merges=["ties"], bits=[4], limit=6)]
    for text in (
        "tanganke/clip-vit-base-patch32_sun397",
        "to be fetched",
        "unknown",
        "solve",
        "peak MB",
        "48 examples",
    ):
        assert text in printed.output
