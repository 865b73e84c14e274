"""FeatCal (arXiv 2605.13030): a peer that fits a merged model's layers anew, in full precision and closed form.

Written from its formulas, for encoders whose experts have heads; nothing of its authors' code is in here. Every linear
layer and every LayerNorm of the blocks is fitted, block after block, to what the experts' own layers would give:

* a linear layer reads X of the merged model whose earlier blocks are calibrated, and aims at X̃ W_kᵀ + b_k, where
  X̃ = (1 − α) X + α X_k and X_k is what expert k itself reads there. With G_k = XᵀX / n and s_k = 1 / ‖G_k‖_F,

      W = (Σ s_k W_k X̃ᵀX/n + λ A) (Σ s_k G_k + λ I)⁻¹,   A = W_0 + ρ (W_m − W_0)
      b = (Σ s_k (b_k + W_k x̃_k − W x_k) + λ a) / (Σ s_k + λ)

  with the mean inputs x_k and x̃_k, and an anchor `a` of the biases like that of the weights;
* a LayerNorm is to give γ_k ẑ + β_k of the normalised rows ẑ that it has itself: two equations a feature, in γ and β,
  with anchors of their own, in which all tasks count alike;
* in the last block a token that no head reads counts a hundredth, but in keys and values. Padding never counts; the
  authors' code is for pictures, which have none.

All else stays as it is merged: embeddings, layer scales, what follows the last block, and the heads.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from epmq.data.encoding import to_device
from epmq.merging.experts import ExpertSet
from epmq.merging.readers import TensorReader
from epmq.models.blocks import find_stacks
from epmq.models.heads import Head
from epmq.models.hooks import first_tensor
from epmq.pipeline.inputs import ModelInputs
from epmq.pipeline.output import write_merged, write_rest
from epmq.pipeline.prepare import ExpertData, prepare
from epmq.recipe import Recipe
from epmq.runtime import peak_memory_mb, reset_peak_memory

CPU = torch.device("cpu")
# What keeps a division or a solve from failing where no input moves.
TINY = 1e-8
# Task → batches of inputs of the model.
Inputs = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class FeatCal:
    """Settings, with the paper's defaults.

    Attributes:
        features: α, the share of the expert's own inputs in the target.
        anchor_scale: ρ, how far along the merged task vector the anchor lies.
        anchor_strength: λ.
        unread: how much a token counts that no head reads, in the last block.
        biases, norms: whether they are fitted; otherwise they stay as they are merged.
        by_layer: fit the layers of a block one group after the other, each on what those before it give. As published,
            all layers of a block are fitted to what the block gives as it is merged, on calibrated blocks before it.
    """

    features: float = 0.3
    anchor_scale: float = 2.0
    anchor_strength: float = 0.05
    unread: float = 0.01
    biases: bool = True
    norms: bool = True
    by_layer: bool = False


class LinearFit:
    """One linear layer, fitted over all tasks; everything is summed in float64.

    `gather` takes rows of one task, `end_task` ends it, `solve` gives the layer's new tensors.
    """

    def __init__(self, layer: nn.Linear, settings: FeatCal) -> None:
        rows, columns = layer.weight.shape
        self._settings, self._columns = settings, columns
        self._gram = torch.zeros(columns, columns, dtype=torch.double)  # Σ s_k G_k
        self._cross = torch.zeros(rows, columns, dtype=torch.double)  # Σ s_k W_k X̃ᵀX/n
        self._mean = torch.zeros(columns, dtype=torch.double)  # Σ s_k x_k
        self._wanted = torch.zeros(rows, dtype=torch.double)  # Σ s_k (b_k + W_k x̃_k)
        self._shares = 0.0  # Σ s_k
        self._begin()

    def _begin(self) -> None:
        self._total = 0.0
        self._task_gram, self._task_cross = self._gram.new_zeros(2, self._columns, self._columns)
        self._task_mean, self._task_target = self._gram.new_zeros(2, self._columns)

    def gather(self, inputs: Tensor, theirs: Tensor, weights: Tensor) -> None:
        """Take rows [rows, in] that the merged model and the expert read, and how much each counts, [rows]."""
        targets = inputs.lerp(theirs, self._settings.features)
        weighted = inputs * weights[:, None]
        self._total += float(weights.sum())
        self._task_gram += inputs.T @ weighted
        self._task_cross += targets.T @ weighted
        self._task_mean += weighted.sum(0)
        self._task_target += weights @ targets

    def end_task(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fold in a task by its expert's weight [out, in] and bias [out]."""
        gram, weight = self._task_gram / self._total, weight.double()
        share = 1 / max(float(gram.norm()), TINY)
        self._gram += share * gram
        self._cross += share / self._total * weight @ self._task_cross
        self._mean += share / self._total * self._task_mean
        self._wanted += share * (weight @ self._task_target / self._total)
        if bias is not None:
            self._wanted += share * bias.double()
        self._shares += share
        self._begin()

    def solve(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The new weight [out, in], and the new bias [out] where there is one, by the anchors of both; float32."""
        strength = self._settings.anchor_strength
        left = self._gram + (strength + TINY) * torch.eye(self._columns, dtype=torch.double)
        right = self._cross + strength * weight.double()
        new = torch.linalg.solve(left, right.T).T
        solved = {"weight": new.float()}
        if bias is not None:
            wanted = self._wanted - new @ self._mean + strength * bias.double()
            solved["bias"] = (wanted / (self._shares + strength)).float()
        return solved


class NormFit:
    """One LayerNorm, fitted over all tasks; as `LinearFit`."""

    def __init__(self, layer: nn.LayerNorm, settings: FeatCal) -> None:
        self._strength, self._layer = settings.anchor_strength, layer
        self._mean, self._energy, self._gain, self._shift = torch.zeros(4, *layer.weight.shape, dtype=torch.double)
        self._tasks = 0
        self._begin()

    def _begin(self) -> None:
        self._total = 0.0
        self._task_mean, self._task_energy = torch.zeros_like(self._mean), torch.zeros_like(self._mean)

    def gather(self, inputs: Tensor, theirs: Tensor, weights: Tensor) -> None:
        """As `LinearFit.gather`; what the expert reads is not asked for."""
        rows = nn.functional.layer_norm(inputs, self._layer.normalized_shape, eps=self._layer.eps)
        self._total += float(weights.sum())
        self._task_mean += weights @ rows
        self._task_energy += weights @ rows.square()

    def end_task(self, weight: Tensor, bias: Tensor) -> None:
        """Fold in a task by its expert's γ and β."""
        mean, energy = self._task_mean / self._total, self._task_energy / self._total
        self._mean += mean
        self._energy += energy
        self._gain += energy * weight + mean * bias
        self._shift += mean * weight + bias
        self._tasks += 1
        self._begin()

    def solve(self, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
        """The new γ and β, by the anchors of both; float32."""
        gain, shift = self._gain + self._strength * weight, self._shift + self._strength * bias
        energy, count = self._energy + self._strength, self._tasks + self._strength
        det = (energy * count - self._mean.square()).clamp(min=TINY)
        gamma, beta = count * gain - self._mean * shift, energy * shift - self._mean * gain
        return {"weight": (gamma / det).float(), "bias": (beta / det).float()}


class Call:
    """A call of the first block on a batch; `hidden` goes on from block to block, everything else is the same."""

    def __init__(self, model: nn.Module, first: nn.Module, batch: Mapping[str, Any]) -> None:
        with first.register_forward_pre_hook(self._note, with_kwargs=True):
            model(**batch)

    def _note(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hidden, *self.args = args
        self.kwargs = kwargs

    def run(self, block: nn.Module) -> Tensor:
        """What a block gives, [batch, tokens, hidden]."""
        return first_tensor(block(self.hidden, *self.args, **self.kwargs))


class Stream:
    """The calibration examples of one task, on their way through the merged model and through their expert."""

    def __init__(self, experts: ExpertSet, task: str, merged: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
        self.expert, batches = experts.experts[task], [to_device(dict(batch), CPU) for batch in batches]
        theirs = experts.whole_model(self.expert, CPU)
        self.ours = [Call(merged, find_stacks(merged)[0].blocks[0], batch) for batch in batches]
        self.theirs = [Call(theirs, find_stacks(theirs)[0].blocks[0], batch) for batch in batches]
        self.masks = [batch.get("attention_mask") for batch in batches]
        head = self.expert.head(theirs)
        self.reads_first = isinstance(head, Head) and head.pooling == "cls"

    def weights(self, index: int, unread: float) -> Tensor:
        """How much each token of a batch counts, [batch, tokens]: padding nothing, unread ones as much as is said."""
        mask, shape = self.masks[index], self.ours[index].hidden.shape[:2]
        weights = torch.ones(shape) if mask is None else mask.float()
        if self.reads_first:
            weights[:, 1:] *= unread
        return weights


@torch.no_grad()
def calibrate(
    experts: ExpertSet, merged: TensorReader, inputs: Inputs, settings: FeatCal | None = None
) -> dict[str, Tensor]:
    """Calibrate a merged model.

    Args:
        experts: base and experts.
        merged: reads the merged model's tensors.
        inputs: of the model, task by task.
        settings: FeatCal's; the paper's by default.

    Returns:
        name in the model → new tensor, float32, of every one that is fitted.

    Raises:
        ValueError: the model has more than one stack of blocks, or a layer does not see the block's tokens.
    """
    settings = settings or FeatCal()
    model = experts.whole_model(merged, CPU)
    (stack,) = find_stacks(model)
    streams = [Stream(experts, task, model, batches) for task, batches in inputs.items()]
    fitted = dict[str, Tensor]()
    for index, block in enumerate(stack.blocks):
        work = BlockFit(experts, stack.block_name(index), block, settings, index == len(stack.blocks) - 1)
        for layers in work.steps(streams[0].ours[0]):
            fitted |= work.fit(layers, streams)
        for stream in streams:
            guide = work.guide(stream)
            for call in stream.ours:
                call.hidden = call.run(block)
            for call in stream.theirs:
                call.hidden = call.run(guide)
    return fitted


class BlockFit:
    """Fits the layers of one block of the live model, in place."""

    def __init__(self, experts: ExpertSet, name: str, block: nn.Module, settings: FeatCal, last: bool) -> None:
        self._experts, self._name, self._block, self._settings, self._last = experts, name, block, settings, last
        self._start = {key: tensor.clone() for key, tensor in block.state_dict().items()}
        self._mixing = set[str]()  # linear layers through which an unread token reaches those that are read

    def guide(self, stream: Stream) -> nn.Module:
        """The same block of a task's expert."""
        guide = copy.deepcopy(self._block)
        guide.load_state_dict({key: stream.expert.tensor(f"{self._name}.{key}") for key in guide.state_dict()})
        return guide

    def steps(self, call: Call) -> list[list[str]]:
        """The layers that are fitted, in order of their first call, in lists of those that are fitted at once."""
        modules = dict(self._block.named_modules())
        names = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        if self._settings.norms:
            norms = [name for name, module in modules.items() if isinstance(module, nn.LayerNorm)]
            names += [name for name in norms if modules[name].bias is not None]  # nor is there one without a weight
        seen = _inputs(self._block, names, call)
        if self._last:
            self._mixing = mixing_layers(self._block, [n for n in seen if isinstance(modules[n], nn.Linear)], call)
        if not self._settings.by_layer:
            return [list(seen)]
        steps = list[list[str]]()
        for name, tensor in seen.items():
            if steps and seen[steps[-1][0]] is tensor:
                steps[-1].append(name)
            else:
                steps.append([name])
        return steps

    def fit(self, layers: Sequence[str], streams: Sequence[Stream]) -> dict[str, Tensor]:
        """Fit some layers to what the block gives as it is now, and put them into it; as `calibrate`."""
        fits = {name: self._start_fit(self._block.get_submodule(name)) for name in layers}
        for stream in streams:
            guide = self.guide(stream)
            for index, (ours, theirs) in enumerate(zip(stream.ours, stream.theirs)):
                read, guiding = _inputs(self._block, layers, ours), _inputs(guide, layers, theirs)
                for name, fit in fits.items():
                    counts = self._last and name not in self._mixing
                    weights = stream.weights(index, self._settings.unread if counts else 1.0)
                    if read[name].shape[:2] != weights.shape:
                        raise ValueError(f"{self._name}.{name}: it does not read the tokens of the block")
                    fit.gather(read[name].flatten(0, 1), guiding[name].flatten(0, 1), weights.flatten())
            for name, fit in fits.items():
                expert: Any = guide.get_submodule(name)
                fit.end_task(expert.weight, expert.bias)
        fitted = dict[str, Tensor]()
        for name, fit in fits.items():
            for leaf, tensor in fit.solve(self._anchor(f"{name}.weight"), self._anchor(f"{name}.bias")).items():
                if leaf == "weight" or self._settings.biases or isinstance(fit, NormFit):
                    fitted[f"{self._name}.{name}.{leaf}"] = tensor
                    self._block.get_parameter(f"{name}.{leaf}").copy_(tensor)
        return fitted

    def _start_fit(self, layer: Any) -> LinearFit | NormFit:
        return LinearFit(layer, self._settings) if isinstance(layer, nn.Linear) else NormFit(layer, self._settings)

    def _anchor(self, key: str) -> Any:
        """W_0 + ρ (W_m − W_0) of a tensor of the block; None where there is none."""
        if key not in self._start:
            return None
        base = self._experts.base.tensor(f"{self._name}.{key}").float()
        return base + self._settings.anchor_scale * (self._start[key] - base)


def _inputs(block: nn.Module, names: Iterable[str], call: Call) -> dict[str, Tensor]:
    """What layers of a block read in a call of it, in order of their first call."""
    seen = dict[str, Tensor]()

    def note(name: str) -> Any:
        return lambda module, args: seen.setdefault(name, args[0])

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(block.get_submodule(name).register_forward_pre_hook(note(name)))
        call.run(block)
    return seen


def mixing_layers(block: nn.Module, names: Iterable[str], call: Call) -> set[str]:
    """Linear layers of a block whose outputs at other tokens reach the first one: keys and values."""
    outputs = dict[str, Tensor]()

    def note(name: str) -> Any:
        return lambda module, args, output: outputs.setdefault(name, output)

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(block.get_submodule(name).register_forward_hook(note(name)))
        with torch.enable_grad():
            call.hidden.requires_grad_()
            first = call.run(block)[:, 0]
            # Unequal weights: those of a LayerNorm's output sum to what no input moves.
            moved = (first @ torch.linspace(-1, 1, first.shape[-1])).sum()
            gradients = torch.autograd.grad(moved, list(outputs.values()), allow_unused=True)
    call.hidden.requires_grad_(False)
    return {name for name, gradient in zip(outputs, gradients) if gradient is not None and bool(gradient[:, 1:].any())}


class Patched:
    """A merged model with some tensors in the place of its own, in their dtype."""

    def __init__(self, merged: TensorReader, tensors: Mapping[str, Tensor]) -> None:
        self._merged, self._tensors = merged, tensors

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model."""
        own = self._merged.tensor(name)
        return self._tensors[name].to(own.dtype) if name in self._tensors else own

    def parts(self, name: str) -> Iterator[Tensor]:
        """As `tensor`, in one part."""
        yield self.tensor(name)


def write_calibrated(recipe: Recipe, folder: Path, settings: FeatCal | None = None) -> dict[str, float]:
    """Merge by a recipe, calibrate on its calibration data, and write a plain checkpoint with the experts' heads.

    Args:
        recipe: with `quantize: {method: none}`.
        folder: exists and is empty.

    Returns:
        `seconds` and `peak_memory_mb` of that.
    """
    reset_peak_memory()
    start = time.perf_counter()
    prepared: Any = prepare(recipe, evaluate=False)
    encoder, inputs = ModelInputs(prepared.experts, recipe, prepared.plan.processor), dict[str, Any]()
    for expert in recipe.experts:
        template = prepared.plan.templates.get(expert.name)
        inputs[expert.name] = ExpertData(prepared.experts, recipe, expert, encoder, template).calibration(None)
    prepared.merged = Patched(prepared.merged, calibrate(prepared.experts, prepared.merged, inputs, settings))
    with Progress(disable=True) as bar:
        write_merged(prepared, folder, bar)
    write_rest(prepared, folder, {})
    return {"seconds": time.perf_counter() - start, "peak_memory_mb": peak_memory_mb()}
