"""Packages of registries; here from a folder, nothing is fetched."""

import hashlib
import io
import tarfile
from base64 import b64encode
from pathlib import Path

import pytest

from epmq import packages

FILES = {"package/dist/one.js": b"one", "package/dist/two.js": b"two"}


@pytest.fixture(autouse=True)
def commands(tmp_path, monkeypatch):
    """The commands that are run; the archive that npm would fetch is made in their place."""
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path / "cache"))
    found = []

    def call(command, failure):
        found.append(command)
        (Path(command[command.index("--pack-destination") + 1]) / "some-1.0.0.tgz").write_bytes(archive())

    monkeypatch.setattr(packages, "call", call)
    return found


def archive() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as file:
        for name, data in FILES.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return content.getvalue()


def test_a_package_of_npm_is_fetched_once(tmp_path, commands):
    folder = packages.npm("@some/name@1.0.0")
    assert folder == tmp_path / "cache" / "packages" / "npm" / "some-name-1.0.0" == packages.npm("@some/name@1.0.0")
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert len(commands) == 1 and commands[0][-1] == "@some/name@1.0.0"


def test_only_what_is_needed_is_unpacked():
    folder = packages.npm("some@1.0.0", only=["package/dist/one.js"])
    assert [file.name for file in folder.rglob("*.js")] == ["one.js"]


def test_a_package_with_another_hash_is_refused(tmp_path):
    own = b64encode(hashlib.sha512(archive()).digest()).decode()
    with pytest.raises(RuntimeError, match=r"what npm fetched as some@1\.0\.0 has another hash"):
        packages.npm("some@1.0.0", own[::-1])
    assert list((tmp_path / "cache" / "packages" / "npm").iterdir()) == []
    assert packages.npm("some@1.0.0", own).is_dir()


def test_a_command_that_is_missing_is_named(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(packages.shutil, "which", lambda command: None)
    with pytest.raises(RuntimeError, match="npm could not fetch some@1: the command 'npm' is not on this machine"):
        packages.npm("some@1")


def test_a_command_is_given_a_text(monkeypatch):
    monkeypatch.undo()
    assert packages.call(["cat"], "it failed", text="naïve") == "naïve"
    with pytest.raises(RuntimeError, match="it failed"):
        packages.call(["false"], "it failed")
