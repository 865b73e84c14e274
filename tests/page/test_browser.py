"""Pages of tiny models, opened from the disk in Chromium without a network: they answer what `epmq.load` answers."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXTS, perturbed, recipe_for, tiny_dinov2
from kit.browser import Browser, browser, find_browser
from PIL import Image
from transformers import BitImageProcessorPil, Dinov2Model

import epmq
from epmq.errors import EnvironmentFault
from epmq.models.heads import HEAD_FILE, Head, save_head
from epmq.page.vendored import ONNXRUNTIME, TOKENIZERS

pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow
ANSWERS = "Object.fromEntries([...document.querySelectorAll('.task')].map((task) => " + (
    "[task.querySelector('h2').textContent, task.querySelector('.answer').textContent]))"
)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A tab; skips where Chromium, npm or node is missing, or npm has no registry."""
    for name, found in {"chromium": find_browser(), "npm": shutil.which("npm"), "node": shutil.which("node")}.items():
        if found is None:
            pytest.skip(f"{name} is not installed")
    try:
        ONNXRUNTIME.fetch(), TOKENIZERS.fetch()
    except EnvironmentFault as error:
        pytest.skip(str(error).splitlines()[0])
    with browser(tmp_path_factory.mktemp("browser")) as one:
        yield one


def opened(tab: Browser, checkpoint: Path) -> Path:
    """Write the page of a checkpoint, and open it; nothing but its own files is asked for."""
    page = Path(epmq.page_checkpoint(checkpoint, progress=False)["page"])
    tab.problems.clear()
    tab.requests.clear()
    tab.open(page.as_uri())
    state = tab.wait("document.documentElement?.dataset.state")
    assert state == "ready", tab.run("document.body.innerText")
    assert all(url.startswith(page.parent.as_uri()) for url in tab.requests)
    return page


def answers(tab: Browser, ask: str | Path) -> dict[str, str]:
    """Task → answer to a text, or to a file with a picture."""
    tab.run("say('')")
    if isinstance(ask, Path):
        tab.choose_file("#picture", ask)
    else:
        tab.run(f"element('text').value = {json.dumps(ask)}; element('text').dispatchEvent(new Event('input'))")
    assert "cannot" not in tab.wait("element('status').textContent")
    return dict(tab.run(ANSWERS))


def expected(checkpoint: Path, inputs: list[Any]) -> list[dict[str, Any]]:
    """Task → answer, input by input, in Python."""
    found = epmq.load(checkpoint).answer_all(inputs, max_length=32)
    return [{task: found[task][i] for task in found} for i in range(len(inputs))]


def test_a_page_answers_texts(tab, pool, tmp_path):
    out = tmp_path / "out"
    epmq.run(recipe_for(pool, quantize={"method": "rtn"}, output=str(out)), progress=False, evaluate=False)
    texts = [*TEXTS, "Über the CAT, on a big, big tree. " * 30]
    opened(tab, out)
    assert tab.run(ANSWERS) == {"one": "–", "two": "–"}
    assert [answers(tab, text) for text in texts] == expected(out, texts)
    assert "32 tokens" in tab.run("element('status').textContent")
    several = "{answers: 'labels', labels: ['a', 'b', 'c']}"
    assert tab.run(f"answerOf({several}, [0.5, -1, 2])") == "a, c" and tab.run(f"answerOf({several}, [-1])") == "none"
    assert tab.run("answerOf({answers: 'number', labels: []}, [3.14159])") == "3.142"
    assert tab.problems == []


def test_a_page_answers_pictures(tab, tmp_path):
    torch.manual_seed(0)
    processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    tiny_dinov2().save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    names = ["shapes", "colors"]
    for seed, name in enumerate(names):
        perturbed(Dinov2Model.from_pretrained(tmp_path / "base"), seed).save_pretrained(tmp_path / name)
        save_head(Head(torch.randn(12, 64), torch.zeros(12), "cls", True), tmp_path / name / HEAD_FILE)
    experts = [{"name": name, "model": str(tmp_path / name)} for name in names]
    recipe = {"base": str(tmp_path / "base"), "experts": experts, "quantize": {"method": "rtn"}}
    epmq.run({**recipe, "output": str(tmp_path / "out")}, progress=False, evaluate=False)
    pictures = [picture(tmp_path / f"{i}.png", i) for i in range(4)]
    opened(tab, tmp_path / "out")
    wanted = [{task: f"class {label}" for task, label in one.items()} for one in expected(tmp_path / "out", pictures)]
    assert [answers(tab, file) for file in pictures] == wanted
    assert "and 4 more" in tab.run("document.body.innerText")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    tab.choose_file("#picture", tmp_path / "broken.png")
    tab.wait("element('status').textContent.startsWith('This cannot be answered')")
    assert tab.problems == []


def picture(file: Path, seed: int) -> Path:
    """A file with a picture of a few colors."""
    noise = np.random.default_rng(seed)
    small = Image.fromarray(noise.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    small.resize((70 + seed, 50), Image.Resampling.BICUBIC).save(file)
    return file
