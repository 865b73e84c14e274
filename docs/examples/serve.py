"""All tasks of a model behind one address: MODEL=merged-4bit-onnx uvicorn serve:app"""

import json
import os
from pathlib import Path
from typing import Any

import onnxruntime
from fastapi import FastAPI
from transformers import AutoTokenizer

folder = Path(os.environ["MODEL"])  # what `epmq export merged-4bit --to onnx` wrote
tasks = json.loads((folder / "onnx" / "tasks.json").read_text(encoding="utf-8"))
session = onnxruntime.InferenceSession(next(folder.glob("onnx/model_q?.onnx")))
tokenizer = AutoTokenizer.from_pretrained(folder)
app = FastAPI()


@app.post("/")
def answer(texts: list[str]) -> list[dict[str, Any]]:
    """For each text: task → its answer, and the scores of its classes."""
    encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
    outputs = session.run(list(tasks), {one.name: encoded[one.name] for one in session.get_inputs()})
    return [{task: say(tasks[task], row[i].tolist()) for task, row in zip(tasks, outputs)} for i in range(len(texts))]


def say(task: dict[str, Any], scores: list[float]) -> dict[str, Any]:
    """An answer by name where names are known: the best class, all classes above zero, or a number as it is."""
    names = task["labels"] or list(range(len(scores)))
    best = names[scores.index(max(scores))] if task["answers"] == "class" else scores
    chosen = [name for name, score in zip(names, scores) if score > 0] if task["answers"] == "labels" else best
    return {"answer": chosen, "scores": scores}
