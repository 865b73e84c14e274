import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import recipe_for
from typer.testing import CliRunner

import epmq
from epmq.cli import app, main
from epmq.errors import InputError
from epmq.pipeline.evaluation import evaluate_checkpoint, evaluate_experts
from epmq.recipe_file import load_recipe

COMMANDS = [
    "run",
    "merge",
    "quantize",
    "eval",
    "compare",
    "export",
    "page",
    "inspect",
    "report",
    "init",
    "demo",
    "reproduce",
]
ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "200",
    "_TYPER_FORCE_DISABLE_TERMINAL": "1",
}


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the program in this process: arguments in, (exit status, standard output, standard error) out."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)  # what main() sets must not outlive the test

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["epmq", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        found = capsys.readouterr()
        # The bars of transformers: in a process of its own, the environment turns them off before they are imported.
        lines = [line for line in found.err.splitlines(keepends=True) if "%|" not in line]
        return status, found.out, "".join(lines).lstrip("\r")

    return run


@pytest.fixture
def recipe(pool: Path, tmp_path: Path) -> Path:
    """A recipe file over the pool."""
    return written(tmp_path / "recipe.yaml", recipe_for(pool, output=str(tmp_path / "out")))


@pytest.fixture(scope="module")
def finished(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `recipe.yaml`, and `out`, which that recipe made."""
    folder = tmp_path_factory.mktemp("finished")
    epmq.run(recipe_for(pool, output=str(folder / "out"), samples=8), progress=False)
    written(folder / "recipe.yaml", recipe_for(pool))
    return folder


def written(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def python(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **settings)


# --- help and start-up -------------------------------------------------------------------------------------------


def test_help_lists_the_commands(call):
    for arguments in (["--help"], []):
        status, out, err = call(*arguments)
        assert status == (0 if arguments else 2) and all(command in out + err for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_is_explained(call, command):
    status, out, _ = call(command, "--help")
    assert status == 0 and f"epmq {command}" in out
    (name,) = [name for name in app.registered_commands if (name.name or name.callback.__name__) == command]
    assert name.callback.__doc__.splitlines()[0][:40] in out
    options = [line for line in out.splitlines() if "--" in line and "│" in line]
    assert options and all(len(line.strip("│ ").split("  ")) > 1 for line in options)
    examples = [line.strip() for line in out.split("Examples")[1].splitlines() if line.strip()]
    assert len(examples) == 3 and all(line.startswith(f"epmq {command}") for line in examples)


def test_the_version_is_told(call):
    assert call("--version") == (0, f"epmq {epmq.__version__}\n", "")


def test_shells_can_complete_commands(call):
    out = call("--help")[1]
    assert "--install-completion" in out and "--show-completion" in out


def test_exit_codes_are_explained(call):
    assert "Exit codes: 0 done, 1 what you can mend (one line says what), 2 wrong usage, 3 a bug" in call("--help")[1]


def test_help_answers_at_once():
    best = min(_timed_help() for _ in range(3))
    assert best < 1.0


def _timed_help() -> float:
    """Seconds of processor time: those on the wall are the machine's affair."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = python("-m", "epmq.cli", "--help")
    assert found.returncode == 0 and "Usage" in found.stdout
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime


def test_importing_costs_nothing():
    heavy = ("torch", "transformers", "numpy", "safetensors", "pydantic", "rich")
    code = f"import sys, epmq; print([name for name in {heavy} if name in sys.modules], epmq.__version__)"
    found = python("-c", code, check=True)
    assert found.stdout.split() == ["[]", epmq.__version__]


def test_every_public_name_can_be_imported():
    for name in epmq.__all__:
        assert callable(getattr(epmq, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        epmq.nothing  # noqa: B018


# --- init --------------------------------------------------------------------------------------------------------


def test_init_writes_a_recipe_of_defaults(call, tmp_path):
    path = tmp_path / "my.yaml"
    status, out, _ = call("init", path)
    assert status == 0 and "my.yaml" in out
    recipe, text = load_recipe(path), path.read_text()
    content = yaml.safe_load(text)
    least = load_recipe({name: content[name] for name in ("base", "experts", "output")})
    assert recipe.model_dump() == least.model_dump()

    status, _, err = call("init", path)
    assert status == 1 and err == f"epmq: {path} exists already\n" and path.read_text() == text


# --- the work ----------------------------------------------------------------------------------------------------


def test_run_does_the_whole_job(call, recipe, tmp_path):
    status, out, err = call("run", recipe, "--quiet")
    report = report_of(tmp_path / "out")
    assert status == 0 and err == ""
    for text in ("one", "two", "mean", f"{100 * report['mean_score']:.1f} %", "expert_guided", "4 bits, a row"):
        assert text in out
    assert epmq.load(tmp_path / "out").tasks == ["one", "two"]


def test_progress_goes_to_standard_error(call, recipe):
    status, out, err = call("run", recipe)
    assert status == 0 and "evaluate" in err and "evaluate" not in out


def test_merge_only_merges(call, recipe, tmp_path):
    assert call("merge", recipe, "-q", "--output", tmp_path / "merged")[0] == 0
    report = report_of(tmp_path / "merged")
    assert report["layers"] == [] and "scores" not in report and not (tmp_path / "out").exists()


def test_merge_needs_no_calibration_data(call, pool, tmp_path):
    content = recipe_for(pool, output=str(tmp_path / "out"))
    for expert in content["experts"]:
        del expert["calibration"]
    status, _, err = call("merge", written(tmp_path / "recipe.yaml", content), "-q")
    assert (status, err) == (0, "")


def test_quantize_does_not_evaluate(call, recipe, tmp_path):
    assert call("quantize", recipe, "-q")[0] == 0
    report = report_of(tmp_path / "out")
    assert report["layers"] and "scores" not in report


def test_eval_measures_a_checkpoint(call, finished):
    out, recipe = finished / "out", finished / "recipe.yaml"
    scores = evaluate_checkpoint(out, recipe, progress=False)
    status, found, _ = call("eval", out, recipe, "-q")
    assert status == 0 and f"{100 * scores['mean_score']:.1f} %" in found
    status, found, _ = call("eval", out, recipe, "-q", "--json", "--experts")
    assert status == 0
    assert json.loads(found) == {str(out): scores, "experts": evaluate_experts(recipe, progress=False)}


def test_inspect_shows_what_is_there(call, finished, pool):
    status, found, _ = call("inspect", finished / "out")
    assert status == 0
    for text in ("BertModel", "4 bits, symmetric", "one, two", "task_arithmetic", "expert_guided", "mean accuracy"):
        assert text in found
    assert "encoder.layer.1.output.dense" not in found
    status, found, _ = call("inspect", finished / "out", "--layers")
    assert status == 0
    assert all(layer["name"] in found for layer in report_of(finished / "out")["layers"])
    status, found, _ = call("inspect", pool / "base")
    assert status == 0 and "not packed" in found and "no heads" in found


# --- --set -------------------------------------------------------------------------------------------------------


def test_set_overrides_the_recipe(call, recipe, tmp_path):
    changes = [
        "quantize.bits=3",
        "quantize.symmetric=false",
        "merge.method=task_arithmetic",
        "merge.scaling=[0.1, 0.2]",
        "samples=4",
        "seed=7",
    ]
    arguments = [part for change in changes for part in ("--set", change)]
    status, _, err = call("quantize", recipe, "-q", *arguments, "-s", f"output={tmp_path / 'elsewhere'}")
    assert (status, err) == (0, "")
    used = report_of(tmp_path / "elsewhere")["recipe"]
    assert (used["quantize"]["bits"], used["quantize"]["symmetric"]) == (3, False)
    assert (used["merge"]["scaling"], used["samples"], used["seed"]) == ([0.1, 0.2], 4, 7)
    assert not (tmp_path / "out").exists()


def test_set_can_choose_a_method_that_needs_less(call, pool, tmp_path):
    """A recipe without calibration data is good for a method that needs none."""
    content = recipe_for(pool, output=str(tmp_path / "out"))
    for expert in content["experts"]:
        del expert["calibration"]
    status, _, err = call("quantize", written(tmp_path / "recipe.yaml", content), "-q", "-s", "quantize.method=rtn")
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("quantize.bits", "expected FIELD=VALUE"),
        ("quantize.bits=5", "quantize.bits: 5 is not one of 2, 3, 4, 8, 16"),
        ("quantise.bits=4", "unknown field 'quantise'"),
        ("quantize.bit=4", "unknown field 'quantize.bit'"),
        ("bits=4", "unknown field 'bits'"),
        ("quantize.grids.bits=4", "unknown field 'quantize.grids'"),
        ("quantize=4", "quantize: "),
        ("=4", "unknown field ''"),
        ("quantize.bits=[", "--set quantize.bits=[: not a YAML value"),
        ("merge.scaling={a", "--set merge.scaling={a: not a YAML value"),
        ("experts=[]", "experts: "),
    ],
)
def test_a_wrong_override_is_one_line(call, recipe, tmp_path, change, message):
    status, out, err = call("run", recipe, "-q", "--set", change)
    assert (status, out) == (1, "") and not (tmp_path / "out").exists()
    assert err.startswith("epmq: ") and message in err and err.count("\n") == 1


# --- errors ------------------------------------------------------------------------------------------------------


def test_errors_are_one_line_on_standard_error(call, pool, finished, tmp_path):
    good = written(tmp_path / "good.yaml", recipe_for(pool, output=str(finished / "out")))
    lost = written(tmp_path / "lost.yaml", recipe_for(pool, base="/nowhere/model", output=str(tmp_path / "out")))
    homeless = written(tmp_path / "homeless.yaml", recipe_for(pool))
    third = recipe_for(pool)
    third["experts"][0]["name"] = "three"
    third = written(tmp_path / "third.yaml", third)
    (tmp_path / "broken.yaml").write_text("base: [\nexperts:\n  - x: {\n")
    (tmp_path / "empty").mkdir()
    cases = [
        (["run", tmp_path / "none.yaml"], "none.yaml: no such recipe file"),
        (["run", tmp_path / "broken.yaml"], "broken.yaml: not valid YAML"),
        (["run", good, "-q"], "out exists already"),
        (["run", lost, "-q"], "/nowhere/model: no such directory"),
        (["run", homeless, "-q"], "field 'output' is missing (or pass --output)"),
        (["merge", homeless, "-q"], "field 'output' is missing (or pass --output)"),
        (["inspect", tmp_path / "none"], "none: no such directory"),
        (["inspect", tmp_path / "empty"], "config.json: missing"),
        (["eval", tmp_path / "none", homeless, "-q"], "none: no such directory"),
        (["eval", finished / "out", third, "-q"], "no task 'three'; there are: one, two"),
    ]
    for arguments, message in cases:
        status, out, err = call(*arguments)
        assert (status, out) == (1, ""), arguments
        assert err.startswith("epmq: ") and message in err and err.count("\n") == 1, (arguments, err)


def test_a_broken_report_is_named(call, finished, tmp_path):
    shutil.copytree(finished / "out", tmp_path / "out")
    (tmp_path / "out" / "report.json").write_text("{")
    status, _, err = call("inspect", tmp_path / "out")
    assert status == 1 and "report.json: not valid JSON" in err and err.count("\n") == 1


def test_wrong_usage_is_explained(call, recipe):
    for arguments in (["run"], ["run", recipe, "--bits", "4"], ["walk"]):
        status, out, err = call(*arguments)
        assert status == 2 and out == "" and "Usage: " in err and "--help" in err


def test_an_interrupt_leaves_nothing_and_says_so(call, recipe, tmp_path, monkeypatch):
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("epmq.pipeline.run.write_quantized", interrupt)
    before = sorted(os.listdir(tmp_path))
    status, _, err = call("run", recipe, "-q")
    assert status == 130 and err.startswith("epmq: stopped; no output was written; the same command goes on")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_traceback_can_be_asked_for(call, monkeypatch, tmp_path):
    monkeypatch.setenv("EPMQ_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        call("run", tmp_path / "none.yaml")


@pytest.mark.parametrize("error", [ValueError("not ours"), KeyError("x"), RuntimeError("odd"), AssertionError()])
def test_a_bug_shows_its_traceback_and_asks_for_a_report(call, recipe, monkeypatch, error):
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("epmq.pipeline.run.write_quantized", fail)
    status, _, err = call("run", recipe, "-q")
    assert status == 3 and err.startswith("Traceback (most recent call last)") and type(error).__name__ in err
    assert err.splitlines()[-1].startswith(f"epmq: this is a bug of epmq {epmq.__version__}; please report it")


@pytest.mark.parametrize(
    "error", [InputError("a field"), OSError(28, "No space left on device"), PermissionError("no")]
)
def test_what_a_user_can_mend_is_one_line(call, recipe, monkeypatch, error):
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("epmq.pipeline.run.write_quantized", fail)
    status, _, err = call("run", recipe, "-q")
    assert status == 1 and err.startswith(f"epmq: {error}") and err.count("\n") == 1


def test_the_program_as_a_process(pool, tmp_path):
    """Once for real: an error, its exit status, and nothing on standard output."""
    path = written(tmp_path / "recipe.yaml", recipe_for(pool, output=str(tmp_path / "out"), quantize={"bits": 5}))
    found = python("-m", "epmq.cli", "run", str(path))
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == f"epmq: {path}: quantize.bits: 5 is not one of 2, 3, 4, 8, 16\n"


def test_the_runner_of_typer_works_too(finished):
    result = CliRunner().invoke(app, ["inspect", str(finished / "out")])
    assert result.exit_code == 0 and "BertModel" in result.output


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_is_said_with_what_helps(call, recipe, tmp_path, monkeypatch, error):
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("epmq.pipeline.run.write_quantized", fail)
    status, _, err = call("run", recipe, "-q")
    assert status == 1 and "memory" in err and "activations: disk" in err
