import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recipe_for
from safetensors.torch import load_file

from epmq.calibration.engine import CalibrationEngine
from epmq.files import differences
from epmq.models.writer import CheckpointWriter
from epmq.pipeline import run as pipeline
from epmq.pipeline.journal import BLOCKS, INPUTS, Journal, hash_batches, remove_stale_workdir, resumable
from epmq.pipeline.run import run
from epmq.runtime import versions
from tests.kit.runs import contents

METHODS: list[dict[str, Any]] = [
    {"method": "rtn"},
    {"method": "gptq"},
    {"method": "e_pmq"},
    {"method": "expert_guided"},
    {"method": "expert_guided", "expert_features": 0.6, "bits": 3, "group_size": 32, "symmetric": False},
]


class Stopped(Exception):
    pass


def stop_after(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run end with an error when it has kept so many blocks, and before them what lies outside."""
    append = Journal.append

    def fail(journal: Journal, name: str, reports: list[dict[str, Any]]) -> None:
        if len(journal) == 1 + blocks:
            raise Stopped
        append(journal, name, reports)

    monkeypatch.setattr(Journal, "append", fail)


def recipe(pool: Path, output: Path, settings: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return recipe_for(pool, output=str(output), quantize=settings, **fields)


@pytest.mark.parametrize("form", ["pack-quantized", "dequantized"])
@pytest.mark.parametrize("settings", METHODS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(pool, tmp_path, monkeypatch, settings, form):
    """After the first block, and after the last one."""
    run(recipe(pool, tmp_path / "whole", settings, format=form), progress=False, evaluate=False)
    whole = json.loads((tmp_path / "whole" / "report.json").read_text())
    for blocks in (1, 2):
        fields = recipe(pool, tmp_path / "out", settings, format=form)
        with monkeypatch.context() as patch:
            stop_a_run(fields, tmp_path, patch, blocks)
        with monkeypatch.context() as patch:
            report, solved = go_on(fields, patch)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
        assert solved == (0 if settings["method"] == "rtn" else 2 - blocks)
        assert f"{blocks} of 2 blocks were finished by a run that was stopped" in report["notes"]
        assert steady(report["layers"]) == steady(whole["layers"]) and report["heads"] == whole["heads"]
        shutil.rmtree(tmp_path / "out")


def stop_a_run(fields: dict[str, Any], folder: Path, patch: pytest.MonkeyPatch, blocks: int) -> None:
    """Stop a run after one or both of its blocks."""
    if blocks == 1:
        stop_after(blocks, patch)
    else:
        patch.setattr(pipeline, "write_rest", interrupted)
    with pytest.raises((Stopped, KeyboardInterrupt)):
        run(fields, progress=False, evaluate=False)
    assert not (folder / "out").exists()
    if blocks == 1:
        assert sorted(os.listdir(folder / ".out.work" / BLOCKS)) == ["00000.json", "00001.json"]


def go_on(fields: dict[str, Any], patch: pytest.MonkeyPatch) -> tuple[dict[str, Any], int]:
    """The report of a run that goes on, and how many blocks it has quantized."""
    solved, original = [], CalibrationEngine._quantize
    patch.setattr(CalibrationEngine, "_quantize", lambda *args: solved.append(1) or original(*args))
    return run(fields, progress=False, evaluate=False), len(solved)


def steady(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**layer, "seconds": 0} for layer in layers]


def test_a_run_that_is_stopped_while_it_is_scored_quantizes_nothing_again(pool, tmp_path, monkeypatch):
    recipe = recipe_for(pool, output=str(tmp_path / "out"), quantize={"method": "gptq"})
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "evaluate_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(recipe, progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(CalibrationEngine, "_solve", None)  # what solves a layer fails
    report = pipeline.run(recipe, progress=False)
    assert report["scores"] and "2 of 2 blocks were finished by a run that was stopped" in report["notes"]


def interrupted(*args, **settings):
    raise KeyboardInterrupt


def test_a_stopped_run_says_how_to_go_on(pool, tmp_path, monkeypatch, caplog):
    stop_after(1, monkeypatch)
    with pytest.raises(Stopped):
        run(recipe(pool, tmp_path / "out", {"method": "gptq"}), progress=False, evaluate=False)
    assert "1 finished blocks are kept in" in caplog.text and ".out.work" in caplog.text


@pytest.fixture
def stopped(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe over a pool that may be spoiled, whose run was stopped after a block."""
    shutil.copytree(pool, tmp_path / "pool")
    fields = recipe(tmp_path / "pool", tmp_path / "out", {"method": "gptq"})
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(Stopped):
            run(fields, progress=False, evaluate=False)
    return fields


def changed_bits(folder: Path, recipe: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    recipe["quantize"] = {"method": "gptq", "bits": 3}


def changed_expert(folder: Path, recipe: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    file = folder / "pool" / "experts" / "two" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def changed_data(folder: Path, recipe: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    recipe["samples"] = 5


def changed_version(folder: Path, recipe: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    patch.setattr("epmq.pipeline.run.versions", lambda: {**versions(), "torch": "1.0"})


CHANGES = [
    (changed_bits, r"recipe\.quantize\.bits: 4 → 3"),
    (changed_expert, r"files\..*two/model\.safetensors"),
    (changed_data, r"calibration\.(one|two)"),
    (changed_version, r"versions\.torch: .* → 1\.0"),
]


@pytest.mark.parametrize("change, message", CHANGES, ids=lambda x: getattr(x, "__name__", ""))
def test_what_has_changed_is_named(stopped, tmp_path, monkeypatch, change, message):
    change(tmp_path, stopped, monkeypatch)
    with pytest.raises(ValueError, match=message) as error:
        run(stopped, progress=False, evaluate=False)
    assert "--restart" in str(error.value)
    assert len(list((tmp_path / ".out.work" / BLOCKS).iterdir())) == 2
    report = run(stopped, progress=False, evaluate=False, restart=True)
    assert not any("was stopped" in note for note in report["notes"])
    assert not (tmp_path / ".out.work").exists()


def test_what_does_not_decide_the_result_may_change(stopped, tmp_path):
    stopped |= {"output": str(tmp_path / "out"), "activations": "disk"}
    stopped["experts"][0].pop("evaluation", None)
    file = tmp_path / "pool" / "base" / "model.safetensors"
    os.utime(file)
    report = run(stopped, progress=False, evaluate=False)
    assert any("was stopped" in note for note in report["notes"])


def test_two_runs_do_not_work_on_one_output(tmp_path):
    with (
        resumable(tmp_path / "out", {}) as work,
        pytest.raises(RuntimeError, match="another process"),
        resumable(tmp_path / "out", {}),
    ):
        pass
    assert not work.output.parent.exists() and (tmp_path / "out").is_dir()


def test_work_without_a_finished_block_vanishes(tmp_path):
    with pytest.raises(Stopped), resumable(tmp_path / "out", {}):
        raise Stopped
    assert os.listdir(tmp_path) == []


def test_a_kill_before_the_inputs_are_noted_begins_anew(tmp_path):
    (tmp_path / ".out.work" / BLOCKS).mkdir(parents=True)
    (tmp_path / ".out.work" / f"{INPUTS}.draft").write_text("{")
    with resumable(tmp_path / "out", {"a": 1}) as work:
        assert len(work.journal) == 0


def test_an_entry_comes_back_as_it_was(tmp_path):
    journal, reports = Journal(tmp_path), [{"name": "a", "loss": 0.1, "shape": [2, 3], "strength": None}]
    journal.append("encoder.0", reports)
    journal.append("encoder.1", [])
    again = Journal(tmp_path)
    assert len(again) == 2 and list(again) == [("encoder.0", reports), ("encoder.1", [])]
    again.clear()
    assert len(again) == len(Journal(tmp_path)) == 0 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("form", ["pack-quantized", "dequantized"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_tensor_is_written_once(pool, tmp_path, monkeypatch, method, form):
    """Finished blocks lie in the output's files from the start: there is no second copy of them, also on resuming."""
    write, writes = CheckpointWriter.write, Counter()

    def noted(self: CheckpointWriter, name: str, parts: Any) -> None:
        if self.folder.is_relative_to(tmp_path):  # what transformers opens is tried elsewhere
            writes[name] += 1
        write(self, name, parts)

    monkeypatch.setattr(CheckpointWriter, "write", noted)
    fields = recipe(pool, tmp_path / "out", {"method": method}, format=form)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_rest", lambda *args: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            run(fields, progress=False, evaluate=False)
    work = tmp_path / ".out.work"
    assert [str(file.relative_to(work)) for file in work.rglob("*.safetensors")] == ["output/model.safetensors"]
    run(fields, progress=False, evaluate=False)
    assert set(writes.values()) == {1} and len(writes) == len(load_file(tmp_path / "out" / "model.safetensors"))
    assert os.listdir(tmp_path) == ["out"]


def test_differences_are_named_by_their_path():
    before, after = {"a": {"b": [1, 2]}, "c": "0" * 64}, {"a": {"b": [1, 3]}, "c": "1" * 64, "d": 1}
    assert list(differences(before, after)) == ["a.b[1]: 2 → 3", "c", "d: None → 1"]


def test_batches_are_told_apart_by_value_name_dtype_and_shape():
    ones = torch.ones(2, 3)
    batches = [{"x": ones}, {"y": ones}, {"x": ones.double()}, {"x": ones.reshape(3, 2)}, {"x": ones * 2}, {"x": None}]
    assert len({hash_batches([batch]) for batch in batches}) == len(batches)
    assert hash_batches([{"x": ones}]) == hash_batches([{"x": ones.clone()}])


def test_a_kill_right_after_the_output_appeared_leaves_a_folder_that_is_swept_up(stopped, tmp_path):
    folder, out = tmp_path / ".out.work", tmp_path / "out"
    out.mkdir()
    remove_stale_workdir(out)
    assert folder.exists()  # an output of somebody else's: the work is not done
    shutil.rmtree(folder / "output")
    with pytest.raises(FileExistsError):
        run(stopped, progress=False, evaluate=False)
    assert not folder.exists()


# A process of its own: threads that a test before it has started do not survive a fork.
SLOW_RUN = """
import json, sys, time
from epmq.pipeline.run import run
from epmq.pipeline.journal import Journal

append = Journal.append
def wait(journal, name, reports):
    append(journal, name, reports)
    time.sleep(600 * (len(journal) > 1))
Journal.append = wait
run(json.loads(sys.argv[1]), progress=False, evaluate=False)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(pool, tmp_path):
    """Kill −9 right after the first block is kept; `python -m benchmarks.faults` does it at random times."""
    fields = recipe(pool, tmp_path / "out", {"method": "gptq"})
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", SLOW_RUN, json.dumps(fields)])
    first = tmp_path / ".out.work" / BLOCKS / "00001.json"
    while child.poll() is None and not first.exists():
        time.sleep(0.1)
    child.kill()
    assert child.wait() == -signal.SIGKILL and first.exists()
    report = run(fields, progress=False, evaluate=False)
    assert "1 of 2 blocks were finished by a run that was stopped" in report["notes"]
    run(recipe(pool, tmp_path / "whole", {"method": "gptq"}), progress=False, evaluate=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
