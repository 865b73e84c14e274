"""text8lora takes base and data from text8, without a network here: text8's own preparation is replaced."""

import json
from pathlib import Path

import pytest

from benchmarks.suites import text8, text8lora


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path))

    def prepare_task(name: str, folder: Path, quick: bool) -> None:
        for split, count in {"train": 2400, "validation": 4, "test": 8}.items():
            rows = [json.dumps({"text": f"{name} {i}", "label": 0}) for i in range(count)]
            (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
        (folder / "labels.json").write_text('["only"]')
        (folder / "source.json").write_text("{}")

    monkeypatch.setattr(text8, "prepare_base", lambda folder: (folder / "config.json").write_text("{}"))
    monkeypatch.setattr(text8, "prepare_task", prepare_task)
    return tmp_path / "suites"


def into(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_the_base_is_text8s_and_made_there_where_it_is_missing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text8lora.prepare_base(into(cache / "text8lora" / "base"))
    assert (cache / "text8lora" / "base" / "config.json").samefile(cache / "text8" / "base" / "config.json")
    monkeypatch.setattr(text8, "prepare_base", None)
    text8lora.prepare_base(into(cache / "other"))
    assert (cache / "other" / "config.json").samefile(cache / "text8" / "base" / "config.json")


@pytest.mark.parametrize("quick", [False, True])
def test_a_task_is_text8s_with_fewer_training_texts(cache: Path, quick: bool) -> None:
    folder, source = into(cache / "work"), cache / ("text8-quick" if quick else "text8") / "data" / "movies"
    text8lora.prepare_task("movies", folder, quick)
    assert {path.name for path in folder.iterdir()} == {path.name for path in source.iterdir()}
    for name in ("validation.jsonl", "test.jsonl", "labels.json", "source.json"):
        assert (folder / name).samefile(source / name)
    lines = (source / "train.jsonl").read_text().splitlines()
    assert len(lines) == 2400 and (folder / "train.jsonl").read_text().splitlines() == lines[: text8lora.TRAIN]
