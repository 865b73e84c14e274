"""What an expert says to an example, and how far the merged model is from saying the same.

Where a task has a head, that is its scores and the features that its last linear map reads; of a language model, the
distribution over the next token at every real one, which follows from the last hidden states.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from epmq import matmul
from epmq.calibration.head_refit import CannotFollow, ScoredRows, linear_map, scored_rows
from epmq.calibration.held_out import OutputLayer, Piece, Said, TaskPieces
from epmq.calibration.masks import real_tokens
from epmq.calibration.student import Student, in_order
from epmq.models.heads import Head
from epmq.models.hooks import stops_before
from epmq.models.multitask import NativeHead

# What the squared error of scores weighs beside their divergence.
SQUARED = 0.1
# Scores in a row that are kept of an expert: those of a vocabulary follow from its features.
MOST_CLASSES = 4096
# Next-token scores that are in memory at once.
MOST_SCORES = 1 << 26
# The score of padding among the tokens of an example.
PADDED = -1e4

# `scale` and `cap` of an `OutputLayer`.
Form = tuple[float, float | None]
PLAIN_FORM: Form = (1.0, None)


def says(backbone: Any, head: Head | NativeHead | None, inputs: dict[str, Any]) -> Said:
    """What a model says to a batch: by its head, or as a language model where that is None."""
    if head is None:
        return Said(last_hidden_states(backbone, inputs))
    try:
        rows = scored_rows(backbone, head, inputs)
    except CannotFollow:
        assert isinstance(head, NativeHead)
        scores = head(**inputs)
        kept = real_tokens(inputs, scores.shape[:-1])
        rows = ScoredRows(torch.empty(0), scores.shape, None if kept is None else kept.flatten())
        return Said(None, _by_example(head, rows, scores if kept is None else scores[kept]))
    weight, bias = linear_map(head)
    if len(weight) > MOST_CLASSES:
        return Said(rows.features)
    weight, bias = weight.to(rows.features), None if bias is None else bias.to(rows.features)
    return Said(rows.features, _by_example(head, rows, functional.linear(rows.features, weight, bias)))


def _by_example(head: Head | NativeHead, rows: ScoredRows, scores: Tensor) -> Tensor:
    """Scores in rows of what is chosen among: the classes, or the tokens of an example where it answers with those."""
    if head.task.kind != "span":
        return scores.reshape(-1, scores.shape[-1])
    if rows.kept is not None:
        padded = scores.new_full((len(rows.kept), scores.shape[-1]), PADDED)
        scores = padded.index_put((rows.kept.nonzero().flatten(),), scores)
    return scores.reshape(rows.shape).mT.flatten(0, 1)


def last_hidden_states(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What a language model's output layer receives for every real token: [tokens, hidden]."""
    received, layer = list[Tensor](), model.get_output_embeddings()
    with layer.register_forward_pre_hook(lambda module, args: received.append(args[0])):
        stops_before(model, layer, inputs)
    kept = real_tokens(inputs, received[0].shape[:-1])
    rows = received[0].flatten(0, -2)
    return rows if kept is None else rows[kept.flatten()]


def head_loss(kind: str | None, said: Said, taught: Said, spread: float = 1.0) -> Tensor:
    """How far a head is from what the expert's says, the mean over rows (Hinton et al., arXiv 1503.02531).

    KL(expert ‖ model) of the scores' softmax + 0.1 × their squared error + 1 − cosine of the features. Where several
    classes may be right, the divergence is of each by itself; of numbers, and of choices, which are scored one by one,
    the squared error alone counts, over `spread`, the variance of the expert's scores.

    Args:
        kind: what the head answers, as of `epmq.models.tasks`; None counts as a class.
        said, taught: of the model and of the expert: features [rows, features] and scores [rows, classes].

    Returns:
        a number, float32.
    """
    with matmul.one_thread():  # sums depend on the number of threads
        return _head_loss(kind, said, taught, spread)


def _head_loss(kind: str | None, said: Said, taught: Said, spread: float) -> Tensor:
    total = torch.zeros((), device=(said.features if said.scores is None else said.scores).device)  # type: ignore[union-attr]
    if said.scores is not None and taught.scores is not None:
        scores, wanted = said.scores, taught.scores
        squared = (scores - wanted).square().mean()
        if kind in ("number", "choice"):
            total = total + squared / spread
        elif kind == "labels":
            own = partial(functional.binary_cross_entropy_with_logits, target=wanted.sigmoid(), reduction="sum")
            total = total + (own(scores) - own(wanted)) / len(scores) + SQUARED * squared
        else:
            total = total + divergence(scores, wanted) / len(scores) + SQUARED * squared
    if said.features is not None and taught.features is not None:
        total = total + 1 - functional.cosine_similarity(said.features, taught.features, dim=-1).mean()
    return total


def divergence(scores: Tensor, wanted: Tensor) -> Tensor:
    """Σ KL(softmax(wanted) ‖ softmax(scores)) over the rows of both, [rows, classes]."""
    return functional.kl_div(scores.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True)


def language_loss(hidden: Tensor, taught: Tensor, layer: OutputLayer, teacher: OutputLayer, classes: int) -> Tensor:
    """KL(expert ‖ model) of the next token, the mean over tokens.

    Args:
        hidden, taught: last hidden states [tokens, hidden] of the model and of the expert.
        layer, teacher: the output layers of both, which are run on some tokens at a time.
        classes: tokens of the vocabulary.
    """

    def part(own: Tensor, experts: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(experts)
        scores = layer(own)
        with matmul.one_thread():
            return divergence(scores, wanted)

    step = max(1, MOST_SCORES // classes)
    pairs = zip(hidden.split(step), taught.split(step))
    parts = [checkpoint(part, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
    return torch.stack(parts).sum() / len(hidden)


def score_form(model: Any, inputs: dict[str, Any]) -> Form:
    """What a language model's code makes of its output layer's product: a factor, and a cap or None.

    Raises:
        CannotFollow: something else.
    """
    received, layer = list[Tensor](), model.get_output_embeddings()
    with layer.register_forward_hook(lambda module, args, output: received.append(output)):
        final = model(**inputs).logits.double()
    product = received[0].double()
    scale = float((final * product).sum() / product.square().sum())
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    forms: list[Form] = [PLAIN_FORM, (scale, None)] + ([(1.0, float(cap))] if cap else [])
    for form in forms:
        if torch.allclose(OutputLayer(lambda rows: rows, *form)(product), final, rtol=1e-4, atol=1e-5):
            return form
    raise CannotFollow(f"the scores of {type(model).__name__} are not what its output layer gives")


class Distiller:
    """Trains a student towards what each expert says to its own task's examples, an epoch at a time (Adam).

    Args:
        student: what is trained.
        tasks: task → its examples.
        rate: size of a step.
        form: `score_form` of a language model.
    """

    def __init__(
        self,
        student: Student,
        tasks: Mapping[str, TaskPieces],
        rate: float,
        form: Form = PLAIN_FORM,
    ) -> None:
        self.student, self.tasks = student, tasks
        self.optimizer = torch.optim.Adam(student.parameters.values(), lr=rate, foreach=False)
        output = student.backbone.get_output_embeddings() if any(one.teacher for one in tasks.values()) else None
        self._output = OutputLayer(output, *form) if output is not None else None

    def loss(self, task: str, piece: Piece) -> Tensor:
        """The loss of a task on some of its examples, the mean over rows."""
        own, head, taught = self.tasks[task], self.student.heads.get(task), piece.taught()
        if own.teacher is None:
            assert head is not None
            said = says(self.student.backbone, head, piece.inputs)
            return head_loss(head.task.kind, said, taught, own.spread)
        hidden = last_hidden_states(self.student.backbone, piece.inputs)
        assert self._output is not None and taught.features is not None
        classes = self.student.backbone.config.get_text_config().vocab_size
        return language_loss(hidden, taught.features, self._output, own.teacher, classes)

    def steps(self, epoch: int, seed: int) -> list[tuple[str, int]]:
        """The order of an epoch's steps: task and number of its examples' piece; as many of every task."""
        draw = np.random.default_rng([seed, epoch])
        most = max(len(own.train) for own in self.tasks.values())
        queues = {}
        for task, own in self.tasks.items():
            rounds = -(-most // len(own.train))
            queues[task] = np.concatenate([draw.permutation(len(own.train)) for _ in range(rounds)])
        names = list(self.tasks)
        return [(names[k], int(queues[names[k]][turn])) for turn in range(most) for k in draw.permutation(len(names))]

    def step(self, task: str, number: int) -> None:
        """Train on one piece of a task."""
        own = self.tasks[task]
        self.optimizer.zero_grad(set_to_none=True)
        loss = own.weight * self.loss(task, own.train[number])
        with in_order():
            loss.backward()
        self.optimizer.step()

    def held_out_loss(self) -> float:
        """The loss on what is not trained on, as the model will be stored, the mean over tasks by their weights.

        It has six digits: what is beyond them depends on the number of threads.
        """
        total = 0.0
        with self.student.as_stored():
            for task, own in self.tasks.items():
                sizes = [piece_rows(piece) for piece in own.held_out]
                losses = [float(self.loss(task, piece)) for piece in own.held_out]
                mean = sum(size * loss for size, loss in zip(sizes, losses)) / sum(sizes)
                total += own.weight * mean / len(self.tasks)
        return float(f"{total:.6g}")

    def state(self) -> dict[str, Tensor]:
        """All that training goes on from: parameters, and the optimizer's moments and counts."""
        found = {}
        for name, parameter in self.student.parameters.items():
            found[name] = parameter.detach()
            moments = self.optimizer.state.get(parameter, {})
            found |= {f"{leaf}/{name}": moments[leaf] for leaf in MOMENTS if leaf in moments}
        return found

    def go_on_from(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` has given."""
        for name, parameter in self.student.parameters.items():
            parameter.data.copy_(state[name])
            moments = {leaf: state[f"{leaf}/{name}"].clone() for leaf in MOMENTS if f"{leaf}/{name}" in state}
            if moments:
                self.optimizer.state[parameter] = moments


# What Adam keeps of each tensor.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def piece_rows(piece: Piece) -> int:
    """Rows that the expert has said something to."""
    taught = piece.taught()
    return max(0 if one is None else len(one) for one in (taught.features, taught.scores))


def output_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """An expert's output layer on the fly: its weight [tokens, hidden] stays in the dtype that it has."""

    def product(hidden: Tensor) -> Tensor:
        return functional.linear(hidden, weight.to(hidden), None if bias is None else bias.to(hidden))

    return product
