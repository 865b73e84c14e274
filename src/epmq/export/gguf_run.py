"""A GGUF file tried in llama.cpp, in a process of its own: where a file is wrong, llama.cpp ends its process."""

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from epmq.data.processors import load_processor, tokenizer_of
from epmq.files import read_json, write_json
from epmq.models.blocks import linears
from epmq.models.loading import load_model

# Sequences and places in each at which the next token is looked at, and tokens of a sequence.
SEQUENCES, PLACES, LENGTH = 8, 4, 64
GROUP = 32
# Of the next token, so many of the likeliest are compared; the others count as one.
LIKELIEST = 256
# llama.cpp rounds the inputs of every layer to 8 bits in groups of 32, where `epmq.load` keeps them: how far that moves
# a model's log-probabilities is measured in PyTorch. Beyond this many times as far, and what float16 in attention and
# another GELU may add, something else is wrong: rows in another order, a norm or a scale forgotten.
TIMES, LEAST_ERROR, LEAST_COSINE = 2.0, 0.02, 0.98
# Share of texts; llama.cpp differs from other tokenizers at rare characters.
LEAST_TEXTS = 0.5
SECONDS = 1800
# What the server ends with at an encoder–decoder, when it has loaded it.
ENCODES_FIRST = "llama_encode must be called first"


def compare_next_tokens(
    path: Path, source: Path, examples: Sequence[dict[str, Any]], length: int = LENGTH
) -> dict[str, Any]:
    """Hold the next token's distribution in llama.cpp against that of `epmq.load`, on sequences of some length.

    Returns:
        runtime, examples, texts (share of their texts that llama.cpp cuts into the same tokens), positions, top1 (share
        of positions where the likeliest token is the same), kl (mean Kullback–Leibler divergence in nats), error (of
        the log-probabilities, over their spread), expected (the error that inputs rounded to 8 bits make).

    Raises:
        RuntimeError: llama.cpp cannot open the file, or error or texts are beyond their bounds.
    """
    sequences = list(_sequences(examples, length))
    if not sequences:
        return try_loading(path)
    model = load_model(source, read_json(source / "config.json"))
    prompts = [ids[:place] for ids in sequences for place in _places(len(ids))]
    ours = _next_tokens(model, sequences)
    with _rounded_inputs(model):
        rounded = _next_tokens(model, sequences)
    texts = Texts(source, sequences)
    likeliest = min(LIKELIEST, len(ours[0]))
    found, tokens = run(
        path, "next", [ids.tolist() for ids in prompts], texts.texts, likeliest=likeliest, letter=texts.letter
    )
    same, divergences, errors, expected = 0, list[float](), list[float](), list[float]()
    for scores, other, answer in zip(ours, rounded, found):
        ids, theirs = torch.tensor(answer["ids"]), torch.tensor(answer["logprobs"], dtype=torch.float64)
        mine = scores[ids]
        same += int(scores.argmax()) == answer["ids"][0]
        divergences.append(_divergence(mine, theirs))
        errors.append(_error(mine, theirs))
        expected.append(_error(mine, other[ids]))
    measured = {
        **_runtime(),
        "examples": len(sequences),
        "texts": texts.share(tokens),
        "positions": len(ours),
        "top1": same / len(ours),
        "kl": sum(divergences) / len(ours),
        "error": sum(errors) / len(ours),
        "expected": sum(expected) / len(ours),
    }
    if not measured["error"] <= TIMES * measured["expected"] + LEAST_ERROR:  # nor NaN
        raise RuntimeError(f"{path}: llama.cpp gives other next tokens than epmq.load: {_words(measured)}")
    return _with_right_texts(path, measured)


def _places(length: int) -> list[int]:
    """Numbers of tokens after which the next one is looked at."""
    return sorted({max(1, length * part // PLACES) for part in range(1, PLACES + 1)})


@torch.no_grad()
def _next_tokens(model: Any, sequences: Sequence[Tensor]) -> list[Tensor]:
    """Log-probabilities of the next token [vocabulary] float64, at the places of all sequences."""
    found = list[Tensor]()
    for ids in sequences:
        scores = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        found += [scores[place - 1] for place in _places(len(ids))]
    return found


@contextmanager
def _rounded_inputs(model: nn.Module) -> Iterator[None]:
    """Round the inputs of all linear layers to 8 bits in groups of 32, as ggml's Q8_0 does."""

    def round_to_8_bits(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if inputs[0].shape[-1] % GROUP:
            return inputs
        groups = inputs[0].unflatten(-1, (-1, GROUP))
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return ((groups / scale).round() * scale).flatten(-2), *inputs[1:]

    with ExitStack() as stack:
        for _, layer in linears(model):
            stack.callback(layer.register_forward_pre_hook(round_to_8_bits).remove)
        yield


def _error(mine: Tensor, theirs: Tensor) -> float:
    """The spread of the difference of log-probabilities, over the spread of ours."""
    return float((mine - theirs).std() / mine.std().clamp(min=1e-9))


def compare_embeddings(
    path: Path, source: Path, examples: Sequence[dict[str, Any]], length: int = LENGTH
) -> dict[str, Any]:
    """Hold the mean features of an encoder's tokens in llama.cpp against those of `epmq.load`.

    Returns:
        runtime, examples, texts (as `compare_next_tokens`), cosine (the least of all sequences).

    Raises:
        RuntimeError: llama.cpp cannot open the file, or a cosine or texts are below their bounds.
    """
    sequences = list(_sequences(examples, length))
    if not sequences:
        return try_loading(path)
    model = load_model(source, read_json(source / "config.json"))
    model = getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        ours = [model(input_ids=ids[None]).last_hidden_state[0].mean(0) for ids in sequences]
    texts = Texts(source, sequences)
    found, tokens = run(path, "embedding", [ids.tolist() for ids in sequences], texts.texts)
    cosines = [torch.cosine_similarity(mine, torch.tensor(theirs), dim=0) for mine, theirs in zip(ours, found)]
    least = float(torch.stack(cosines).min())
    measured = {**_runtime(), "examples": len(sequences), "texts": texts.share(tokens), "cosine": least}
    if not least >= LEAST_COSINE:
        raise RuntimeError(f"{path}: llama.cpp gives other features than epmq.load: {_words(measured)}")
    return _with_right_texts(path, measured)


class Texts:
    """The texts of sequences, as their tokenizer cuts them into tokens again.

    Args:
        source: directory of the tokenizer; without one there are no texts.
        sequences: tokens.

    Attributes:
        texts: one a sequence.
        letter: a token that is a text for itself.
    """

    def __init__(self, source: Path, sequences: Sequence[Tensor]) -> None:
        tokenizer = tokenizer_of(load_processor(source))
        known = sequences if tokenizer is not None else []
        self.texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in known]
        self._tokens = [tokenizer(text)["input_ids"] for text in self.texts]
        self.letter = next((i for i in range(len(tokenizer)) if _is_text(tokenizer, i)), 0) if known else 0

    def share(self, tokens: list[list[int]]) -> float | None:
        """The share of texts that were cut into the same tokens; None if there are no texts."""
        same = sum(mine == theirs for mine, theirs in zip(self._tokens, tokens))
        return same / len(self.texts) if self.texts else None


def _is_text(tokenizer: Any, token: int) -> bool:
    """Whether a token alone is a text of letters, and nothing special."""
    text: str = tokenizer.decode([token]).strip()
    return text.isascii() and text.isalpha() and token not in tokenizer.all_special_ids


def _with_right_texts(path: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """What was measured, unless most texts are cut into other tokens."""
    if measured["texts"] is not None and measured["texts"] < LEAST_TEXTS:
        raise RuntimeError(f"{path}: llama.cpp cuts texts into other tokens than epmq.load: {_words(measured)}")
    return measured


def log_perplexity(path: Path, sequences: Sequence[Tensor]) -> float:
    """Mean negative log-likelihood, in nats, that llama.cpp gives the tokens of sequences after their first.

    Raises:
        RuntimeError: llama.cpp cannot open the file.
    """
    found, _ = run(path, "given", [ids.tolist() for ids in sequences])
    values = torch.tensor([value for answer in found for value in answer], dtype=torch.float64)
    return -float(values.mean())


def try_loading(path: Path) -> dict[str, Any]:
    """Open a file that llama.cpp's server cannot run, as an encoder–decoder or a decoder without a tokenizer.

    Raises:
        RuntimeError: llama.cpp does not find all tensors in the file, or one has another shape.
    """
    try:
        run(path, "open", [])
    except RuntimeError as error:
        if ENCODES_FIRST not in str(error):
            raise
    return {**_runtime(), "examples": 0}


def run(
    path: Path, what: str, prompts: list[list[int]], texts: Sequence[str] = (), **settings: Any
) -> tuple[list[Any], list[list[int]]]:
    """What llama.cpp gives for prompts, and the tokens that it cuts texts into; in another process.

    Args:
        what: `next` gives ids and logprobs of the likeliest next tokens, `given` the logprobs of a prompt's own tokens
            but the first, `embedding` the mean features, `open` nothing.
        prompts: tokens.

    Raises:
        RuntimeError: it has ended without an answer; its last words are said.
    """
    with tempfile.TemporaryDirectory(prefix="epmq-gguf-") as folder:
        task, answers = Path(folder, "task.json"), Path(folder, "answers.json")
        write_json(task, {"path": str(path), "what": what, "prompts": prompts, "texts": list(texts), **settings})
        command = [sys.executable, "-m", __name__, str(task), str(answers)]
        ended = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
        if not answers.exists():
            lines = [line for line in ended.stderr.decode(errors="replace").splitlines() if line.strip()]
            faults = [line for line in lines if "error" in line.lower() or "failed" in line.lower()] or lines
            raise RuntimeError(f"{path}: llama.cpp cannot run it ({'; '.join(faults[:3])})")
        found = read_json(answers)
        return found["answers"], found["tokens"]


def _sequences(examples: Sequence[dict[str, Any]], length: int) -> Iterator[Tensor]:
    """The first few token sequences of batches, without padding, cut to a length."""
    count = 0
    for batch in examples:
        masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        for ids, mask in zip(batch["input_ids"], masks):
            if count < SEQUENCES and mask.any():
                count += 1
                yield ids[mask.bool()][:length].cpu()


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


def _serve(task: dict[str, Any], place: Path) -> NoReturn:
    """Write the answers to a task, by llama.cpp in this process, which ends here.

    To take the server down in order has been seen to wait for ever.
    """
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
            answers.append(server.handle_embeddings({"input": [prompt]})["data"][0]["embedding"])
        elif task["what"] == "given":
            pairs = [(prompt[:place], prompt[place]) for place in range(1, len(prompt))]
            answers.append([_next_token(server, start, token, 1)["logprob"] for start, token in pairs])
        else:
            # It answers no end of a text and no part of a letter.
            likeliest = _next_token(server, prompt, task["letter"], task["likeliest"])["top_logprobs"]
            answers.append({"ids": [one["id"] for one in likeliest], "logprobs": [one["logprob"] for one in likeliest]})
    tokens = [_tokens(server.listening_address, text) for text in task["texts"]]
    write_json(place, {"answers": answers, "tokens": tokens})
    os._exit(0)


def _next_token(server: Any, prompt: list[int], token: int, likeliest: int) -> dict[str, Any]:
    """What a server says of a token after a prompt: it is made to choose that one, which changes no probability."""
    wanted = {"prompt": prompt, "n_predict": 1, "n_probs": likeliest, "temperature": 0.0, "stream": False}
    wanted |= {"logit_bias": [[token, 1e6]], "cache_prompt": likeliest == 1}  # a text's next prompt is one token longer
    found: dict[str, Any] = server.handle_completions(wanted)["choices"][0]["logprobs"]["content"][0]
    return found


def open_runner(path: Path, threads: int) -> tuple[Callable[[dict[str, Tensor], int], object], bool]:
    """What runs a file on inputs of a model, or lets it write so many tokens to the first text; and whether it writes.

    llama.cpp is in this process.
    """
    import gguf
    import xllamacpp

    encodes = any("pooling" in name or name.startswith("bert.") for name in gguf.GGUFReader(path).fields)
    params = xllamacpp.CommonParams()
    params.model.path, params.warmup, params.fit_params = str(path), False, False
    params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = 4096, 1, 4096, 4096
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.embedding = encodes
    server = xllamacpp.Server(params)

    def texts(inputs: dict[str, Tensor]) -> list[list[int]]:
        return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]

    def encode(inputs: dict[str, Tensor], tokens: int) -> object:
        return server.handle_embeddings({"input": texts(inputs)})

    def write(inputs: dict[str, Tensor], tokens: int) -> object:
        wanted = {"prompt": texts(inputs)[0], "n_predict": tokens, "temperature": 0.0, "ignore_eos": True}
        return server.handle_completions({**wanted, "cache_prompt": False, "stream": False})

    return (encode, False) if encodes else (write, True)


def _tokens(address: str, text: str) -> list[int]:
    """The tokens that a server cuts a text into; its Python interface has no name for that."""
    content = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{address}/tokenize", content, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        tokens: list[int] = json.loads(answer.read())["tokens"]
        return tokens


if __name__ == "__main__":
    _serve(read_json(Path(sys.argv[1])), Path(sys.argv[2]))
