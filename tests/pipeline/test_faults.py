"""Short versions of `python -m benchmarks.faults`: disks that fail, and runs that are repeated."""

import logging

import pytest
import torch
from conftest import recipe_for

from epmq.calibration import offload
from epmq.pipeline.run import run
from tests.kit.runs import contents, finish, write_models
from tests.kit.write_faults import fail_everywhere, fill_disks


@pytest.fixture
def work(pool, tmp_path, monkeypatch):
    """Does a run into a folder; what it should give; where it may write."""
    monkeypatch.setattr(offload, "SMALLEST", 1)
    logging.getLogger("epmq").setLevel(logging.ERROR)

    def do(out):
        recipe = recipe_for(pool, output=str(out), quantize={"method": "gptq"}, activations="disk")
        run(recipe, progress=False, evaluate=False)

    do(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    yield do, whole, lambda out: contents(out) == whole
    logging.getLogger("epmq").setLevel(logging.NOTSET)


@pytest.mark.slow
def test_a_write_that_fails_loses_nothing(work, tmp_path):
    do, _, same = work
    (tmp_path / "disk").mkdir()
    counts = fail_everywhere(do, tmp_path / "disk", same, every=13)
    assert counts["write_faults"] > 3 and counts["write_faults_torn"] == counts["write_faults_left_behind"] == 0
    assert counts["write_faults_resumed_identical"] == counts["write_faults"]
    assert counts["write_faults_refused"] >= counts["write_faults"] - 1  # the rename has been synced last


@pytest.mark.slow
def test_a_full_disk_loses_nothing(work, tmp_path):
    do, whole, same = work
    try:
        counts = fill_disks(do, tmp_path / "disk", 3 * sum(map(len, whole.values())), same)
    except PermissionError as error:
        pytest.skip(str(error))
    assert counts["full_disks"] == counts["full_disks_refused"] == counts["full_disks_resumed_identical"] > 2
    assert counts["full_disks_torn"] == counts["full_disks_left_behind"] == 0


@pytest.mark.slow
def test_the_number_of_threads_makes_no_difference(tmp_path):
    write_models(tmp_path)  # wide enough that LAPACK's Cholesky would be split among threads
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            finish(tmp_path, f"out-{threads}")
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "out-1") == contents(tmp_path / "out-3")


def test_the_order_of_tasks_and_a_second_run_make_no_difference(pool, tmp_path):
    recipe = recipe_for(pool, merge={"method": "task_arithmetic", "scaling": [0.2, 0.5]})
    other = {**recipe, "experts": recipe["experts"][::-1], "merge": {**recipe["merge"], "scaling": [0.5, 0.2]}}
    outputs = []
    for name, content in (("a", recipe), ("b", recipe), ("c", other)):
        run({**content, "output": str(tmp_path / name)}, progress=False, evaluate=False)
        outputs.append(contents(tmp_path / name))
    assert outputs[0] == outputs[1] == outputs[2]


def test_an_expert_that_is_removed_under_us_can_be_put_back(pool, tmp_path, monkeypatch):
    import shutil

    from epmq.pipeline.journal import Journal

    shutil.copytree(pool, tmp_path / "pool")
    file, append = tmp_path / "pool" / "experts" / "two" / "model.safetensors", Journal.append

    def remove(journal, name, reports):
        append(journal, name, reports)
        if len(journal) == 2:
            file.rename(tmp_path / "away")

    recipe = recipe_for(tmp_path / "pool", output=str(tmp_path / "out"), quantize={"method": "gptq"})
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", remove)
        with pytest.raises(OSError, match="experts/two"):
            run(recipe, progress=False, evaluate=False)
    (tmp_path / "away").rename(file)
    report = run(recipe, progress=False, evaluate=False)
    assert "1 of 2 blocks were finished by a run that was stopped" in report["notes"]
