"""Published tables as data: one YAML a table under `recipes/`, with the published figures in it.

A table names a base, its experts and their tasks, and a grid of merges, methods and bits. Each cell of the grid is a
row, and each row is an ordinary recipe (`epmq.recipe.Recipe`), so what `epmq reproduce` does can be done by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from epmq.errors import InputError, MissingError
from epmq.files import read_yaml
from epmq.merge_settings import Merge
from epmq.models.checkpoint import INDEX, SINGLE, resolve
from epmq.quantize_settings import Quantize, quantize_settings
from epmq.recipe import REGRESSION, Data, Expert, Recipe, Sections, explain
from epmq.reproduce.zeroshot import check_template
from epmq.storage_settings import Strict

# Methods of rows in full precision.
FULL_PRECISION = ("base", "experts", "none")
SECTIONS: Sections = {"merges": (Merge, 2), "methods": (Quantize, 2)}
# Where the published tables lie.
RECIPES = Path(__file__).parent / "recipes"
# Folder of the data sets in a mirror of the Hub.
DATASETS = "datasets"


class LmEvalTask(Strict):
    """A task of lm-eval."""

    metric: str = Field(description="what is taken from its results, as lm-eval names it, such as 'acc,none'")
    dataset: str = Field(description="Hub id of its data")


class Task(Strict):
    """One task: its data, and what its head is made from."""

    data: Data = Field(description="dataset, configuration and columns, without a split")
    calibration: str = Field("train", description="split to calibrate on")
    evaluation: str | None = Field("test", description="split to score on; null where lm-eval does")
    classes: list[str] | None = Field(None, min_length=2, description="names, in the order of the labels")
    templates: list[str] | None = Field(None, min_length=1, description="texts with {} in the place of a class's name")
    lm_eval: dict[str, LmEvalTask] | None = Field(None, min_length=1, description="tasks of lm-eval, for their mean")

    @model_validator(mode="after")
    def _fits(self) -> Task:
        if self.data.split is not None or self.data.samples is not None:
            raise InputError("data: split and samples are the table's to say")
        if (self.classes is None) != (self.templates is None):
            raise InputError("classes, templates: a head from the text tower needs both")
        if (self.evaluation is None) == (self.lm_eval is None):
            raise InputError("evaluation, lm_eval: a task is scored on a split or by lm-eval")
        return self

    @field_validator("templates")
    @classmethod
    def _templates(cls, value: list[str] | None) -> list[str] | None:
        return value and [check_template(template) for template in value]


class Published(Strict):
    """A figure that somebody published."""

    merge: str | None = Field(None, description="name of a merge; none for base and experts")
    method: str = Field(description="base, experts, none (a merge in full precision) or a quantizer, as rows are named")
    bits: int | None = None
    mean: float = Field(description="mean score over the tasks, 0 to 100")
    scores: dict[str, float] = Field({}, description="by task, 0 to 100")
    source: str = Field(description="where it stands")

    @model_validator(mode="after")
    def _fits(self) -> Published:
        if (self.bits is None) != (self.method in FULL_PRECISION):
            raise InputError("bits: a quantizer's figure has them, and no other")
        if (self.merge is None) != (self.method in ("base", "experts")):
            raise InputError("merge: base and experts have none, and every other figure has one")
        return self

    @property
    def row(self) -> Row:
        """The row that the figure is held against."""
        return Row(self.merge, self.method, self.bits)


class Shape(Strict):
    """The architecture of a published model, so that a plan can be made before it is fetched."""

    model: str = Field(description="class in transformers")
    config: dict[str, Any] = Field(description="what its config.json says")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="of the weights on the Hub")
    tokens: int | None = Field(None, gt=0, description="of a calibration text, about; none for images")
    targets: int = Field(0, ge=0, description="of a target text, about")


class Table(Strict):
    """One published table."""

    title: str
    base: str = Field(description="Hub id")
    pickle: str | None = Field(
        None, description="a pickle with the base's weights, opened as tensors only, where it has no safetensors"
    )
    experts: str | dict[str, str] = Field(description="Hub ids: a pattern with {task}, or task → id")
    tasks: dict[str, Task] = Field(min_length=1)
    merges: dict[str, Merge] = Field(min_length=1, description="name → merge")
    methods: dict[str, dict[str, Any]] = Field(min_length=1, description="name → quantizer's settings, without bits")
    bits: list[int] = Field([4], min_length=1, description="in the order in which they are run")
    group_size: int = -1
    samples: int = Field(128, gt=0, description="calibration examples a task")
    batch_size: int = Field(32, gt=0)
    max_length: int | None = Field(None, gt=0)
    seed: int = 0
    published: list[Published] = Field([], description="figures to set ours against")
    shapes: dict[Literal["base", "expert"], Shape] = Field(description="of the base, and of an expert where it differs")

    @model_validator(mode="after")
    def _fits(self) -> Table:
        if isinstance(self.experts, str) and "{task}" not in self.experts:
            raise InputError("experts: has no {task}, the place of a task's name")
        if isinstance(self.experts, dict) and set(self.experts) != set(self.tasks):
            raise InputError(f"experts: needs exactly the tasks {', '.join(self.tasks)}")
        if "base" not in self.shapes:
            raise InputError("shapes: the base's is missing")
        if len({task.lm_eval is None for task in self.tasks.values()}) > 1:
            raise InputError("tasks: either all are scored by lm-eval or none")
        cells = {(row.merge, row.method) for row in self.rows()}
        for bits, (name, settings) in product(self.bits, self.methods.items()):
            try:
                quantize_settings(**settings, bits=bits, group_size=self.group_size)
            except TypeError as error:
                raise InputError(f"methods.{name}: {error}") from None
            except ValidationError as error:
                first = error.errors()[0]
                first["loc"] = ("methods", name, *first["loc"])
                raise InputError(explain(first, SECTIONS)) from None
        for figure in self.published:
            if unknown := [task for task in figure.scores if task not in self.tasks]:
                raise InputError(f"published: a score for {unknown[0]!r}, which is no task")
            if figure.bits is not None and (figure.merge, figure.method) not in cells:
                raise InputError(f"published: no row is {figure.merge}, {figure.method}")
        return self

    @property
    def by_lm_eval(self) -> bool:
        """Whether lm-eval scores the tasks."""
        return any(task.lm_eval is not None for task in self.tasks.values())

    def expert(self, task: str) -> str:
        """Hub id of a task's expert."""
        return self.experts.format(task=task) if isinstance(self.experts, str) else self.experts[task]

    def rows(self) -> list[Row]:
        """All rows: base, experts, merges in full precision, then the grid, by bits.

        A merge on calibration data goes with some quantizers only.
        """
        rows = [Row(None, "base", None), Row(None, "experts", None)]
        rows += [Row(merge, "none", None) for merge in self.merges]
        pairs = [
            (merge, method)
            for (merge, settings), (method, quantize) in product(self.merges.items(), self.methods.items())
            if quantize["method"] in REGRESSION.get(settings.method, (quantize["method"],))
        ]
        return rows + [Row(*pair, bits) for bits in self.bits for pair in pairs]


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        merge: name of a merge; None for base and experts.
        method: `base`, `experts`, `none` (the merge in full precision) or name of a quantizer.
        bits: None where nothing is quantized.
    """

    merge: str | None
    method: str
    bits: int | None

    @property
    def name(self) -> str:
        """Such as `ties-gptq-4`; fit for a file's name."""
        parts = [self.merge, None if self.merge and self.method == "none" else self.method, self.bits]
        return "-".join(str(part).replace(" ", "") for part in parts if part is not None)


@dataclass(frozen=True)
class RunOptions:
    """Which rows of a table are run, on how much data, and where.

    Attributes:
        merges, methods, bits: only these rows of the grid; all where there are none.
        limit: at most so many examples a task, to calibrate on and to score.
        hub: a mirror of the Hub: a folder with models as `owner/name` and data sets as `datasets/owner/name`; what is
            not there is fetched.
        device: as in a recipe.
    """

    merges: Sequence[str] = ()
    methods: Sequence[str] = ()
    bits: Sequence[int] = ()
    limit: int | None = None
    hub: Path | None = None
    device: str = "auto"

    def rows(self, table: Table) -> list[Row]:
        """The rows to run: base and experts always, a merge in full precision where any of its rows is run.

        Raises:
            ValueError: a name is none of the table's.
        """
        for field, names, known in (
            ("merge", self.merges, list(table.merges)),
            ("method", self.methods, list(table.methods)),
            ("bits", self.bits, table.bits),
        ):
            if unknown := [name for name in names if name not in known]:
                raise InputError(f"{field}: the table has no {unknown[0]}; it has {', '.join(map(str, known))}")
        merges, methods, bits = self.merges or table.merges, self.methods or table.methods, self.bits or table.bits

        def asked(row: Row) -> bool:
            return row.merge in (None, *merges) and (row.bits is None or (row.method in methods and row.bits in bits))

        return [row for row in table.rows() if asked(row)]


def table_names() -> list[str]:
    """The tables that `epmq reproduce` knows by name."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def load_table(name: str | Path) -> Table:
    """Read a table: one that comes with epmq, by its name, or a YAML file.

    `tasks` may be a list of names, which are then looked up in the YAML file that `task_file` gives.

    Raises:
        FileNotFoundError: there is no such table; the ones there are are named.
        ValueError: not a table; every offending field is named, with what it should be.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise MissingError(f"{name}: no such table; there are {', '.join(table_names())}, or give a .yaml file")
    content = read_yaml(path, "a table")
    tasks, task_file = content.get("tasks"), content.pop("task_file", None)
    if task_file is not None:
        known = read_yaml(path.parent / str(task_file), "a file of tasks")
        if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
            raise InputError(f"{path}: tasks must be a list of names out of {task_file}")
        if missing := [task for task in tasks if task not in known]:
            raise InputError(f"{path}: tasks: {', '.join(missing)} not in {task_file}")
        content["tasks"] = {task: known[task] for task in tasks}
    try:
        return Table.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: " + "; ".join(explain(one, SECTIONS) for one in error.errors())) from None


def locate(hub_id: str, hub: Path | None, subfolder: str = "") -> str:
    """A Hub id as a folder of a mirror (see `RunOptions`) where it is there, in `subfolder` of it; else the id."""
    path = None if hub is None else hub.expanduser() / subfolder / hub_id
    return str(path) if path is not None and path.exists() else hub_id


def base_source(table: Table, hub: Path | None) -> str:
    """The base as a recipe names it: its folder or id, or the pickle in it where there are no safetensors.

    Raises:
        FileNotFoundError: it is nowhere.
    """
    source = locate(table.base, hub)
    folder = resolve(source)
    whole = table.pickle is None or (folder / SINGLE).exists() or (folder / INDEX).exists()
    return source if whole else f"{source}/{table.pickle}"


def row_recipe(
    table: Table, row: Row, base: str, heads: Mapping[str, Path], options: RunOptions, output: Path | None = None
) -> Recipe:
    """The recipe of a row of a table; base and experts take any merge, which plays no part in them.

    Args:
        base: see `base_source`.
        heads: task → head file.
        options: how much data, from where, and the device.
        output: where the checkpoint goes.
    """
    experts = []
    for name, task in table.tasks.items():
        data = task.data.model_copy(update={"dataset": locate(str(task.data.dataset), options.hub, DATASETS)})
        evaluation = data.model_copy(update={"split": task.evaluation, "samples": options.limit})
        experts.append(
            Expert(
                name=name,
                model=locate(table.expert(name), options.hub),
                head=str(heads[name]) if name in heads else None,
                calibration=data.model_copy(update={"split": task.calibration, "metric": None}),
                evaluation=evaluation if task.evaluation else None,
            )
        )
    quantize: dict[str, Any] = {"method": "none"}
    if row.bits is not None:
        quantize = {**table.methods[row.method], "bits": row.bits, "group_size": table.group_size}
    return Recipe(
        base=base,
        experts=experts,
        merge=table.merges[row.merge] if row.merge else next(iter(table.merges.values())),
        quantize=quantize_settings(**quantize),
        samples=min(table.samples, options.limit or table.samples),
        batch_size=table.batch_size,
        max_length=table.max_length,
        device=options.device,
        seed=table.seed,
        output=None if output is None else str(output),
    )
