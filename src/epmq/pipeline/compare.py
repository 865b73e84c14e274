"""Base, experts, the merge and all quantizers on one recipe, side by side: what each of them would have given."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from epmq.errors import EpmqError, InputError, OutputExistsError
from epmq.files import differences, read_json, write_json
from epmq.merging.compatibility import open_experts
from epmq.merging.experts import ExpertSet
from epmq.models.checkpoint import (
    Checkpoint,
    TensorSpec,
    bits_per_weight,
    byte_size,
    count_parameters,
    model_files,
)
from epmq.pipeline.evaluation import evaluate_experts
from epmq.pipeline.run import run
from epmq.quantize_settings import Gptq, Quantize, QuantizeSettings, RoundToNearest, Unquantized
from epmq.recipe import Recipe
from epmq.recipe_file import load_recipe
from epmq.reporting.comparison import Measured, measured
from epmq.reporting.page import render_page
from epmq.reporting.report import PAGE, REPORT
from epmq.reporting.runs import METHOD_TITLES, WITH_HEADS, Run, Scores, method_title
from epmq.storage_settings import PLAIN

RESULTS = "compare.json"
BASE, EXPERTS = "base", "experts"
# Endings of the files with an adapter's weights.
WEIGHTS = (".safetensors", ".bin")
# Fields of a recipe that say nothing of what is compared.
UNUSED = {"output", "formats", "activations", "device"}


def compare_methods(
    recipe: str | Path | dict[str, Any] | Recipe, output: str | Path, *, progress: bool = True
) -> dict[str, Any]:
    """Measure base and experts, and run the recipe with every method, in one folder.

    Args:
        recipe: names calibration and evaluation data; its own method is compared with the others under its settings of
            what is stored how.
        output: a folder for a checkpoint a method, `compare.json` and `report.html`. One that an earlier call with the
            same recipe has left is gone on with: what is finished is kept.
        progress: show progress bars.

    Returns:
        `columns`: name → scores, bytes and bits a weight; `settings`: what all have in common, in words; `notes`;
        `recipe`. As in `compare.json`.

    Raises:
        MissingError, OutputExistsError, InputError: before any compute, with the field or file at fault.
    """
    recipe, output = load_recipe(recipe), Path(output)
    _check(recipe)
    experts = open_experts(recipe.base, recipe.experts, recipe.tokenizer, recipe.config)
    methods, notes = methods_of(recipe, any(one.has_head for one in experts.experts.values()))
    content = _begun(recipe, output)
    content["notes"] = notes
    columns: dict[str, Measured] = content["columns"]
    for name in (BASE, EXPERTS):
        if name not in columns:
            columns |= _measured_whole(name, recipe, experts, progress, notes)
            write_json(output / RESULTS, content)
    runs = []
    for name, quantize in methods.items():
        folder = output / name.replace(" ", "-").lower()
        if not (folder / REPORT).exists():
            update: dict[str, Any] = {"quantize": quantize, "output": str(folder), "formats": []}
            run(recipe.model_copy(update=update), progress=progress)
        report = read_json(folder / REPORT)
        columns[name] = measured(report)
        runs.append(Run.from_report(report))
        content["settings"] = f"{runs[-1].weights} where quantized, {runs[-1].merge}"
        write_json(output / RESULTS, content)
    scores = Scores(columns[EXPERTS]["scores"], columns[EXPERTS]["mean_score"])
    (output / PAGE).write_text(render_page(runs, experts=scores), encoding="utf-8")
    return content


def methods_of(recipe: Recipe, heads: bool) -> tuple[dict[str, Quantize], list[str]]:
    """The methods that are compared, by name, the recipe's own last, and notes on what is left out.

    Args:
        recipe: its method's settings of storage are those of all.
        heads: whether there are heads that may follow the model.
    """
    own, notes = recipe.quantize, list[str]()
    limited = own.budget is not None or own.size is not None
    unrefined: dict[str, Any] = {"refine": "off"}
    found: dict[str, Quantize] = {METHOD_TITLES["none"]: Unquantized()}
    if limited:
        notes.append("RTN is left out: it has no data on which bits could be chosen under a limit of size")
    else:
        found[METHOD_TITLES["rtn"]] = RoundToNearest(**{**_shared(own, RoundToNearest), "drop_unused": False})
    found[METHOD_TITLES["gptq"]] = Gptq(**{**_shared(own, Gptq), **unrefined, "adapt_heads": False})
    if heads:
        found[METHOD_TITLES["gptq"] + WITH_HEADS] = Gptq(**{**_shared(own, Gptq), **unrefined, "adapt_heads": True})
    if own.method != "none" and own not in found.values():
        found[method_title(own.model_dump())] = own
    return found, notes


def _shared(own: Quantize, method: type[QuantizeSettings]) -> dict[str, Any]:
    """The settings that a method takes from the recipe's: what is stored how, and all of them if it is the same."""
    names = method.model_fields if isinstance(own, method) else QuantizeSettings.model_fields
    return {name: getattr(own, name) for name in names if name != "method" and name in own.model_fields_set}


def _check(recipe: Recipe) -> None:
    """Check what all runs need, before the first of them."""
    if all(expert.evaluation is None for expert in recipe.experts):
        raise InputError("recipe: no expert has evaluation data, without which nothing can be compared")
    for expert in recipe.experts:
        if expert.calibration is None:
            raise InputError(f"experts.{expert.name}.calibration: gptq, which is compared, needs calibration data")
    if recipe.quantize.bits == PLAIN:
        raise InputError(f"quantize.bits: {PLAIN} rounds nothing, so there are no methods to compare")


def _begun(recipe: Recipe, output: Path) -> dict[str, Any]:
    """What an earlier call with the same recipe has left in a folder, or the beginning of a new comparison."""
    plain = recipe.model_dump(mode="json", exclude=UNUSED)
    new = {"recipe": plain, "settings": "", "columns": {}, "notes": []}
    if output.exists() and not (output / RESULTS).exists():
        raise OutputExistsError(f"{output} exists and is not from an earlier comparison: choose another --output")
    content = read_json(output / RESULTS) if output.exists() else new
    if not content.get("columns"):
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / RESULTS, new)
        return new
    changed = next(differences(content.get("recipe"), plain), None)
    if changed is not None:
        raise InputError(f"{output} is a comparison of another recipe ({changed}): choose another --output")
    return content


def _measured_whole(
    name: str, recipe: Recipe, experts: ExpertSet, progress: bool, notes: list[str]
) -> dict[str, Measured]:
    """The scores and the size of the base under the experts' heads, or of all experts, each on its own task, by name.

    Where the heads do not fit the base a note says so, and there is nothing.
    """
    size, bits = _sizes(experts, name)
    try:
        scores = evaluate_experts(recipe, base=name == BASE, progress=progress)
    except (EpmqError, RuntimeError) as error:
        if name == EXPERTS:
            raise
        notes.append(f"the base is left out, as it cannot be scored under the experts' heads ({error})")
        return {}
    return {name: measured(scores, bytes=size, bits_per_weight=bits)}


def _sizes(experts: ExpertSet, name: str) -> tuple[int, float | None]:
    """Bytes of all weights of the base, or of the experts, and bits a weight of one of them.

    Adapters are shipped with the base.
    """
    specs = list(_specs(experts.base.checkpoint))
    base = sum(map(byte_size, specs))
    bits = bits_per_weight(base, count_parameters(specs))
    if name == BASE:
        return base, bits
    size = 0
    for expert in experts.experts.values():
        if expert.adapter is None:
            size += sum(map(byte_size, _specs(expert.checkpoint)))
        else:
            size += sum(file.stat().st_size for file in model_files(expert.path) if file.suffix in WEIGHTS)
    return size + base * any(expert.adapter is not None for expert in experts.experts.values()), bits


def _specs(checkpoint: Checkpoint) -> Iterator[TensorSpec]:
    """Dtype and shape of all tensors."""
    return (checkpoint.spec(name) for name in checkpoint.names)
