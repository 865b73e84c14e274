"""Commands that the pages name are there, with and without the folder."""

import re
from importlib.util import find_spec

import pytest

from benchmarks import RESULTS, ROOT

PAGES = [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")]
COMMANDS = sorted({name for page in PAGES for name in re.findall(r"python -m (benchmarks[\w.]*\w)", page.read_text())})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_found_with_and_without_its_folder(command):
    for name in (command, f"benchmarks.{command.rpartition('.')[2]}"):
        spec = find_spec(name)
        assert spec is not None, name
        assert not spec.submodule_search_locations or find_spec(f"{name}.__main__") is not None, name


def test_results_lie_beside_the_code():
    assert (RESULTS / "text8.json").is_file()
