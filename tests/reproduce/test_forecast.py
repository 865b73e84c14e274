from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from epmq.cli import app
from epmq.reproduce.forecast import Forecast, fetches, forecast, stub_models
from epmq.reproduce.tables import Shape, Table, load_table
from tests.kit.mirror import TINY, build


def small(name: str) -> Table:
    """A table whose published shapes are tiny."""
    table = load_table(name)
    tiny = {what: Shape(**{**shape.model_dump(), "config": TINY[shape.model]}) for what, shape in table.shapes.items()}
    return table.model_copy(update={"shapes": tiny})


@pytest.fixture(scope="module")
def clip() -> Table:
    return small("clip-vit-b32-8")


@pytest.fixture(scope="module")
def found(clip) -> Forecast:
    return forecast(clip, limit=6, merges=["ties"], methods=["rtn", "expert_guided"], bits=[4, 2], progress=False)


def test_a_forecast_is_made_before_anything_is_fetched(clip, found, monkeypatch):
    assert {(one.what, one.place) for one in found.fetches} == {("base", None), ("expert", None), ("data", None)}
    names = [one.name for one in found.fetches]
    assert names[0] == clip.base and names[1:9] == [clip.expert(task) for task in clip.tasks]
    assert names[9:] == [task.data.dataset for task in clip.tasks.values()]
    assert [one.bytes is None for one in found.fetches] == [False] * 9 + [True] * 8
    assert "pytorch_model.bin without safetensors" in found.fetches[0].files
    assert set(found.plans) == {("ties", "none"), ("ties", "rtn"), ("ties", "expert_guided")}
    guided = found.plans["ties", "expert_guided"]
    assert guided.tokens == 8 * 6 * 5 and guided.layers == 2 * 6 and guided.blocks == 2  # tokens: 4 patches and a class
    assert guided.recipe.quantize.anchor_scale == 3 and guided.peak_memory_mb > 0  # heads that follow
    assert {"open", "merge", "forward", "moments", "targets", "solve", "read back"} <= guided.seconds.keys()
    assert found.scored == 48 and found.scoring > 0
    rows = {row.name: found.seconds(row) for row in found.rows}
    assert rows["base"] is None and rows["ties-rtn-4"] == rows["ties-rtn-2"] > 0


@pytest.mark.slow
def test_sizes_are_those_of_the_files(clip, tmp_path):
    build(clip, tmp_path, tiny=True, rows=1)
    told, here = list(fetches(clip, None)), list(fetches(clip, tmp_path))
    for one, other in zip(told, here):
        assert one.place is None and other.place is not None and Path(other.place).is_dir()
        if one.what == "expert":
            weights = (Path(other.place) / "model.safetensors").stat().st_size
            assert 0 < weights - one.bytes < 10_000 and other.bytes > one.bytes  # a header is all there is beside


def test_holes_open_as_the_models_they_stand_for(clip):
    with stub_models(clip) as folder:
        model = transformers.CLIPModel.from_pretrained(folder / clip.base)
        expert = folder / clip.expert("dtd")
        assert model.config.vision_config.hidden_size == 32 and (expert / "model.safetensors").is_file()
        opened = transformers.CLIPVisionModel.from_pretrained(expert)
        assert all(torch.isfinite(value).all() for value in opened.state_dict().values() if value.is_floating_point())
    assert not folder.exists()


def test_a_forecast_in_the_terminal(clip, found, monkeypatch):
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "epmq.reproduce.forecast.forecast", lambda name, **settings: given.update(settings, name=name) or found
    )
    arguments = ["reproduce", "clip-vit-b32-8", "--dry-run", "--limit", "6", "--merge", "ties", "--bits", "4"]
    printed = CliRunner().invoke(app, arguments, env={"COLUMNS": "220"})
    assert printed.exit_code == 0, printed.output
    assert given["limit"] == 6 and given["merges"] == ["ties"] and given["bits"] == [4] and given["methods"] == ()
    for text in (
        "tanganke/clip-vit-base-patch32_sun397",
        "to be fetched",
        "unknown",
        "solve",
        "peak MB",
        "48 examples",
    ):
        assert text in printed.output
