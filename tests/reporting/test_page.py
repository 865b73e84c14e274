import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import recipe_for
from svg import parts

from epmq.files import write_json
from epmq.pipeline import run as pipeline
from epmq.pipeline.evaluation import gap_recovered
from epmq.reporting.page import (
    Run,
    Scores,
    by_block,
    gap,
    labels,
    page,
    read_experts,
    read_runs,
    reference,
    run_of,
    write_page,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def made(method: str, mean: float, bits: int | None = 4, merge: str = "task_arithmetic", **fields) -> Run:
    """A run without a report."""
    group, symmetric = (None, None) if bits is None else (-1, True)
    scores = {"one": mean - 0.1, "two": mean + 0.1}
    return Run("run", merge, method, bits, group, symmetric, "accuracy", scores, mean, 1000 * (bits or 32), **fields)


RUNS = [made("none", 0.6, None), made("gptq", 0.5), made("expert_guided", 0.7), made("gptq", 0.4, 2)]
EXPERTS = Scores({"one": 0.8, "two": 1.0}, 0.9)


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
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for method, bits in (("none", 4), ("gptq", 4), ("expert_guided", 4), ("gptq", 3), ("expert_guided", 3)):
        name = f"{method}-{bits}"
        grid = {} if method == "none" else {"bits": bits}
        found[name] = folder / name
        recipe = recipe_for(pool, quantize={"method": method, **grid}, output=str(found[name]))
        pipeline.run(recipe, progress=False)
    return found


def figures(text: str) -> dict[str, list]:
    """Marks by the title of their figure."""
    found = re.findall(r"<figure>(<svg.*?</svg>)<figcaption><b>(.*?)\.</b>", text, re.DOTALL)
    return {title: parts(svg, "mark") for svg, title in found}


def test_the_gap_is_taken_from_gptq_on_the_same_grid():
    assert reference(RUNS[2], RUNS, "gptq") is RUNS[1]
    assert reference(RUNS[2], RUNS, "none") is RUNS[0]
    assert gap(RUNS[2], RUNS, EXPERTS) == pytest.approx(gap_recovered(0.7, 0.5, 0.9))
    assert gap(RUNS[2], RUNS, None) is None
    assert gap(made("expert_guided", 0.7, merge="ties"), RUNS, EXPERTS) is None


def test_names_tell_runs_apart():
    assert labels(RUNS) == ["merged", "GPTQ, 4 bits", "expert-guided, 4 bits", "GPTQ, 2 bits"]
    assert labels([made("gptq", 0.5), made("gptq", 0.6, merge="ties")]) == ["task_arithmetic, GPTQ", "ties, GPTQ"]
    assert len(set(labels([made("gptq", 0.5), Run(**{**vars(made("gptq", 0.6)), "name": "other"})]))) == 2


def test_the_summary_compares():
    text = page(RUNS, experts=EXPERTS, published={("task_arithmetic", "expert_guided", 4): 0.65})
    [row] = re.findall(r'<tr class="own">(.*?)</tr>', text)
    cells = re.findall("<td>(.*?)</td>", row)
    assert cells[:4] == ["expert-guided, 4 bits", "70.0 %", "50 %", "+20.0"]
    assert "+10.0" in cells and "65.0 %" in cells and "+5.0" in cells  # to the merged model; published; to it


def test_a_page_of_real_runs_has_every_picture(outputs, tmp_path):
    runs, _ = read_runs(outputs.values())
    write_page(tmp_path / "report.html", runs, experts=EXPERTS)
    text = (tmp_path / "report.html").read_text()
    assert Reader(text).fetched == [] and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    found = figures(text)
    assert set(found) == {
        "Accuracy by task and method",
        "Gap recovered by bits",
        "Size against score",
        *(f"Loss by depth: {name}" for name in labels(runs) if name != "merged"),
    }
    assert all(found.values())
    assert len(found["Gap recovered by bits"]) == 2
    assert len(found["Accuracy by task and method"]) == 2 * 6  # five runs and the experts


def test_every_run_writes_its_page(outputs):
    text = (outputs["expert_guided-4"] / "report.html").read_text()
    assert set(figures(text)) == {"Accuracy by task and method", "Loss by depth"}
    assert "Not shown for want of data" in text
    report = json.loads((outputs["expert_guided-4"] / "report.json").read_text())
    for note in report["notes"]:
        assert note[:40] in text


def test_losses_are_summed_by_block(outputs):
    report = json.loads((outputs["expert_guided-4"] / "report.json").read_text())
    blocks = by_block(report["layers"])
    assert [name for name, *_ in blocks] == ["encoder.layer.0", "encoder.layer.1"]
    assert sum(lost for *_, lost in blocks) == pytest.approx(report["loss"])


def test_text_of_users_is_text():
    report = {"notes": ["<script>alert(1)</script>"]}
    run = Run(**{**vars(made("gptq", 0.5)), "scores": {"<b>&": 0.5}, "report": report | _about()})
    text = page([run], title="<i>")
    assert "<script" not in text and "<b>&" not in text and "<i>" not in text
    Reader(text)


def _about() -> dict:
    recipe = {"base": "b", "experts": [], "merge": {"method": "ties"}, "quantize": {}}
    return {"date": "", "versions": {}, "hardware": {}, "seconds": {}, "peak_memory_mb": 1.0, "recipe": recipe}


def test_nothing_scored_is_said(pool, tmp_path):
    recipe = recipe_for(pool, quantize={"method": "rtn"}, output=str(tmp_path / "out"))
    report = pipeline.run(recipe, progress=False, evaluate=False)
    text = page([run_of(report)])
    assert "Nothing was scored" in text
    Reader(text)


def test_what_is_no_report_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "report.json"))):
        read_runs([tmp_path])
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_runs([tmp_path])
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="not a report of epmq"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="no experts' scores"):
        read_experts(tmp_path / "report.json")


def test_experts_are_read_from_what_eval_prints(tmp_path):
    write_json(tmp_path / "e.json", {"out": {}, "experts": {"scores": {"one": 0.8}, "mean_score": 0.8}})
    assert read_experts(tmp_path / "e.json") == Scores({"one": 0.8}, 0.8)


@pytest.mark.parametrize("suite", ["text8", "causal3"])
def test_results_of_the_benchmarks_make_pages(suite):
    results = Path(__file__).parents[2] / "benchmarks" / "results" / f"{suite}.json"
    runs, experts = read_runs([results])
    rows = json.loads(results.read_text())
    wanted = [row["gap_recovered"] for row in rows if row["merge"] not in ("base", "experts")]
    found = [gap(run, runs, experts) for run in runs]
    assert [value for value in found if value is not None] == pytest.approx([v for v in wanted if v is not None])
    Reader(page(runs, experts=experts))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install it to see the page in a browser")
def test_a_browser_shows_it(outputs, tmp_path):
    runs, _ = read_runs(outputs.values())
    write_page(tmp_path / "report.html", runs, experts=EXPERTS)
    # What the page looks like to the browser goes into its title, where --dump-dom shows it.
    probe = (
        "<script>addEventListener('load',()=>{let s=[...document.querySelectorAll('svg')].map(g=>[...g."
        "querySelectorAll('.mark')].filter(m=>{let b=m.getBoundingClientRect();return b.width>1&&b.height>1&&"
        "b.left>=0&&b.right<=innerWidth}).length);document.title='marks '+s.join(' ')+' wide '+"
        "(document.documentElement.scrollWidth<=innerWidth)+' fetched '+"
        "performance.getEntriesByType('resource').length})"
        "</script>"
    )
    text = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").write_text(text.replace("</head>", f"{probe}</head>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    where = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900", "--dump-dom"]
    command = [CHROMIUM, *flags, *where, f"file://{tmp_path / 'report.html'}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in shown.stderr
    found = re.search(r"<title>marks ([\d ]+) wide (\w+) fetched (\d+)", shown.stdout)
    assert found is not None
    assert [int(count) for count in found[1].split()] == [len(marks) for marks in figures(text).values()]
    assert found[2] == "true" and found[3] == "0"
