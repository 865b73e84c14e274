"""A hook of mkdocs: pages of the site that lie outside docs/ or are made from the code."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "epmq"
OUTSIDE = ("benchmarks/README.md", "benchmarks/suites/README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def _modules() -> list[str]:
    """The packages and modules right under epmq: a page of the reference each."""
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("_")}
    return sorted(packages | modules)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the reference's pages at the end of the navigation."""
    [*_, last] = config.nav or []
    last["Python"] += [{f"epmq.{name}": f"api/{name}.md"} for name in _modules()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and the reference: mkdocstrings fills it from the docstrings."""
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    whole = "# epmq\n\n::: epmq\n    options:\n      show_submodules: false\n"
    pages = {"epmq": whole, **{name: f"# epmq.{name}\n\n::: epmq.{name}\n" for name in _modules()}}
    for name, text in pages.items():
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between docs/ and its neighbours, as they are in the repository, become links within the site."""
    if page.file.src_uri in OUTSIDE:
        up = "../" * page.file.src_uri.count("/")
        return re.sub(rf"\]\({re.escape(up)}docs/", f"]({up}", markdown)
    return markdown.replace("](../", "](")
