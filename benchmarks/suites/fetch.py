"""Packages of Debian in `EPMQ_CACHE`, unpacked and read as data, as `epmq.packages` does with those of registries."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from epmq.packages import call, unpacked


def debian(package: str) -> Path:
    """Folder with the unpacked files of a Debian package (the version that the machine's apt offers).

    Raises:
        RuntimeError: apt-get is missing or could not fetch the package.
    """

    def download(folder: Path) -> None:
        call(["apt-get", "download", "-qq", package], f"apt-get could not download {package}", cwd=folder)

    return unpacked("debian", package, download)


def _unpack_deb(archive: str, folder: str, **_: Any) -> None:
    call(["dpkg-deb", "-x", str(archive), str(folder)], f"dpkg-deb could not unpack {Path(archive).name}")


shutil.register_unpack_format("deb", [".deb"], _unpack_deb)
