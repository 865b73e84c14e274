"""The examples in the docs run: Python, `epmq` commands and recipes, on small models in the places the pages name."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import write_texts

import epmq
from epmq.cli import main
from epmq.recipe import Data
from epmq.recipe_file import load_recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Pages whose examples are run, one after the other, in one folder and one namespace a page.
RUN = ("getting-started.md", "choosing.md", "extending.md", "report.md", "recipes.md")
SLOW = {"recipes.md": pytest.mark.rare}
TASKS = {"sentiment": "one", "topic": "two"}


def examples(page: str, language: str = r"\w+") -> list[tuple[str, str]]:
    """(language, content) of each fenced block that names a language."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```({language})\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


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


@pytest.mark.parametrize("page", [pytest.param(page, marks=SLOW.get(page, ())) for page in RUN])
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
        (data,) = yaml.safe_load(line).values()
        Data(**data)


def test_links_lead_somewhere():
    pages = [*DOCS.glob("*.md"), *ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"]
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_page_is_found_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert f"docs/{page.name}" in text or page.name == "index.md", page.name


def test_every_page_is_in_the_sites_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert f": {page.name}\n" in nav, page.name


def test_the_picture_of_the_layout_is_the_tree():
    picture = examples("architecture.md", "text")[0][1].splitlines()
    named: set[str] = set()
    folder = ""
    for line in picture[1:]:
        if line.startswith("    "):
            named |= {f"{folder}{name}" for name in re.findall(r"\w+\.py\b", line)}
        else:
            [name] = re.findall(r"^  (\w+(?:/|\.py))", line)
            folder = name if name.endswith("/") else folder
            named |= {name} - {folder}
    package = ROOT / "src" / "epmq"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert named == modules


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {epmq.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^]]*)\]", changelog, re.MULTILINE)
    assert "## [Unreleased]" in changelog and released[:1] in ([], [epmq.__version__])
