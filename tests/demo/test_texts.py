"""The demonstration's text tasks, on tiny hand-made sources: parsing, splitting, writing, caching."""

import json
from pathlib import Path

import pytest

from epmq.demo.build import build_pool
from epmq.demo.finetune import TrainingSettings
from epmq.demo.texts import (
    TextTask,
    clean_tweet,
    make_task,
    read_ratings,
    read_tab,
    split,
    write_task,
)

SIZES = {"train": 40, "validation": 10, "test": 20}


def numbered(count: int, per_group: int | None = None) -> TextTask:
    groups = None if per_group is None else [f"group {i // per_group}" for i in range(count)]
    return TextTask([f"text {i}" for i in range(count)], [i % 2 for i in range(count)], ["a", "b"], {}, groups)


def test_tab_files_have_three_header_rows_and_quoted_fields(tmp_path: Path) -> None:
    path = tmp_path / "x.tab"
    path.write_text('Author\tContent\nd\tstring\nclass\tmeta\n\nA\t"said ""no"" twice\nover two lines"\nB\tplain\n')
    assert read_tab(path) == [
        {"Author": "A", "Content": 'said "no" twice\nover two lines'},
        {"Author": "B", "Content": "plain"},
    ]


def test_a_text_is_kept_once_and_never_with_two_labels() -> None:
    rows = [
        ("Good day!", "x"),
        ("good  day", "x"),
        ("unclear", "x"),
        ("Unclear.", "y"),
        ("bye", "y"),
        ("!", "y"),
    ]
    task = make_task(rows, {})
    assert (task.texts, task.labels, task.classes) == (["Good day!", "bye"], [0, 1], ["x", "y"])
    assert task.groups is None


def test_cap_and_fewest_bound_the_classes() -> None:
    rows = [(f"{name} {i}", name, f"g{i}") for name, count in [("a", 9), ("b", 4), ("c", 1)] for i in range(count)]
    task = make_task(rows, {}, cap=5, fewest=2)
    assert task.classes == ["a", "b"]
    assert [task.labels.count(k) for k in range(2)] == [5, 4]
    assert task.groups is not None and all(f"g{t.split()[1]}" == g for t, g in zip(task.texts, task.groups))


@pytest.mark.parametrize("per_group", [None, 1, 3, 7])
def test_no_text_and_no_group_lies_in_two_splits(per_group: int | None) -> None:
    task = numbered(300, per_group)
    parts = split(task, SIZES)
    assert {name: len(index) for name, index in parts.items()} == SIZES
    index = [int(i) for part in parts.values() for i in part]
    assert len(index) == len(set(index))
    if task.groups is not None:
        names = [{task.groups[i] for i in part} for part in parts.values()]
        assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])


def test_a_small_source_keeps_most_of_its_texts_for_training() -> None:
    parts = split(numbered(30), SIZES)
    assert {name: len(index) for name, index in parts.items()} == {"train": 21, "validation": 3, "test": 6}


def test_splits_are_the_same_at_every_call() -> None:
    first, second = split(numbered(300, 3), SIZES), split(numbered(300, 3), SIZES)
    assert all((first[name] == second[name]).all() for name in first)


def test_a_tweet_loses_what_names_its_author() -> None:
    tweet = "Thank you @HillaryClinton &amp; all! https://t.co/xYz1 -H"
    assert clean_tweet(tweet) == "Thank you @user & all!"


def test_ratings_near_neutral_are_left_out() -> None:
    lines = [("1", "2.5", "A fine film."), ("2", "-0.4", "It is a film."), ("3", "-1.1", "Dull,  very dull.")]
    assert read_ratings(lines) == [("A fine film.", "positive"), ("Dull, very dull.", "negative")]


def test_a_written_task_names_labels_and_source(tmp_path: Path) -> None:
    task = TextTask(["ä", *"bcdefghij"], [0, 1] * 5, ["even", "odd"], {"package": "hand-made"})
    write_task(task, tmp_path, SIZES)
    rows = [
        json.loads(line)
        for name in SIZES
        for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert sorted((row["text"], row["label"]) for row in rows) == sorted(zip(task.texts, task.labels))
    assert json.loads((tmp_path / "labels.json").read_text()) == ["even", "odd"]
    assert json.loads((tmp_path / "source.json").read_text())["package"] == "hand-made"


def test_a_label_without_a_name_is_refused(tmp_path: Path) -> None:
    def prepare(name: str, folder: Path) -> None:
        write_task(TextTask([f"t{i}" for i in range(20)], [0, 3] * 10, ["a", "b"], {}), folder, SIZES)

    with pytest.raises(ValueError, match="label in 0 … 1"):
        build_pool(tmp_path, ["t"], lambda f: None, prepare, TrainingSettings("mean", 8))
    assert not (tmp_path / "data" / "t").exists()
