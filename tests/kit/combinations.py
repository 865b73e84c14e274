"""Combinations of what users hold: architecture, heads, data, method, ties, adapters, and something that is wrong.

A combination is drawn by its number from a seed, written as tiny checkpoints and files, run in this process, and judged
by transformers and PEFT alone (`tests.kit.combination_oracle`). What counts:

    right     a result that is what it should be
    noted     a result with a departure that the run's notes name
    refused   one clear error before the first block, where something was wrong
    declined  the same where nothing was: what is not served
    late      a clear error after the first block was solved (or written, where nothing is solved)
    crash     any other error
    unnamed   an error of several lines, or one that names nothing
    silent    a result that is not what it should be, and no note that says so
    hang      no end within the time
    broken    the combination's own files could not be written
"""

from __future__ import annotations

import logging
import random
import re
import shutil
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import transformers

import epmq
from epmq.errors import EpmqError
from epmq.models.writer import CheckpointWriter
from tests.kit.architectures import ARCHITECTURES
from tests.kit.combination_faults import FAULTS, apply_fault
from tests.kit.combination_files import ADAPTED, DATA, Files, head_class, heads_of, write_files
from tests.kit.combination_oracle import Wrong, judge

SECONDS = 60
GOOD, BAD = ("right", "noted", "refused", "declined"), ("late", "crash", "unnamed", "silent", "hang", "broken")
# Architectures without linear layers that PEFT takes for an adapter.
UNADAPTED = ("squeezebert", "resnet", "mamba", "mamba2")
METHODS = ("none", "none", "none", "rtn", "gptq", "e_pmq", "expert_guided", "expert_guided")


@dataclass(frozen=True)
class Combination:
    """What is put together; heads, adapters and ties have an entry an expert (the ties one more, for the base)."""

    number: int
    architecture: str
    heads: tuple[str, ...]
    adapters: tuple[bool, ...]
    tied: tuple[bool | None, ...]
    data: str
    evaluates: bool
    quantize: dict[str, Any]
    form: str
    scaling: float
    fault: str = "none"
    sharded: bool = False
    strict: bool = False
    masked_base: bool = False

    @property
    def calibrates(self) -> bool:
        return self.quantize["method"] not in ("none", "rtn")


@dataclass
class Result:
    """What became of a combination; `why` is the message, or what is wrong with the output."""

    combination: dict[str, Any]
    outcome: str
    why: str = ""
    notes: list[str] = field(default_factory=list)
    trace: str = ""


def draw(number: int, seed: int = 0) -> Combination:
    """The combination of a number."""
    rng = random.Random(f"{seed}/{number}")
    name = rng.choice(sorted(ARCHITECTURES))
    architecture = ARCHITECTURES[name]
    count = rng.choice((1, 1, 2))
    choices = heads_of(architecture)
    # Most users have heads of one kind, or none.
    heads = tuple(rng.choice(choices) if rng.random() < 0.7 else "none" for _ in range(count))
    adapters = tuple(rng.random() < 0.25 and head in ADAPTED and name not in UNADAPTED for head in heads)
    tied: tuple[bool | None, ...] = (None,) * (count + 1)
    if architecture.has_output_layer and architecture.kind != "vision_language" and rng.random() < 0.5:
        one = rng.random() < 0.5
        tied = tuple(one if rng.random() < 0.6 else not one for _ in range(count + 1))
    kinds = DATA[architecture.kind]
    data = (
        rng.choice(kinds)
        if rng.random() < 0.92
        else rng.choice(sorted({kind for one in DATA.values() for kind in one}))
    )
    method = rng.choice(METHODS)
    quantize: dict[str, Any] = {"method": method}
    if method != "none":
        quantize |= {"bits": 8, "group_size": rng.choice((-1, -1, -1, 32)), "symmetric": rng.random() < 0.7}
    if method in ("gptq", "expert_guided"):
        quantize["adapt_heads"] = rng.random() < 0.5
    if method == "expert_guided" and rng.random() < 0.6:
        quantize["anchor_scale"] = 1.0
    masked = architecture.kind == "encoder" and head_class(architecture, "masked") is not None and rng.random() < 0.3
    return Combination(
        number=number,
        architecture=name,
        heads=heads,
        adapters=adapters,
        tied=tied,
        data=data,
        evaluates=rng.random() < 0.5,
        quantize=quantize,
        form=rng.choice(("pack-quantized", "dequantized")),
        scaling=1.0 if count == 1 else rng.choice((0.3, 1.0)),
        fault=rng.choice(sorted(FAULTS)) if rng.random() < 0.4 else "none",
        sharded=rng.random() < 0.15,
        strict=rng.random() < 0.1,
        masked_base=masked,
    )


class Late(BaseException):
    """The time is over."""


@contextmanager
def _limited() -> Iterator[None]:
    def end(signum: int, frame: Any) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_files(files: Files) -> tuple[dict[str, Any], bool]:
    """Do the run; returns its report, and whether something was written."""
    written = False
    write: Any = CheckpointWriter.write

    def noticed(self: Any, *arguments: Any, **settings: Any) -> Any:
        nonlocal written
        written = True
        return write(self, *arguments, **settings)

    combination = files.combination
    try:
        with patch.object(CheckpointWriter, "write", noticed):
            report = epmq.run(
                files.recipe,
                progress=False,
                evaluate=combination.evaluates,
                strict=combination.strict,
                calibration=files.calibration or None,
            )
    except EpmqError as error:
        solved = any((files.folder / ".out.work" / "blocks").glob("*.json"))
        # A mere merge reads the weights once: NaN are found then.
        merged = written and combination.quantize["method"] == "none" and combination.fault != "nan"
        error.late = solved or merged  # type: ignore[attr-defined]
        raise
    return report, written


def attempt(combination: Combination, folder: Path) -> Result:
    """What becomes of a combination, whose files go into an empty folder."""
    result = Result(vars(combination), "broken")
    try:
        files = write_files(combination, folder)
        happened = apply_fault(files)
        result = Result({**vars(combination), "happened": happened.what}, "crash")
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report, _ = run_files(files)
            result.notes = report["notes"]
            noted = judge(files, report, happened)
        result.outcome = "noted" if noted else "right"
    except EpmqError as error:
        result.why, late = str(error), getattr(error, "late", None)
        foreign = combination.data == "empty" or combination.data not in DATA[files.architecture.kind]
        wrong = happened.what or combination.strict or foreign
        result.outcome = "late" if late else "refused" if wrong else "declined"
        if not is_clear(result.why, files):
            result.outcome = "unnamed"
        if late is None or late:  # of the judge's own loading, or after blocks
            result.outcome, result.trace = "late", traceback.format_exc(limit=-6)
    except Wrong as wrong_result:
        result.outcome, result.why = "silent", str(wrong_result)
    except Late:
        result.outcome, result.why, result.trace = "hang", f"no end within {SECONDS} s", traceback.format_exc(limit=-6)
    except Exception as error:
        result.why, result.trace = f"{type(error).__name__}: {error}"[:500], traceback.format_exc(limit=-8)
    return result


def is_clear(message: str, files: Files) -> bool:
    """Whether a message is one line and names a file, a field, an expert or a tensor."""
    named = re.search(r"experts\.|expert |quantize|format|merge\.|strict:|\w+\.\w+", message) is not None
    return "\n" not in message and (named or str(files.folder) in message)


def quiet() -> None:
    """Let neither epmq nor transformers say anything beside the results."""
    logging.getLogger("epmq").setLevel(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def outcomes(numbers: range, seed: int = 0) -> Iterator[Result]:
    """What becomes of each of some combinations, in order."""
    with TemporaryDirectory() as name:
        folder = Path(name).resolve() / "pool"
        for number in numbers:
            folder.mkdir()
            yield attempt(draw(number, seed), folder)
            shutil.rmtree(folder, ignore_errors=True)


def campaign(
    numbers: range, seed: int = 0, show: Callable[[Any], None] | None = None, log: list[Result] | None = None
) -> dict[str, Any]:
    """Count what becomes of combinations; failures go to `show` as they come, every result into `log`."""
    counts = Counter[str]()
    for done, result in enumerate(outcomes(numbers, seed), start=1):
        counts[result.outcome] += 1
        if log is not None:
            log.append(result)
        if show is not None and result.outcome in BAD:
            show({"number": result.combination["number"], "outcome": result.outcome, "why": result.why})
        if show is not None and done % 100 == 0:
            show(dict(counts))
    return {"combinations": len(numbers), **{outcome: counts[outcome] for outcome in (*GOOD, *BAD)}}
