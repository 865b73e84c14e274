import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import recipe_for
from made_runs import EXPERTS, RUNS, made
from svg import figure_marks

from epmq.pipeline import run as pipeline
from epmq.reporting.page import render_page
from epmq.reporting.runs import Run, labels, read_runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


# What a recipe said of storage before there was more to say.
GRID = ("method", "bits", "group_size", "symmetric")


class Reader(HTMLParser):
    """Checks that tags close, and notes what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "line", "br"):
            self.open.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href") and value != "data:,"]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def outputs(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Outputs of real runs on the tiny pool, by method."""
    folder, outputs = tmp_path_factory.mktemp("runs"), {}
    for method, bits in (("none", 4), ("gptq", 4), ("expert_guided", 4), ("gptq", 3), ("expert_guided", 3)):
        name = f"{method}-{bits}"
        grid = {} if method == "none" else {"bits": bits}
        outputs[name] = folder / name
        recipe = recipe_for(pool, quantize={"method": method, **grid}, output=str(outputs[name]))
        pipeline.run(recipe, progress=False)
    return outputs


def test_the_summary_compares():
    text = render_page(RUNS, experts=EXPERTS, published={("task_arithmetic", "expert_guided", 4): 0.65})
    [row] = re.findall(r'<tr class="own">(.*?)</tr>', text)
    cells = re.findall("<td>(.*?)</td>", row)
    assert cells[:4] == ["expert-guided, 4 bits", "70.0 %", "50 %", "+20.0"]
    assert "+10.0" in cells and "65.0 %" in cells and "+5.0" in cells  # to the merged model; published; to it


def test_a_page_of_real_runs_has_every_picture(outputs):
    runs, _ = read_runs(outputs.values())
    text = render_page(runs, experts=EXPERTS)
    assert Reader(text).fetched == [] and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    figures = figure_marks(text)
    assert set(figures) == {
        "Accuracy by task and method",
        "Gap recovered by bits",
        "Size against score",
        *(f"Loss by depth: {name}" for name in labels(runs) if name != "merged"),
    }
    assert all(figures.values())
    assert len(figures["Gap recovered by bits"]) == 2
    assert len(figures["Accuracy by task and method"]) == 2 * 6  # five runs and the experts


def test_every_run_writes_its_page(outputs):
    text = (outputs["expert_guided-4"] / "report.html").read_text()
    assert set(figure_marks(text)) == {"Accuracy by task and method", "Loss by depth"}
    assert "Not shown for want of data" in text
    report = json.loads((outputs["expert_guided-4"] / "report.json").read_text())
    for note in report["notes"]:
        assert note[:40] in text


def test_text_of_users_is_text():
    report = {"notes": ["<script>alert(1)</script>"]}
    run = Run(**{**vars(made("gptq", 0.5)), "scores": {"<b>&": 0.5}, "report": report | _about()})
    text = render_page([run], title="<i>")
    assert "<script" not in text and "<b>&" not in text and "<i>" not in text
    assert "&quot;b&quot; &amp; &#x27;c&#x27;: merged by" in text
    Reader(text)


def _about() -> dict:
    recipe = {"base": "\"b\" & 'c'", "experts": [], "merge": {"method": "ties"}, "quantize": {}}
    return {"date": "", "versions": {}, "hardware": {}, "seconds": {}, "peak_memory_mb": 1.0, "recipe": recipe}


def test_nothing_scored_is_said(pool, tmp_path):
    recipe = recipe_for(pool, quantize={"method": "rtn"}, output=str(tmp_path / "out"))
    report = pipeline.run(recipe, progress=False, evaluate=False)
    text = render_page([Run.from_report(report)])
    assert "Nothing was scored" in text
    Reader(text)


def test_reports_of_older_versions_are_shown(outputs):
    report = json.loads((outputs["gptq-4"] / "report.json").read_text())
    size = f"{report['bytes'] / 1e6:.1f} MB"
    text = render_page([Run.from_report(report)])
    assert f"{size}, {report['bits_per_weight']:.2f} bits a weight" in text and "<th>bits a weight</th>" in text
    assert "scale_dtype" not in text and "&quot;act_order&quot;" in text  # storage that is the default is not listed
    for field in ("parameters", "bits_per_weight"):
        del report[field]
    for layer in report["layers"]:
        del layer["bits"], layer["group_size"], layer["symmetric"]
    report["recipe"]["quantize"] = {name: report["recipe"]["quantize"][name] for name in GRID}
    text = render_page([Run.from_report(report)])
    assert size in text and "bits a weight" not in text
    Reader(text)


@pytest.mark.parametrize("suite", ["text8", "causal3"])
def test_results_of_the_benchmarks_make_pages(suite):
    runs, experts = read_runs([Path(__file__).parents[2] / "benchmarks" / "results" / f"{suite}.json"])
    Reader(render_page(runs, experts=experts))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install it to see the page in a browser")
def test_a_browser_shows_it(outputs, tmp_path):
    runs, _ = read_runs(outputs.values())
    text = render_page(runs, experts=EXPERTS)
    # What the page looks like to the browser goes into its title, where --dump-dom shows it.
    probe = (
        "<script>addEventListener('load',()=>{let s=[...document.querySelectorAll('svg')].map(g=>[...g."
        "querySelectorAll('.mark')].filter(m=>{let b=m.getBoundingClientRect();return b.width>1&&b.height>1&&"
        "b.left>=0&&b.right<=innerWidth}).length);document.title='marks '+s.join(' ')+' wide '+"
        "(document.documentElement.scrollWidth<=innerWidth)+' fetched '+"
        "performance.getEntriesByType('resource').length})"
        "</script>"
    )
    (tmp_path / "report.html").write_text(text.replace("</head>", f"{probe}</head>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    where = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900", "--dump-dom"]
    command = [CHROMIUM, *flags, *where, f"file://{tmp_path / 'report.html'}"]
    browser = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in browser.stderr
    found = re.search(r"<title>marks ([\d ]+) wide (\w+) fetched (\d+)", browser.stdout)
    assert found is not None
    assert [int(count) for count in found[1].split()] == [len(marks) for marks in figure_marks(text).values()]
    assert found[2] == "true" and found[3] == "0"
