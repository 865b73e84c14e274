import json
import shutil

import pytest
from conftest import write_texts

import epmq
from epmq.demo import run as demo
from epmq.errors import InputError


@pytest.fixture
def small_demo(pool, tmp_path, monkeypatch):
    """The demo over the tiny pool, without packages or training."""
    for part in ("base", "experts"):
        shutil.copytree(pool / part, tmp_path / "pool" / part)
    for seed, task in enumerate(("one", "two")):
        for split in ("train", "test"):
            folder = tmp_path / "pool" / "data" / task
            folder.mkdir(parents=True, exist_ok=True)
            write_texts(folder / f"{split}.jsonl", 16, 3, seed)
        record = json.dumps({"base_test": 0.4, "test": 0.6})
        (tmp_path / "pool" / "experts" / task / "training.json").write_text(record)
    monkeypatch.setattr(demo, "fetch_packages", lambda: None)
    monkeypatch.setattr(demo, "demo_pool", lambda: tmp_path / "pool")
    monkeypatch.setattr(demo, "DEMO_TASKS", ("one", "two"))
    return tmp_path / "demo"


def test_the_demo_compares_and_leaves_a_checkpoint(small_demo, capsys):
    columns = demo.run_demo(small_demo)
    assert list(columns) == ["base", "experts", "merged", "RTN", "GPTQ", "expert-guided"]
    assert columns["base"]["scores"] == {"one": 0.4, "two": 0.4} and columns["experts"]["scores"]["one"] == 0.6
    assert all(set(column["scores"]) == {"one", "two"} for column in columns.values())
    assert columns["expert-guided"]["bytes"] < columns["merged"]["bytes"] < columns["experts"]["bytes"]
    bits = [column["bits_per_weight"] for column in columns.values()]
    assert bits[:3] == [32, 32, 32] and 4 < bits[-1] < 16
    printed = capsys.readouterr().out
    assert all(title in printed for title in columns) and "mean" in printed and "bits a weight" in printed
    assert "merged by task_arithmetic" in printed
    assert json.loads((small_demo / "demo.json").read_text()) == columns
    model = epmq.load(small_demo / "expert-guided")
    assert set(model.answer("one", ["the cat sat"])) <= {"x", "y", "z"}

    again = demo.run_demo(small_demo)
    assert again == columns


def test_the_demo_takes_another_merge(small_demo, monkeypatch, capsys):
    with pytest.raises(InputError, match=r"merge\.method: 'mystery' is not one of"):
        demo.run_demo(small_demo, "mystery")
    monkeypatch.setattr(demo, "TITLES", {"rtn": "RTN", "expert_guided": "expert-guided"})
    demo.run_demo(small_demo, "wudi")
    assert "merged by wudi" in capsys.readouterr().out


def test_the_demo_does_not_touch_what_is_not_its_own(small_demo):
    small_demo.mkdir()
    (small_demo / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not from an earlier demo"):
        demo.run_demo(small_demo)
    assert (small_demo / "precious.txt").read_text() == "mine"
