"""Other people's tools, in an environment of their own (`make peers`), and what a command costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import ROOT


@dataclass(frozen=True)
class Cost:
    """What one process took.

    Attributes:
        seconds: by the wall's clock.
        cpu_seconds: of processor time, all threads.
        peak_memory_mb: its largest resident memory, which counts mapped files.
    """

    seconds: float
    cpu_seconds: float
    peak_memory_mb: float

    def then(self, other: Cost) -> Cost:
        """What two processes take, one after the other."""
        peak = max(self.peak_memory_mb, other.peak_memory_mb)
        return Cost(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds, peak)

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 2) for name, value in asdict(self).items()}


def peer_python() -> Path:
    """The interpreter that has the peers: `.venv-peers`, or what EPMQ_PEERS names.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(os.environ.get("EPMQ_PEERS", ROOT / ".venv-peers")) / "bin" / "python"
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing; run make peers, or set EPMQ_PEERS to an environment that has them")
    return path


def peer_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of packages among the peers."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {list(names)!r}}}))"
    return json.loads(subprocess.run([peer_python(), "-c", code], check=True, capture_output=True, text=True).stdout)


# Starts a command and says what it took. A process begins with the peak of memory of the one that started it, so that
# must be a small one, and not this one.
STARTER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=2)
_, status, usage = os.wait4(process.pid, 0)
spent = time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss
print(json.dumps([os.waitstatus_to_exitcode(status), *spent]))
"""


def cost_of(command: Sequence[str | Path], folder: Path = ROOT) -> Cost:
    """Run a command to its end, in a folder.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    line = [sys.executable, "-I", "-S", "-c", STARTER, *map(str, command)]
    with tempfile.TemporaryFile() as output:
        cost = subprocess.run(line, stdout=subprocess.PIPE, stderr=output, cwd=folder, check=True).stdout
        code, seconds, cpu, peak = json.loads(cost)
        if code:
            output.seek(0)
            end = output.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(map(str, command))} ended with {code}:\n{end}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes here
    return Cost(seconds, cpu, peak * unit / 2**20)
