from pathlib import Path
from typing import Any

import pytest
import yaml

from epmq.reproduce import tables
from epmq.reproduce.tables import DATASETS, Row, RunOptions, base_source, load_table, locate, row_recipe, table_names

TASK = {"data": {"dataset": "owner/pets"}, "classes": ["cat", "dog"], "templates": ["a {}"]}
TABLE: dict[str, Any] = {
    "title": "two tasks",
    "base": "owner/base",
    "experts": "owner/expert_{task}",
    "tasks": {"one": TASK, "two": TASK},
    "merges": {"ta": {"scaling": 0.3}},
    "methods": {"gptq": {"method": "gptq"}, "ours": {"method": "expert_guided"}},
    "bits": [4, 2],
    "shapes": {"base": {"model": "CLIPModel", "config": {}}},
}


def written(path: Path, **fields: Any) -> Path:
    path.write_text(yaml.safe_dump({**TABLE, **fields}))
    return path


@pytest.mark.parametrize("name", table_names())
def test_the_tables_that_come_along_are_whole(name):
    table = load_table(name)
    rows = table.rows()
    assert len({row.name for row in rows}) == len(rows) > 5 and all("/" not in row.name for row in rows)
    assert any(figure.method == "e_pmq" and figure.bits == 4 for figure in table.published) or table.by_lm_eval
    for figure in table.published:
        assert not figure.scores or set(figure.scores) == set(table.tasks)
        if figure.scores:  # what is published is rounded
            assert figure.mean == pytest.approx(sum(figure.scores.values()) / len(table.tasks), abs=0.11)
    for task in table.tasks:
        assert table.expert(task).count("/") == 1
    for row in rows:
        recipe = row_recipe(table, row, table.base, {}, RunOptions())
        assert [expert.name for expert in recipe.experts] == list(table.tasks)
        assert row.bits is None or (
            recipe.quantize.bits == row.bits and recipe.quantize.calibrates == (row.method != "rtn")
        )


def test_a_row_is_a_recipe(tmp_path):
    table = load_table(written(tmp_path / "a.yaml", samples=64, seed=3, batch_size=5))
    heads, options = {"one": tmp_path / "one.safetensors"}, RunOptions(limit=10, device="cpu")
    recipe = row_recipe(table, Row("ta", "ours", 2), "here", heads, options, tmp_path / "out")
    assert recipe.base == "here" and recipe.samples == 10 and recipe.seed == 3 and recipe.batch_size == 5
    assert recipe.quantize.method == "expert_guided" and recipe.quantize.bits == 2 and recipe.merge.scaling == 0.3
    one, two = recipe.experts
    assert one.head == str(heads["one"]) and two.head is None and two.model == "owner/expert_two"
    assert one.calibration.split == "train" and one.calibration.samples is None
    assert one.evaluation.split == "test" and one.evaluation.samples == 10
    whole = row_recipe(table, Row(None, "base", None), "here", heads, RunOptions())
    assert whole.quantize.method == "none" and whole.samples == 64 and whole.experts[0].evaluation.samples is None


def test_tasks_may_lie_in_a_file_of_their_own(tmp_path):
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"one": TASK, "two": TASK, "three": TASK}))
    table = load_table(written(tmp_path / "a.yaml", task_file="tasks.yaml", tasks=["three", "one"]))
    assert list(table.tasks) == ["three", "one"]
    with pytest.raises(ValueError, match=r"a\.yaml: tasks: four not in tasks\.yaml"):
        load_table(written(tmp_path / "a.yaml", task_file="tasks.yaml", tasks=["one", "four"]))
    with pytest.raises(ValueError, match="tasks must be a list of names out of"):
        load_table(written(tmp_path / "a.yaml", task_file="tasks.yaml"))
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such file"):
        load_table(written(tmp_path / "a.yaml", task_file="none.yaml", tasks=["one"]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": "owner/expert"}, r"experts: has no \{task\}"),
        ({"experts": {"one": "a/b"}}, "experts: needs exactly the tasks one, two"),
        ({"methods": {"awq": {"method": "awq"}}}, "methods.awq.method: 'awq' is not one of none, rtn, gptq"),
        ({"methods": {"rtn": {"method": "rtn", "damping": 1}}}, "methods.rtn.damping: rtn does not use it"),
        ({"bits": [5]}, "methods.gptq.bits: 5 is not one of"),
        ({"merges": {"ta": {"scale": 1}}}, "unknown field 'merges.ta.scale'"),
        ({"shapes": {}}, "shapes: the base's is missing"),
        ({"tasks": {"one": {**TASK, "templates": None}}}, "a head from the text tower needs both"),
        ({"tasks": {"one": {**TASK, "templates": ["a cat"]}}}, "has no {}, the place of the class's name"),
        ({"tasks": {"one": {**TASK, "templates": ["{} {}"]}}}, "one {} is the place of the class's name"),
        ({"tasks": {"one": {**TASK, "evaluation": None}}}, "a task is scored on a split or by lm-eval"),
        ({"tasks": {"one": {**TASK, "data": {"dataset": "a/b", "split": "x"}}}}, "split and samples are the table's"),
        ({"published": [{"method": "gptq", "merge": "ta", "mean": 1, "source": "x"}]}, "bits: a quantizer's figure"),
        (
            {"published": [{"method": "experts", "merge": "ta", "mean": 1, "source": "x"}]},
            "merge: base and experts have",
        ),
        ({"published": [{"method": "rtn", "merge": "ta", "bits": 4, "mean": 1, "source": "x"}]}, "no row is ta, rtn"),
        (
            {"published": [{"method": "base", "mean": 1, "scores": {"three": 1}, "source": "x"}]},
            "a score for 'three', which is no task",
        ),
    ],
)
def test_a_wrong_table_is_refused_by_field(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        load_table(written(tmp_path / "a.yaml", **fields))


def test_no_table_at_all(tmp_path):
    (tmp_path / "a.yaml").write_text("- 1")
    with pytest.raises(ValueError, match=r"a\.yaml: a table is a mapping"):
        load_table(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"a\.yaml: not valid YAML"):
        load_table(tmp_path / "a.yaml")
    with pytest.raises(FileNotFoundError, match="nothing: no such table; there are "):
        load_table("nothing")


def test_a_mirror_stands_for_the_hub(tmp_path):
    for folder in ("owner/base", "datasets/owner/pets"):
        (tmp_path / folder).mkdir(parents=True)
    assert locate("owner/base", tmp_path) == str(tmp_path / "owner" / "base")
    assert locate("owner/pets", tmp_path, DATASETS) == str(tmp_path / "datasets" / "owner" / "pets")
    assert locate("owner/pets", tmp_path) == "owner/pets" and locate("owner/base", None) == "owner/base"


def test_a_pickle_is_taken_only_where_there_is_nothing_else(tmp_path):
    table = load_table(written(tmp_path / "a.yaml", pickle="pytorch_model.bin"))
    folder = tmp_path / "owner" / "base"
    folder.mkdir(parents=True)
    assert base_source(table, tmp_path) == f"{folder}/pytorch_model.bin"
    (folder / "model.safetensors").touch()
    assert base_source(table, tmp_path) == str(folder)
    (folder / "model.safetensors").unlink()
    assert base_source(load_table(written(tmp_path / "a.yaml")), tmp_path) == str(folder)


def test_tables_lie_in_the_package():
    assert (tables.RECIPES / "clip-vit-b32-8.yaml").is_file()
