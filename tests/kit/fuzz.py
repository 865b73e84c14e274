"""Opens damaged files, each in a process of its own, and says what becomes of them.

Tiny pools of models and data (`tests.kit.fuzz_pools`) are damaged one file at a time (`tests.kit.mutators`). They are
opened as a run opens them before it computes, or as `epmq inspect` and `epmq.load` open a written checkpoint. A process
may take 10 s and 4 GB. What counts:

    refused   an error that the command line turns into one line
    accepted  no error: the damage changed nothing that matters, or nothing that can be known
    crashes   any other error, an allocation that failed, or the end of the process
    hangs     no end within 10 s
    escapes   a file written, moved or removed outside the output, a process or connection started, or code of the
              pool run
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from epmq.pipeline.verify import OPENED
from tests.kit.fuzz_pools import OUTPUT, POOLS, RECIPE, build, damaged_files
from tests.kit.mutators import choose

CANARY = "canary"
SECONDS, BYTES = 10.0, 4 << 30
OUTCOMES = ("refused", "accepted", "crashes", "hangs")
# What the command line turns into one line.
CLEAR = (ValueError, OSError, RuntimeError, KeyError)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events of what changes files, with the number of paths among their arguments.
CHANGES = {
    **dict.fromkeys(("os.rename", "os.link", "os.symlink"), 2),
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown"), 1),
}
PROCESSES = (
    *("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn"),
)
CONNECTIONS = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")


@dataclass
class Result:
    """What became of one input."""

    number: int
    pool: str
    file: str
    mutator: str
    outcome: str = "crashes"
    error: str = "the process ended"
    unnamed: bool = False
    escapes: list[str] = field(default_factory=list)


class Watch:
    """An audit hook that refuses, and notes, whatever an input must not lead to.

    Args:
        folder: the damaged pool; only its output may be written.
        connects: a recipe may name a model on the Hub: connections are refused, but not held against it.
    """

    def __init__(self, folder: Path, connects: bool) -> None:
        self.folder, self.connects = str(folder), connects
        self.escapes: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & WRITES:
            self._check(event, arguments[:1])
        elif event in ("os.remove", "os.rmdir") and isinstance(arguments[1], int) and arguments[1] >= 0:
            self._check(event, (os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), os.fsdecode(arguments[0])),))
        elif event in CHANGES:
            self._check(event, arguments[: CHANGES[event]])
        elif event in PROCESSES or event == "pickle.find_class":
            self._refuse(f"{event} {arguments}")
        elif event in CONNECTIONS:
            self._refuse(f"{event} {arguments}", note=not self.connects)
        elif event in ("exec", "import", "ctypes.dlopen"):
            file = getattr(arguments[0], "co_filename", None) if event == "exec" else arguments[event == "import"]
            if isinstance(file, str) and file.startswith(self.folder):
                self._refuse(f"{event} {file}")

    def _check(self, event: str, paths: tuple[Any, ...]) -> None:
        for path in paths:
            if isinstance(path, int):
                continue  # a file that is open already
            name = os.path.abspath(os.fsdecode(path))
            ours = (f"{self.folder}/{OUTPUT}", f"{self.folder}/.{OUTPUT}", f"{gettempdir()}/{OPENED}")
            if name != os.devnull and not name.startswith(ours):
                self._refuse(f"{event} {name}")

    def _refuse(self, what: str, note: bool = True) -> None:
        if note:
            self.escapes.append(what)
        raise PermissionError(f"not while fuzzing: {what}")


def damage(pools: Path, folder: Path, seed: int, number: int) -> Result:
    """Make the pool of one input: links to the files of a good one, and one damaged file."""
    rng = random.Random(f"{seed}/{number}")
    pool, file = rng.choice(damaged_files(pools))
    shutil.copytree(pools / pool, folder, copy_function=os.link)
    content = (folder / file).read_bytes()
    mutator = choose(file, rng)
    damaged = mutator(content, rng)
    (folder / file).unlink()
    (folder / file).write_bytes(damaged)
    code = f"open({str(folder / CANARY)!r}, 'w')\nclass Canary: pass\n"
    (folder / file).with_name("canary.py").write_text(code)
    if file == RECIPE:
        os.chdir(folder)
    return Result(number, pool, file, mutator.__name__)


def attempt(pools: Path, folder: Path, seed: int, number: int, show: bool) -> Result:
    """Open one input, in this process."""
    result = damage(pools, folder, seed, number)
    watch = Watch(folder, connects=result.file == RECIPE)
    sys.addaudithook(watch)
    try:
        POOLS[result.pool][1](folder)
        result.outcome, result.error = "accepted", ""
    except BaseException as error:
        result.error = f"{type(error).__name__}: {error}"[:1000]
        short = isinstance(error, MemoryError | RecursionError) or "DefaultCPUAllocator" in str(error)
        result.outcome = "refused" if isinstance(error, CLEAR) and not short else "crashes"
        result.unnamed = result.outcome == "refused" and not is_named(error, folder / result.file)
        if show:
            traceback.print_exc()
    result.escapes = watch.escapes
    return result


def is_named(error: BaseException, file: Path) -> bool:
    """Whether an error says where to look: at the file, its folder, or the recipe's field."""
    return any(name in str(error) for name in (str(file), str(file.parent), "experts."))


def limit() -> None:
    """Let this process have no more than so much memory beside what it has, and nothing to write or read."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.dont_write_bytecode = True


def start(pools: Path, folder: Path, seed: int, number: int, show: bool) -> tuple[int, int]:
    """Open one input in a process of its own; returns its number, and where it will say what became of it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0,) if show else (0, 1, 2):
            os.dup2(silent, stream)
        limit()
        result = attempt(pools, folder, seed, number, show)
        os.write(writing, json.dumps(asdict(result)).encode("utf-8", "replace"))
    finally:
        os._exit(0)


def outcome(pools: Path, folder: Path, seed: int, number: int, show: bool = False) -> Result:
    """What becomes of one input."""
    child, reading = start(pools, folder, seed, number, show)
    content, end = b"", time.monotonic() + SECONDS
    while select.select([reading], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(reading, 1 << 16)
        if not part:
            break
        content += part
    late = not content and time.monotonic() >= end
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if content:
        return Result(**json.loads(content))
    rng = random.Random(f"{seed}/{number}")
    pool, file = rng.choice(damaged_files(pools))
    error = f"no end within {SECONDS:g} s" if late else f"the process ended with status {status}"
    return Result(number, pool, file, choose(file, rng).__name__, "hangs" if late else "crashes", error)


def outcomes(numbers: range, seed: int, show: bool = False) -> Iterator[Result]:
    """What becomes of each of some inputs, in order."""
    with TemporaryDirectory() as name:
        pools, folder = Path(name).resolve() / "pools", Path(name).resolve() / "input"
        pools.mkdir()
        build(pools)
        for pool, (_, opens, _) in POOLS.items():
            opens(pools / pool)  # each is good, and all that is imported late is imported now
        gc.freeze()  # or else the first collection of every process would copy all memory
        for number in numbers:
            yield outcome(pools, folder, seed, number, show)
            shutil.rmtree(folder, ignore_errors=True)


def failed(result: Result) -> bool:
    """Whether an input did what none must do."""
    return result.outcome in ("crashes", "hangs") or bool(result.escapes)


def fuzz(
    count: int, seed: int = 0, show: Callable[[Any], None] | None = None, log: list[Result] | None = None
) -> dict[str, int]:
    """Open so many damaged inputs.

    Args:
        count: how many.
        seed: of the damage.
        show: takes failures as they come, and the counts now and then.
        log: takes every result.

    Returns:
        mutated_inputs, refused, accepted, crashes, hangs, escapes, unnamed.
    """
    counts = dict.fromkeys(("mutated_inputs", *OUTCOMES, "escapes", "unnamed"), 0)
    for result in outcomes(range(count), seed):
        counts["mutated_inputs"] += 1
        counts[result.outcome] += 1
        counts["escapes"] += bool(result.escapes)
        counts["unnamed"] += result.unnamed
        if log is not None:
            log.append(result)
        if show is not None and failed(result):
            show(asdict(result))
        if show is not None and counts["mutated_inputs"] % 500 == 0:
            show(counts)
    return counts
