"""Pools of a base, data and experts."""

import pytest

from epmq.demo.build import split_file


@pytest.fixture
def root(tmp_path):
    for task in ("one", "two"):
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        for split in ("train", "validation", "test"):
            (folder / f"{split}.jsonl").touch()
    return tmp_path


def test_a_split_is_text_or_arrays(root):
    folder = root / "data" / "one"
    assert split_file(folder, "test") == folder / "test.jsonl"
    (folder / "test.jsonl").rename(folder / "test.npz")
    assert split_file(folder, "test") == folder / "test.npz"
    with pytest.raises(FileNotFoundError, match=r"data/one: no dev\.jsonl and no dev\.npz"):
        split_file(folder, "dev")
