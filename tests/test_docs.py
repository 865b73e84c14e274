"""The examples in the docs run: Python, `epmq` commands and recipes, on small models in the places the pages name."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import write_texts

from epmq.cli import main
from epmq.recipe import Data
from epmq.recipe_file import load_recipe

DOCS = Path(__file__).parent.parent / "docs"
# Pages whose examples are run, one after the other, in one folder and one namespace a page.
RUN = ("getting-started.md", "choosing.md", "extending.md", "report.md", "recipes.md")
TASKS = {"sentiment": "one", "topic": "two"}


def examples(page: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block that names a language."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as the pages say, and the current one."""
    shutil.copytree(pool / "base", tmp_path / "models" / "base")
    for seed, (task, name) in enumerate(TASKS.items()):
        shutil.copytree(pool / "experts" / name, tmp_path / "models" / task)
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        write_texts(folder / "train.jsonl", 24, 3, seed)
        write_texts(folder / "test.jsonl", 24, 3, seed + 10)
    recipe = next(content for language, content in examples("getting-started.md") if language == "yaml")
    (tmp_path / "my.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", RUN)
def test_examples_run(page, place, monkeypatch, capsys):
    space: dict[str, object] = {}
    found = examples(page)
    assert found
    for language, content in found:
        if language == "python":
            exec(compile(content, page, "exec"), space)
        elif language == "yaml":
            load_recipe(yaml.safe_load(content))
        elif language == "sh":
            for line in content.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "epmq", line
                monkeypatch.setattr(sys, "argv", ["epmq", *arguments])
                with pytest.raises(SystemExit) as end:
                    main()
                assert not end.value.code, capsys.readouterr().err
        else:
            raise AssertionError(f"{page}: a block of {language} that nothing runs")


def test_forms_of_data_are_valid():
    [content] = [content for language, content in examples("inputs.md") if language == "yaml"]
    for line in content.splitlines():
        Data(**yaml.safe_load(line)["calibration"])


def test_links_lead_somewhere():
    pages = [*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "benchmarks" / "README.md"]
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_page_is_found_from_the_readme():
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert f"docs/{page.name}" in text, page.name
