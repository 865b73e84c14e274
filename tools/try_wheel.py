"""Install a wheel in an empty environment and do a tiny run there, far from the source.

python tools/try_wheel.py dist/epmq-….whl
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def try_wheel(wheel: Path) -> None:
    """Raise `CalledProcessError` where the wheel does not install or a command of it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        venv.create(folder / "venv", with_pip=True)
        programs = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

        def call(program: str, *arguments: str) -> None:
            print("$", program, *arguments, flush=True)
            subprocess.run([str(programs / program), *arguments], check=True, cwd=folder, env=environment)

        constraints = str(ROOT / "constraints.txt")
        call("python", "-m", "pip", "install", "--quiet", "-c", constraints, str(wheel.resolve()))
        call("epmq", "--version")
        call("epmq", "--help")
        call("python", str(ROOT / "tools" / "tiny_pool.py"), "pool")
        call("epmq", "run", "pool/recipe.yaml", "-o", "merged-4bit", "--quiet")
        call("epmq", "inspect", "merged-4bit")


if __name__ == "__main__":
    try_wheel(Path(sys.argv[1]))
