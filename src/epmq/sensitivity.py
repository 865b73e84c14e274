"""Which directions of a layer's output an expert's answers depend on.

An error e in what a layer writes moves the expert's scores by J e, with the Jacobian J of everything that follows. A
task with ten classes reads few of the hundreds of directions; the others are free for the other tasks. The mean
S = E[Jᵀ J] over tokens is the metric in which the task's errors count: the output factor of the Gauss–Newton matrix
(Martens & Grosse 2015, arXiv 1503.05671). It is estimated from gradients of random contrasts of the scores on a few
calibration examples; no label is used and nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from epmq.blocks import as_matrix, find_stacks, input_groups, is_padding_mask
from epmq.multitask import MultiTaskModel
from epmq.objective import Metric
from epmq.skeleton import drop_tensors, load_block
from epmq.sources import Sources
from epmq.streams import Calibration
from epmq.walk import Batch, uncached

# Examples a task, from its first batch; fewer where a language model would give more scores than this.
EXAMPLES = 32
SCORES = 2**26
# Directions of S that are kept one by one; what is left of it is spread over all others alike. The scores of a few
# classes need far fewer, those of a language model more. (A random sketch of so few rows is cheaper, but its noise sets
# tasks apart that need the same.)
RANK = 256


def sensitivities(
    sources: Sources, calibration: Iterable[Calibration], device: torch.device
) -> dict[str, dict[str, Metric]]:
    """S of the layers of each expert that may write to the residual stream.

    These are those that alone have their input and that give as many features as their block takes. The experts' blocks
    are in memory one at a time.

    Args:
        sources: merged model and experts.
        calibration: the experts' batches, and their heads.
        device: where the experts run.

    Returns:
        task → layer name → S, scaled to a mean diagonal of 1. Layers that do not reach the scores have none.
    """
    writers: dict[str, list[str]] = {}  # of a block; the first expert finds them for all
    return {part.task: _sensitivities(sources, part, device, writers) for part in calibration}


@torch.enable_grad()
def _sensitivities(
    sources: Sources, part: Calibration, device: torch.device, writers: dict[str, list[str]]
) -> dict[str, Metric]:
    read, found = partial(sources.expert_tensor, part.task), dict[str, Metric]()
    model = sources.skeleton()
    load_block(model, sources.outside_names(), read, device)
    sources.tie(model)
    with uncached(model), ExitStack() as stack:
        for chain in find_stacks(model):
            for index, block in enumerate(chain.blocks):
                name = chain.block_name(index)
                load = partial(load_block, model, sources.block_names(name), read, device)
                find = partial(_writers, writers, name, block)
                stack.enter_context(_followed(block, load, find, partial(_keep, found, name)))
        _contrast(model, part).backward()
    return found


def _keep(found: dict[str, Metric], block: str, layer: str, gradient: Tensor) -> None:
    """Note a layer's metric, from the gradient of its output; a layer that is called again aims at no sum anyway."""
    rows, name = gradient.reshape(-1, gradient.shape[-1]).float(), f"{block}.{layer}"
    second = rows.T @ rows
    size = second.diagonal().mean()
    if name not in found and torch.isfinite(second).all() and size > 0:
        found[name] = leading(second / size, RANK)


def leading(second: Tensor, rank: int) -> Metric:
    """The leading directions of a second moment, and the mean of the others.

    By three rounds of subspace iteration from a fixed random start, where there are more directions than wanted
    (Halko, Martinsson & Tropp 2011, arXiv 0909.4061).

    Args:
        second: [out, out] float32, symmetric, without negative eigenvalues.
        rank: how many directions to keep at most.
    """
    size = len(second)
    if size <= rank:
        values, vectors = torch.linalg.eigh(second)
        return Metric(values.clamp(min=0).sqrt()[:, None] * vectors.T)
    basis = torch.randn(size, rank, generator=torch.Generator().manual_seed(0)).to(second.device)
    for _ in range(3):
        basis = torch.linalg.qr(second @ basis).Q
    values, turned = torch.linalg.eigh(basis.T @ second @ basis)
    rest = max(0.0, float(second.diagonal().sum() - values.sum())) / (size - rank)
    return Metric((values - rest).clamp(min=0).sqrt()[:, None] * (basis @ turned).T, rest)


@contextmanager
def _followed(
    block: nn.Module,
    load: Callable[[], None],
    find: Callable[..., list[str]],
    note: Callable[[str, Tensor], None],
) -> Iterator[None]:
    """Let a block load its weights when it runs, forwards or backwards; note the gradients of its writers' outputs."""
    original, handles = block.forward, []

    def run(*args: Any, **kwargs: Any) -> Any:
        load()
        try:
            return original(*args, **kwargs)
        finally:
            drop_tensors(block)

    def listen(layer: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        output.register_hook(partial(note, layer))

    def forward(*args: Any, **kwargs: Any) -> Any:
        for layer in find(load, original, args, kwargs):
            handles.append(block.get_submodule(layer).register_forward_hook(partial(listen, layer)))
        # Parameters take no gradient; the stream into the first block starts one.
        args, kwargs = _with_stream(args, kwargs, lambda stream: stream if stream.requires_grad else _leaf(stream))
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        block.__dict__.pop("forward", None)
        for handle in handles:
            handle.remove()


def _leaf(stream: Tensor) -> Tensor:
    return stream.detach().requires_grad_()


def _with_stream(
    args: tuple, kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple, dict[str, Any]]:
    """A block's arguments with the residual stream, the first tensor among them, changed."""
    if args and isinstance(args[0], Tensor):
        return (change(args[0]), *args[1:]), kwargs
    first = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, first: change(kwargs[first])}


@torch.no_grad()
def _writers(
    known: dict[str, list[str]],
    name: str,
    block: nn.Module,
    load: Callable[[], None],
    forward: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> list[str]:
    """The layers of a block that may write to the stream: they are looked for once."""
    if name not in known:
        stream = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        load()
        groups = input_groups(block, lambda: forward(*args, **kwargs))
        alone = {group.names[0]: block.get_submodule(group.names[0]) for group in groups if len(group.names) == 1}
        known[name] = [
            layer
            for layer, module in alone.items()
            if len(as_matrix(module, module.weight)) == stream.shape[-1]  # type: ignore[arg-type]
        ]
    return known[name]


def _contrast(model: Any, part: Calibration) -> Tensor:
    """A random contrast of the scores of some examples; the second moment of its gradient is the metric.

    For classes it is a normal draw that sums to zero, for words the log-likelihood of words drawn from the model
    itself, and for a model without scores a normal draw over its features.
    """
    head = part.head(model)
    words = None if head is not None else getattr(model, "get_output_embeddings", lambda: None)()
    batch = _some(part.batches[0], 0 if words is None else words.weight.shape[0])
    generator = torch.Generator(next(iter(batch.values())).device).manual_seed(0)
    if head is not None:
        scores = MultiTaskModel(model, {part.task: head})(part.task, **batch)
        draw = torch.randn(scores.shape, generator=generator, device=scores.device)
        return (scores * (draw - draw.mean(-1, keepdim=True))).sum()
    output = model(**batch)
    if words is None:
        features = output[0]
        draw = torch.randn(features.shape, generator=generator, device=features.device)
        real = _real(batch, features)
        return (features * (draw if real is None else draw * real[..., None])).sum()
    scores = output.logits.flatten(0, -2)
    drawn = torch.multinomial(scores.detach().softmax(-1), 1, generator=generator)[:, 0]
    real = _real(batch, output.logits)
    return nn.functional.cross_entropy(scores, drawn if real is None else drawn.where(real.flatten(), -100))


def _some(batch: Batch, vocabulary: int) -> Batch:
    """The first examples of a batch, no more than their scores for all words of a vocabulary allow."""
    written = next((batch[name] for name in ("labels", "decoder_input_ids", "input_ids") if name in batch), None)
    tokens = written.shape[1] if vocabulary and isinstance(written, Tensor) else 0
    count = min(EXAMPLES, max(1, SCORES // max(1, tokens * vocabulary)))
    return {name: value[:count] if isinstance(value, Tensor) else value for name, value in batch.items()}


def _real(batch: Batch, scores: Tensor) -> Tensor | None:
    """Which tokens of the scores are real, booleans [batch, tokens]; None if nothing says."""
    if "labels" in batch:
        return batch["labels"] != -100
    mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    if isinstance(mask, Tensor) and is_padding_mask(mask) and mask.shape == scores.shape[:-1]:
        return mask.bool()
    return None
