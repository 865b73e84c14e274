"""What `epmq reproduce` would fetch, do and cost, before anything is fetched.

Costs are those of `epmq.pipeline.cost`, on models that have the published shapes and no weights: their files have the
right headers and are otherwise holes, so they take no room on the disk.
"""

import struct
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from rich.table import Table as RichTable

from epmq.errors import InputError
from epmq.files import hash_file
from epmq.merging.compatibility import open_experts
from epmq.merging.experts import ExpertSet
from epmq.merging.merged import MergedWeights
from epmq.models.checkpoint import DTYPE_NAMES, HUB_PATTERNS, SINGLE, TensorSpec, bits_per_weight, byte_size
from epmq.models.meta import named_class, tied_names
from epmq.models.storage import Layout
from epmq.models.writer import make_header
from epmq.pipeline.cost import Plan, plan_of
from epmq.pipeline.layout import LayoutPlanner
from epmq.pipeline.prepare import PreparedRun
from epmq.recipe import Recipe
from epmq.reproduce.tables import DATASETS, Row, RunOptions, Shape, Table, load_table, locate, row_recipe
from epmq.runtime import hardware, progress_bars

# Examples that a statement on scoring is about.
SCORED = 1000


@dataclass(frozen=True)
class Download:
    """One thing that a table needs.

    Attributes:
        role: `base`, `expert` or `data`.
        files: what of it is fetched.
        bytes: of weights by the shape, or of the files that are here; None where nobody has said.
        path: where it is already; None if it is to be fetched.
    """

    role: str
    hub_id: str
    files: str
    bytes: int | None
    path: Path | None


@dataclass
class Forecast:
    """What running a table takes.

    Attributes:
        rows: of the table that would be run.
        downloads: what they need.
        plans: (merge, method) → what the first such row is predicted to cost; bits change little but
            the size of the output.
        scoring: seconds of a forward of 1000 examples; None where lm-eval scores.
        scored: examples a row is scored on; None if all, of which nobody has said how many there are.
    """

    table: Table
    rows: list[Row]
    downloads: list[Download]
    plans: dict[tuple[str, str], Plan] = field(default_factory=dict)
    scoring: float | None = None
    scored: int | None = None

    def seconds(self, row: Row) -> float | None:
        """Predicted seconds of a row without scoring; None for base and experts, which are scored and no more."""
        plan = self.plans.get((str(row.merge), row.method))
        return None if plan is None else sum(plan.seconds.values())


def forecast(name: str | Path | Table, options: RunOptions | None = None, *, progress: bool = True) -> Forecast:
    """Predict what a table takes; arguments as for `reproduce.run.reproduce`. Nothing is fetched and nothing kept."""
    table, options = name if isinstance(name, Table) else load_table(name), options or RunOptions()
    result = Forecast(table, options.rows(table), list(downloads(table, options.hub)))
    result.scored = None if options.limit is None else options.limit * len(table.tasks)
    firsts = {(row.merge, row.method): row for row in reversed(result.rows) if row.merge is not None}
    with progress_bars(progress) as bar, stub_models(table) as folder:
        opening: float | None = None
        for key, row in bar.track(list(firsts.items())[::-1], description="plan"):
            recipe = row_recipe(table, row, str(folder / table.base), {}, replace(options, hub=folder))
            job = _prepared_run(table, recipe)
            opening = _opening_seconds(job.experts) if opening is None else opening
            result.plans[key] = plan = _plan(job, opening)
            if row.bits is not None and plan.tokens and not table.by_lm_eval:
                forwards = len(table.tasks) * job.recipe.samples * (1 + plan.recipe.guidance.runs_experts)
                result.scoring = plan.seconds["collect"] / forwards * SCORED
    return result


def downloads(table: Table, hub: Path | None) -> Iterator[Download]:
    """What a table needs, in that order."""
    sizes = {role: sum(map(byte_size, _tensor_specs(shape).values())) for role, shape in table.shapes.items()}
    weights = " ".join(HUB_PATTERNS)
    base_files = weights if table.pickle is None else f"{weights}, {table.pickle} without safetensors"
    yield _download("base", table.base, base_files, sizes["base"], hub)
    for name in table.tasks:
        yield _download("expert", table.expert(name), weights, sizes.get("expert", sizes["base"]), hub)
    for task in table.tasks.values():
        splits = [split for split in (task.calibration, task.evaluation) if split is not None]
        files = ", ".join(dict.fromkeys(splits)) + (f" of {task.data.subset}" if task.data.subset else "")
        yield _download("data", str(task.data.dataset), files, None, hub)
    readers: dict[str, list[str]] = defaultdict(list)
    for task in table.tasks.values():
        for name, lm_task in (task.lm_eval or {}).items():
            readers[lm_task.dataset].append(name)
    for dataset, names in readers.items():
        yield _download("data", dataset, f"what lm-eval's {', '.join(names)} read", None, hub)


def _download(role: str, hub_id: str, files: str, size: int | None, hub: Path | None) -> Download:
    source = locate(hub_id, hub, DATASETS if role == "data" else "")
    path = Path(source) if source != hub_id else None
    if path is None and role != "data":  # of a data set only its card is sure to be in the cache
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(hub_id, "config.json")
        path = Path(cached).parent if isinstance(cached, str) else None
    if path is not None:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Download(role, hub_id, files, size, path)


def _meta_model(shape: Shape) -> Any:
    model_class = named_class(shape.model)
    if model_class is None:
        raise InputError(f"shapes: transformers has no class {shape.model}")
    config = model_class.config_class(**shape.config, dtype=shape.dtype)
    with torch.device("meta"):
        return model_class(config)


def _tensor_specs(shape: Shape) -> dict[str, TensorSpec]:
    """The tensors of a model's file."""
    model, dtype = _meta_model(shape), getattr(torch, shape.dtype)
    # transformers 5 calls every T5 tied; FLAN-T5's files hold an output layer of its own all the same.
    own = {"lm_head.weight"} if shape.config.get("tie_word_embeddings") is False else set()
    tied = set(tied_names(model)) - own
    return {
        name: (DTYPE_NAMES[dtype if tensor.is_floating_point() else tensor.dtype], tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


@contextmanager
def stub_models(table: Table) -> Iterator[Path]:
    """A mirror of the Hub with a table's models in their published shapes, and holes for weights."""
    with tempfile.TemporaryDirectory(prefix="epmq-") as name:
        folder, shapes = Path(name), table.shapes
        _write_stub(folder / table.base, shapes["base"])
        first, *others = dict.fromkeys(folder / table.expert(task) for task in table.tasks)
        _write_stub(first, shapes.get("expert", shapes["base"]))
        for path in others:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(first, target_is_directory=True)
        yield folder


def _write_stub(folder: Path, shape: Shape) -> None:
    folder.mkdir(parents=True)
    config = _meta_model(shape).config
    config.architectures = [shape.model]
    config.save_pretrained(folder)
    specs = _tensor_specs(shape)
    header, names = make_header(specs)
    ends = list(accumulate((byte_size(specs[name]) for name in names), initial=len(header)))
    with (folder / SINGLE).open("wb") as file:
        file.write(header)
        for number, start in enumerate(ends[:-1]):
            file.seek(start)
            file.write(struct.pack("<H", 0x3C00 + number % 256))  # tensors that are equal would be taken for tied
        file.truncate(ends[-1])


def _prepared_run(table: Table, recipe: Recipe) -> PreparedRun:
    """A row's recipe, open: no data has been read, and each task has batches of random inputs in its place."""
    recipe = recipe.ordered()
    experts = open_experts(recipe.base, recipe.experts, recipe.tokenizer, recipe.config)
    recipe = recipe.resolved(all(task.classes is not None for task in table.tasks.values()))
    calibration = {}
    if recipe.calibrates:
        batches = _random_batches(table.shapes["base"], experts.model.config, recipe.samples, recipe.batch_size)
        calibration = {expert.name: batches for expert in recipe.experts}
    merged, settings = MergedWeights(experts, recipe.merge, recipe.seed), recipe.quantize
    layout = Layout()
    if settings.method != "none" or recipe.calibrates:
        layout = LayoutPlanner(experts, settings).layout()
    return PreparedRun(recipe, experts, merged, calibration, {}, layout=layout)


def _random_batches(shape: Shape, config: Any, samples: int, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of inputs, all of them the same one in memory."""
    size = min(samples, batch_size)
    if shape.tokens is None:
        batch = {"pixel_values": torch.randn(size, 3, config.image_size, config.image_size)}
    else:
        ids = torch.randint(2, config.vocab_size, (size, shape.tokens))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if shape.targets:
            labels = torch.randint(2, config.vocab_size, (size, shape.targets))
            batch |= {"labels": labels, "decoder_attention_mask": torch.ones_like(labels)}
    last = [{name: value[: samples % size] for name, value in batch.items()}] if samples % size else []
    return [batch] * (samples // size) + last


def _opening_seconds(experts: ExpertSet) -> float:
    """Seconds in which all files are read, checked and hashed, from what one of them takes."""
    start = time.perf_counter()
    expert, *_ = experts.experts.values()
    expert.check_finite()
    hash_file(expert.path / SINGLE)
    return (time.perf_counter() - start) * (1 + len(experts.experts))


def _plan(job: PreparedRun, opening: float) -> Plan:
    """The plan of a run; each batch counts towards its memory as often as it is listed."""
    plan = plan_of(job, opening)
    inputs = sum(tensor.nbytes for own in job.calibration.values() for batch in own for tensor in batch.values())
    return replace(plan, peak_memory_mb=plan.peak_memory_mb + inputs / 1e6)


def forecast_tables(forecast: Forecast) -> list[RichTable]:
    """A forecast as tables for the terminal."""
    return [_download_table(forecast), _cost_table(forecast)]


def _download_table(forecast: Forecast) -> RichTable:
    title = f"{forecast.table.title}: needs"
    table = RichTable("what", "Hub id", "files", "MB", "where", title=title, title_justify="left")
    for item in forecast.downloads:
        size = "unknown" if item.bytes is None else f"{item.bytes / 1e6:.0f}"
        table.add_row(item.role, item.hub_id, item.files, size, str(item.path or "to be fetched"))
    sizes = [item.bytes for item in forecast.downloads if item.path is None]
    known = sum(size or 0 for size in sizes)
    table.add_section()
    where = f"and {sizes.count(None)} of unknown size"
    table.add_row("in all", f"{len(sizes)} to be fetched", "", f"{known / 1e6:.0f}", where)
    return table


def _cost_table(forecast: Forecast) -> RichTable:
    rows = forecast.rows
    bits = next((row.bits for row in rows if row.bits is not None), None)
    size = "output MB" if bits is None else f"output MB, {bits} bits"
    table = RichTable(
        "merge", "method", "rows", "phases, s", "s a row", "peak MB", size, "bits a weight", title_justify="left"
    )
    table.title = f"costs, without scoring, on this machine ({hardware()['accelerator'] or 'CPU'})"
    for (merge, method), plan in forecast.plans.items():
        count = sum((row.merge, row.method) == (merge, method) for row in rows)
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in plan.seconds.items())
        whole = bits_per_weight(plan.output_bytes, plan.parameters)
        costs = sum(plan.seconds.values()), plan.peak_memory_mb, plan.output_bytes / 1e6
        table.add_row(merge, method, str(count), phases, *(f"{cost:.0f}" for cost in costs), f"{whole or 0:.2f}")
    total = sum(forecast.seconds(row) or 0.0 for row in rows)
    table.add_section()
    table.add_row("in all", "", str(len(rows)), "", f"{total:.0f}", "", "")
    if forecast.scoring is not None:
        phases = "at most, a forward of each"
        table.add_row("scoring", f"{SCORED} examples", "", phases, f"{forecast.scoring:.0f}", "", "")
        if forecast.scored is not None:
            seconds = forecast.scored * len(rows) * forecast.scoring / SCORED
            table.add_row("scoring", f"{forecast.scored} examples a row", str(len(rows)), "", f"{seconds:.0f}", "", "")
    return table
