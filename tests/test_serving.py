"""`docs/examples/serve.py` answers over HTTP what `epmq.load` answers."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from conftest import TEXTS, recipe_for

import epmq

for name in ("fastapi", "uvicorn", "onnxruntime", "onnxscript"):
    pytest.importorskip(name)
EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.mark.slow
def test_the_server_of_the_docs_answers_all_tasks(pool, tmp_path):
    out, export = tmp_path / "out", tmp_path / "out-onnx"
    epmq.run(recipe_for(pool, quantize={"method": "rtn"}, output=str(out)), progress=False, evaluate=False)
    epmq.export_checkpoint(out, "onnx", export, progress=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "serve:app", "--port", str(port), "--log-level", "error"]
    server = subprocess.Popen(command, cwd=EXAMPLES, env={**os.environ, "MODEL": str(export)})
    try:
        found = ask(f"http://127.0.0.1:{port}/", TEXTS)
    finally:
        server.terminate()
        server.wait(30)
    model = epmq.load(out)
    answers, scores = model.answer_all(TEXTS), model.scores(TEXTS)
    for i, one in enumerate(found):
        assert {task: content["answer"] for task, content in one.items()} == {
            task: answers[task][i] for task in answers
        }
        for task, content in one.items():
            assert content["scores"] == pytest.approx(scores[task][i].tolist(), abs=1e-4)


def ask(url: str, texts: list[str]) -> list[dict[str, dict]]:
    """What a server answers, as soon as it listens."""
    request = Request(url, json.dumps(texts).encode(), {"Content-Type": "application/json"})
    end = time.monotonic() + 60
    while True:
        try:
            with urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except URLError:
            assert time.monotonic() < end
            time.sleep(0.1)
