"""A GGUF file tried in llama.cpp, in a process of its own: where a file is wrong, llama.cpp ends its process."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq.files import read_json
from epmq.models.loading import load_model

# Sequences and places in each at which the next token is looked at, and tokens of a sequence.
SEQUENCES, PLACES, LENGTH = 8, 4, 64
# Of the next token, so many of the likeliest are compared; the others count as one.
LIKELIEST = 256
# llama.cpp rounds the inputs of every layer to 8 bits in groups of 32, where `epmq.load` keeps float32. Of SmolLM2 with
# 135 million weights that moves the next token's log-probabilities by a few hundredths to tenths of what they differ
# among each other; rows in the wrong order, a norm or a scale forgotten move them by all of it.
LARGEST_ERROR, LARGEST_KL, LEAST_COSINE = 0.3, 0.1, 0.98
SECONDS = 1800


def compare_next_tokens(path: Path, source: Path, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Hold the next token's distribution in llama.cpp against that of `epmq.load`.

    Returns:
        runtime, examples, positions, top1 (share of positions where the likeliest token is the same), kl (mean
        Kullback–Leibler divergence in nats), error (of the log-probabilities, over their spread).

    Raises:
        RuntimeError: llama.cpp cannot open the file, or kl or error is beyond `LARGEST_KL`, `LARGEST_ERROR`.
    """
    sequences = list(_sequences(examples))
    model = load_model(source, read_json(source / "config.json"))
    prompts, ours = list[list[int]](), list[Tensor]()
    for ids in sequences:
        with torch.no_grad():
            scores = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        places = sorted({max(1, len(ids) * part // PLACES) for part in range(1, PLACES + 1)})
        prompts += [ids[:place].tolist() for place in places]
        ours += [scores[place - 1] for place in places]
    found = run(path, "next", prompts, likeliest=min(LIKELIEST, len(ours[0])))
    same, divergences, errors = 0, list[float](), list[float]()
    for scores, answer in zip(ours, found):
        ids, theirs = torch.tensor(answer["ids"]), torch.tensor(answer["logprobs"], dtype=torch.float64)
        mine = scores[ids]
        same += int(scores.argmax()) == answer["ids"][0]
        divergences.append(_divergence(mine, theirs))
        errors.append(float((mine - theirs).std() / mine.std().clamp(min=1e-9)))
    measured = {
        **_runtime(),
        "examples": len(sequences),
        "positions": len(ours),
        "top1": same / len(ours),
        "kl": sum(divergences) / len(ours),
        "error": sum(errors) / len(ours),
    }
    if not (measured["kl"] <= LARGEST_KL and measured["error"] <= LARGEST_ERROR):  # nor NaN
        raise RuntimeError(f"{path}: llama.cpp gives other next tokens than epmq.load: {_words(measured)}")
    return measured


def compare_embeddings(path: Path, source: Path, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Hold the mean features of an encoder's tokens in llama.cpp against those of `epmq.load`.

    Returns:
        runtime, examples, cosine (the least of all sequences).

    Raises:
        RuntimeError: llama.cpp cannot open the file, or a cosine is below `LEAST_COSINE`.
    """
    sequences = list(_sequences(examples))
    model = load_model(source, read_json(source / "config.json"))
    model = getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        ours = [model(input_ids=ids[None]).last_hidden_state[0].mean(0) for ids in sequences]
    found = run(path, "embedding", [ids.tolist() for ids in sequences])
    cosines = [torch.cosine_similarity(mine, torch.tensor(theirs), dim=0) for mine, theirs in zip(ours, found)]
    measured = {**_runtime(), "examples": len(sequences), "cosine": float(torch.stack(cosines).min())}
    if not measured["cosine"] >= LEAST_COSINE:
        raise RuntimeError(f"{path}: llama.cpp gives other features than epmq.load: {_words(measured)}")
    return measured


def try_loading(path: Path) -> dict[str, Any]:
    """Open a file in llama.cpp, whose Python interface runs no encoder–decoders: it finds all tensors, or raises."""
    run(path, "open", [])
    return {**_runtime(), "examples": 0}


def run(path: Path, what: str, prompts: list[list[int]], **settings: Any) -> list[Any]:
    """What llama.cpp gives for prompts, in another process.

    Args:
        what: `next` gives ids and logprobs of the likeliest next tokens, `embedding` the mean features, `open` nothing.
        prompts: tokens.

    Raises:
        RuntimeError: it has ended without an answer; its last words are said.
    """
    with tempfile.TemporaryDirectory(prefix="epmq-gguf-") as folder:
        task, answers = Path(folder, "task.json"), Path(folder, "answers.json")
        task.write_text(json.dumps({"path": str(path), "what": what, "prompts": prompts, **settings}))
        command = [sys.executable, "-m", __name__, str(task), str(answers)]
        ended = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
        if not answers.exists():
            lines = [line for line in ended.stderr.decode(errors="replace").splitlines() if line.strip()]
            faults = [line for line in lines if "error" in line.lower() or "failed" in line.lower()] or lines
            raise RuntimeError(f"{path}: llama.cpp cannot run it ({'; '.join(faults[:3])})")
        found: list[Any] = read_json(answers)["answers"]
        return found


def _sequences(examples: Sequence[dict[str, Any]]) -> Iterator[Tensor]:
    """The first few token sequences of batches, without padding."""
    count = 0
    for batch in examples:
        masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        for ids, mask in zip(batch["input_ids"], masks):
            if count < SEQUENCES and mask.any():
                count += 1
                yield ids[mask.bool()][:LENGTH].cpu()


def _divergence(mine: Tensor, theirs: Tensor) -> float:
    """KL(ours ‖ theirs) in nats of log-probabilities of some tokens; the others count as one."""
    pairs = [(mine.exp(), theirs.exp())]
    rest = tuple((1 - part.sum()).clamp(min=1e-12) for part in pairs[0])
    total = (mine.exp() * (mine - theirs)).sum() + rest[0] * (rest[0] / rest[1]).log()
    return max(0.0, float(total))


def _runtime() -> dict[str, Any]:
    return {"runtime": f"llama.cpp (xllamacpp {version('xllamacpp')})"}


def _words(measured: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in measured.items() if isinstance(value, float))


def _serve(task: dict[str, Any]) -> list[Any]:
    """The answers to a task, by llama.cpp in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = task["path"]
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 2 * LENGTH, 1, False, False
    params.n_batch = params.n_ubatch = 2 * LENGTH
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    if task["what"] == "embedding":
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server, answers = xllamacpp.Server(params), list[Any]()
    for prompt in task["prompts"]:
        if task["what"] == "embedding":
            found = server.handle_embeddings({"input": [prompt]})
            answers.append(found["data"][0]["embedding"])
            continue
        wanted = {"prompt": prompt, "n_predict": 1, "n_probs": task["likeliest"], "temperature": 0.0}
        found = server.handle_completions({**wanted, "stream": False})
        likeliest = found["completion_probabilities"][0]["top_logprobs"]
        answers.append({"ids": [one["id"] for one in likeliest], "logprobs": [one["logprob"] for one in likeliest]})
    return answers


if __name__ == "__main__":
    given, wanted = map(Path, sys.argv[1:])
    wanted.write_text(json.dumps({"answers": _serve(json.loads(given.read_text()))}))
