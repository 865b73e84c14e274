"""What `epmq reproduce` would fetch, do and cost, before anything is fetched.

Costs are those of `epmq.pipeline.cost`, on models that have the published shapes and no weights: their files have the
right headers and are otherwise holes, so they take no room on the disk.
"""

from __future__ import annotations

import json
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from epmq.data.examples import Examples
from epmq.errors import InputError
from epmq.files import hash_file
from epmq.merging.experts import Sources
from epmq.models.checkpoint import DTYPE_NAMES, HUB_PATTERNS, SINGLE
from epmq.models.meta import named_class, tied_names
from epmq.pipeline.cost import Plan, plan_of, streaming
from epmq.pipeline.prepare import PreparedRun
from epmq.reproduce.run import chosen
from epmq.reproduce.tables import DATASETS, Row, Shape, Table, load_table, located, recipe_of
from epmq.runtime import hardware, progress_bars

# Examples that a statement on scoring is about.
SCORED = 1000


@dataclass(frozen=True)
class Fetch:
    """One thing that a table needs.

    Attributes:
        what: `base`, `expert` or `data`.
        name: Hub id.
        files: what of it is fetched.
        bytes: of weights by the shape, or of the files that are here; None where nobody has said.
        place: where it is already; None if it is to be fetched.
    """

    what: str
    name: str
    files: str
    bytes: int | None
    place: str | None


@dataclass
class Forecast:
    """What running a table takes.

    Attributes:
        table: the table.
        rows: the rows that would be run.
        fetches: what they need.
        plans: (merge, method) → what the first such row is predicted to cost; bits change little but
            the size of the output.
        scoring: seconds of a forward of 1000 examples; None where lm-eval scores.
        scored: examples a row is scored on; None if all, of which nobody has said how many there are.
    """

    table: Table
    rows: list[Row]
    fetches: list[Fetch]
    plans: dict[tuple[str, str], Plan] = field(default_factory=dict)
    scoring: float | None = None
    scored: int | None = None

    def seconds(self, row: Row) -> float | None:
        """Predicted seconds of a row without scoring; None for base and experts, which are scored and no more."""
        plan = self.plans.get((str(row.merge), row.method))
        return None if plan is None else sum(plan.seconds.values())


def forecast(
    name: str | Path | Table,
    *,
    limit: int | None = None,
    hub: str | Path | None = None,
    merges: Sequence[str] = (),
    methods: Sequence[str] = (),
    bits: Sequence[int] = (),
    device: str = "auto",
    progress: bool = True,
) -> Forecast:
    """Predict what a table takes; arguments as for `reproduce.run.reproduce`. Nothing is fetched and nothing kept."""
    table = name if isinstance(name, Table) else load_table(name)
    place = None if hub is None else Path(hub).expanduser()
    rows = chosen(table, merges, methods, bits)
    found = Forecast(table, rows, list(fetches(table, place)))
    found.scored = None if limit is None else limit * len(table.tasks)
    kinds: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.merge is not None:
            kinds.setdefault((row.merge, row.method), row)
    with progress_bars(progress) as bar, stub_models(table) as folder:
        opening: float | None = None
        for row in bar.track(list(kinds.values()), description="plan"):
            recipe = recipe_of(table, row, table.base, {}, hub=folder, limit=limit, device=device)
            recipe = recipe.model_copy(update={"base": str(folder / table.base)})
            job = _job(table, recipe)
            if opening is None:
                opening = _opening(job.sources)
            found.plans[str(row.merge), row.method] = plan = _with_inputs(plan_of(job, opening), job)
            if row.bits is not None and plan.tokens and not table.by_lm_eval:
                shown = len(table.tasks) * recipe.samples * (1 + streaming(plan.recipe.quantize))
                found.scoring = plan.seconds["forward"] / shown * SCORED
    return found


def fetches(table: Table, hub: Path | None) -> Iterator[Fetch]:
    """What a table needs, in the order in which it is needed."""
    sizes = {what: sum(count for _, count in _tensors(shape).values()) for what, shape in table.shapes.items()}
    weights = " ".join(HUB_PATTERNS)
    base = weights if table.pickle is None else f"{weights}, {table.pickle} without safetensors"
    yield _fetch("base", table.base, base, sizes["base"], hub)
    for name in table.tasks:
        yield _fetch("expert", table.expert(name), weights, sizes.get("expert", sizes["base"]), hub)
    for task in table.tasks.values():
        splits = [split for split in (task.calibration, task.evaluation) if split is not None]
        files = ", ".join(dict.fromkeys(splits)) + (f" of {task.data.subset}" if task.data.subset else "")
        yield _fetch("data", str(task.data.dataset), files, None, hub)
    scored: dict[str, list[str]] = {}
    for task in table.tasks.values():
        for name, one in (task.lm_eval or {}).items():
            scored.setdefault(one.dataset, []).append(name)
    for dataset, tasks in scored.items():
        yield _fetch("data", dataset, f"what lm-eval's {', '.join(tasks)} read", None, hub)


def _fetch(what: str, name: str, files: str, size: int | None, hub: Path | None) -> Fetch:
    place: Path | None = Path(located(name, hub, DATASETS if what == "data" else ""))
    if hub is None or str(place) == name:
        from huggingface_hub import try_to_load_from_cache

        # Of a data set only its card is sure to be there, and not what splits were fetched.
        cached = try_to_load_from_cache(name, "config.json") if what != "data" else None
        place = Path(cached).parent if isinstance(cached, str) else None
    if place is not None:
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return Fetch(what, name, files, size, None if place is None else str(place))


def _skeleton(shape: Shape) -> Any:
    kind = named_class(shape.model)
    if kind is None:
        raise InputError(f"shapes: transformers has no class {shape.model}")
    config = kind.config_class(**shape.config, dtype=shape.dtype)
    with torch.device("meta"):
        return kind(config)


def _tensors(shape: Shape) -> dict[str, tuple[torch.Tensor, int]]:
    """The tensors of a model's file, on the meta device, and their bytes."""
    model, dtype = _skeleton(shape), getattr(torch, shape.dtype)
    shared = tied_names(model)
    if shape.config.get("tie_word_embeddings") is False:
        # transformers 5 calls every T5 tied; FLAN-T5's files hold an output layer of its own all the same.
        shared = {name: leader for name, leader in shared.items() if name != "lm_head.weight"}
    found = {name: tensor for name, tensor in model.state_dict().items() if name not in shared}
    kinds = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in found.items()}
    return {name: (tensor.to(kinds[name]), tensor.numel() * kinds[name].itemsize) for name, tensor in found.items()}


@contextmanager
def stub_models(table: Table) -> Iterator[Path]:
    """A mirror of the Hub with a table's models in their published shapes, and holes for weights."""
    with tempfile.TemporaryDirectory(prefix="epmq-") as name:
        folder, shapes = Path(name), table.shapes
        _write_stub(folder / table.base, shapes["base"])
        first: Path | None = None
        for task in table.tasks:
            place = folder / table.expert(task)
            if first is None:
                _write_stub(place, shapes.get("expert", shapes["base"]))
                first = place
            elif not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(first, target_is_directory=True)
        yield folder


def _write_stub(folder: Path, shape: Shape) -> None:
    folder.mkdir(parents=True)
    config = _skeleton(shape).config
    config.architectures = [shape.model]
    config.save_pretrained(folder)
    header, start, starts = dict[str, Any](), 0, list[int]()
    for name, (tensor, size) in _tensors(shape).items():
        kind = DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, start + size]}
        starts.append(start)
        start += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, place in enumerate(starts):  # no two tensors are equal: what is tied is found by that
            file.seek(8 + len(text) + place)
            file.write(struct.pack("<H", 0x3C00 + number % 256))
        file.truncate(8 + len(text) + start)


def _job(table: Table, recipe: Any) -> PreparedRun:
    """A row's recipe, open: no data has been read, and each task has batches of random inputs in its place."""
    recipe = recipe.ordered()
    sources = Sources(recipe)
    heads = all(task.classes is not None for task in table.tasks.values())
    resolved = recipe.model_copy(update={"quantize": recipe.quantize.resolved(heads)})
    sources.recipe = resolved
    calibration = {}
    if resolved.quantize.calibrates:
        batches = _inputs(table.shapes["base"], sources, resolved.samples, resolved.batch_size)
        calibration = {expert.name: Examples("batches", batches) for expert in resolved.experts}
    return PreparedRun(resolved, sources, None, calibration, {})


def _inputs(shape: Shape, sources: Sources, samples: int, batch_size: int) -> list[dict[str, Any]]:
    """Batches of inputs, all of them the same one in memory."""
    config: Any = sources.model.config
    size = min(samples, batch_size)
    if shape.tokens is None:
        batch = {"pixel_values": torch.randn(size, 3, config.image_size, config.image_size)}
    else:
        ids = torch.randint(2, config.vocab_size, (size, shape.tokens))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if shape.targets:
            labels = torch.randint(2, config.vocab_size, (size, shape.targets))
            batch |= {"labels": labels, "decoder_attention_mask": torch.ones_like(labels)}
    rest = [{name: value[: samples % size] for name, value in batch.items()}] if samples % size else []
    return [batch] * (samples // size) + rest


def _with_inputs(plan: Plan, job: PreparedRun) -> Plan:
    """Count the inputs as well, which are held as often as they are listed."""
    held = sum(value.nbytes for part in job.calibration.values() for batch in part.inputs for value in batch.values())
    return Plan(**{**vars(plan), "peak_memory_mb": plan.peak_memory_mb + held / 1e6})


def _opening(sources: Sources) -> float:
    """Seconds in which all files are read, checked and hashed, from what one of them takes."""
    start = time.perf_counter()
    source = next(iter(sources.experts.values()))
    source.check_finite(list(source.names))
    hash_file(source.path / SINGLE)
    return (time.perf_counter() - start) * (1 + len(sources.experts))


def forecast_tables(found: Forecast) -> list[Any]:
    """A forecast as tables for the terminal (rich renderables)."""
    from rich.table import Table as Shown

    needs = Shown("what", "Hub id", "files", "MB", "where", title=f"{found.table.title}: needs", title_justify="left")
    for one in found.fetches:
        size = "unknown" if one.bytes is None else f"{one.bytes / 1e6:.0f}"
        needs.add_row(one.what, one.name, one.files, size, one.place or "to be fetched")
    missing = [one for one in found.fetches if one.place is None]
    known = sum(one.bytes or 0 for one in missing)
    unknown = sum(one.bytes is None for one in missing)
    needs.add_section()
    needs.add_row("in all", f"{len(missing)} to be fetched", "", f"{known / 1e6:.0f}", f"and {unknown} of unknown size")
    bits = next((row.bits for row in found.rows if row.bits is not None), None)
    size = "output MB" if bits is None else f"output MB, {bits} bits"
    costs = Shown("merge", "method", "rows", "phases, s", "s a row", "peak MB", size, title_justify="left")
    costs.title = f"costs, without scoring, on this machine ({hardware()['accelerator'] or 'CPU'})"
    for (merge, method), plan in found.plans.items():
        count = sum((row.merge, row.method) == (merge, method) for row in found.rows)
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in plan.seconds.items())
        total = f"{sum(plan.seconds.values()):.0f}"
        costs.add_row(
            merge, method, str(count), phases, total, f"{plan.peak_memory_mb:.0f}", f"{plan.output_bytes / 1e6:.0f}"
        )
    whole = sum(found.seconds(row) or 0.0 for row in found.rows)
    costs.add_section()
    costs.add_row("in all", "", str(len(found.rows)), "", f"{whole:.0f}", "", "")
    if found.scoring is not None:
        costs.add_row("scoring", f"{SCORED} examples", "", "a forward of each", f"{found.scoring:.0f}", "", "")
    if found.scoring is not None and found.scored is not None:
        every = found.scored * len(found.rows) * found.scoring / SCORED
        costs.add_row("scoring", f"{found.scored} examples a row", str(len(found.rows)), "", f"{every:.0f}", "", "")
    return [needs, costs]
