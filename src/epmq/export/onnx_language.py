"""Graphs of language models: decoders, and encoder–decoders, with a key–value cache that goes in and comes out.

Names of files, inputs and outputs are those that transformers.js looks for.
"""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from epmq.export.onnx_graph import Graph, run_session
from epmq.models.multitask import MultiTaskModel

PAST, PRESENT = "past_key_values", "present"
LEAVES = ("key", "value")
ENCODED_TEXT = "encoder_hidden_states"
# Sizes that a graph is traced with; none is 0 or 1, which would be taken for constants.
BATCH, TOKENS, CACHED, ENCODED = 2, 3, 4, 5


def language_graphs(model: MultiTaskModel) -> dict[str, Graph]:
    """Name of a file → graph of a model that writes text."""
    if model.backbone.config.is_encoder_decoder:
        return {"encoder_model": encoder_graph(model), "decoder_model_merged": second_decoder_graph(model)}
    return {"model": decoder_graph(model)}


class Decoder(nn.Module):
    """One step of a decoder: tokens and a cache → scores of the next tokens, and the cache with them in it."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Any, ...]:
        """Scores [batch, tokens, vocabulary]; key and value [batch, heads, cached + tokens, size] of each layer."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        takes = signature(self.backbone.forward).parameters
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        given = {name: value for name, value in inputs.items() if name in takes}
        outputs = self.backbone(**given, past_key_values=cache, use_cache=True)
        return outputs.logits, *cached(outputs.past_key_values).values()


def decoder_graph(model: MultiTaskModel) -> Graph:
    """The graph of a decoder."""
    ids = _ids(model, CACHED + TOKENS)
    with torch.no_grad():
        filled = cached(model.backbone(input_ids=ids[:, :CACHED], use_cache=True).past_key_values)
    inputs = {
        "input_ids": ids[:, CACHED:],
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(CACHED, CACHED + TOKENS).repeat(BATCH, 1),
        **{f"{PAST}.{name}": tensor for name, tensor in filled.items()},
    }
    dynamic: dict[str, dict[int, str]] = {name: {0: "batch", 2: "past_sequence_length"} for name in inputs}
    tokens = {0: "batch", 1: "sequence_length"}
    dynamic |= {"input_ids": tokens, "position_ids": tokens, "attention_mask": {0: "batch", 1: ""}}
    outputs = ["logits", *(f"{PRESENT}.{name}" for name in filled)]
    return Graph(Decoder(model.backbone), inputs, outputs, dynamic)


def _ids(model: MultiTaskModel, tokens: int) -> Tensor:
    """Tokens of some texts."""
    ids: Tensor = torch.arange(2, 2 + BATCH * tokens).reshape(BATCH, -1) % model.backbone.config.vocab_size
    return ids


def cached(cache: Any) -> dict[str, Tensor]:
    """Key and value of each layer of a cache by the ends of their names: `0.key`; with an encoder `0.encoder.key`."""
    parts = {"": cache}
    if isinstance(cache, EncoderDecoderCache):
        parts = {".decoder": cache.self_attention_cache, ".encoder": cache.cross_attention_cache}
    layers: Any = zip(*(part.layers for part in parts.values()), strict=True)
    return {
        f"{number}{part}.{leaf}": getattr(layer, f"{leaf}s")
        for number, both in enumerate(layers)
        for part, layer in zip(parts, both, strict=True)
        for leaf in LEAVES
    }


class Encoder(nn.Module):
    """The encoder of an encoder–decoder."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        """The encoded text, [batch, tokens, hidden]."""
        return (self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state,)


def encoder_graph(model: MultiTaskModel) -> Graph:
    """The graph of an encoder–decoder's encoder."""
    ids = _ids(model, ENCODED)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sizes = {0: "batch_size", 1: "encoder_sequence_length"}
    return Graph(Encoder(model.backbone.get_encoder()), inputs, ["last_hidden_state"], dict.fromkeys(inputs, sizes))


class JoinedLayer(DynamicLayer):
    """Keys and values of the encoded text: those that come in, or in the first step, when there are none, those made.

    Which of both is empty is known only when the graph runs; together they are as long as the encoded text is.
    """

    length: Any = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What there is, and behind it what is new: one of them is empty."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self._joined(self.keys, key_states), self._joined(self.values, value_states)
        return self.keys, self.values

    def _joined(self, old: Tensor, new: Tensor) -> Tensor:
        shape = (*new.shape[:2], self.length, new.shape[3])
        joined: Tensor = torch.onnx.ops.symbolic("Concat", [old, new], {"axis": 2}, dtype=new.dtype, shape=shape)
        return joined


def make_once(model: Any) -> None:
    """Let a decoder's graph see the encoded text only where no keys and values of it come in."""
    import onnx_ir as ir

    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    encoded, old = inputs[ENCODED_TEXT], inputs[f"{PAST}.0.encoder.key"]
    uses = list(encoded.uses())
    numbers = {f"{ENCODED_TEXT}.{number}": np.array([number], dtype=np.int64) for number in (0, 1)}
    zero, one = (ir.Value(name=name, const_value=ir.tensor(value)) for name, value in numbers.items())
    for constant in (zero, one):
        graph.register_initializer(constant)
    made = [
        cached_length := ir.node("Shape", [old], {"start": 2, "end": 3}),
        length := ir.node("Shape", [encoded], {"start": 1, "end": 2}),
        empty := ir.node("Equal", [cached_length.outputs[0], zero]),
        end := ir.node("Where", [empty.outputs[0], length.outputs[0], zero]),
        fresh := ir.node("Slice", [encoded, zero, end.outputs[0], one]),
    ]
    graph.insert_before(graph[0], made)
    for node, index in uses:
        node.replace_input_with(index, fresh.outputs[0])


class SecondDecoder(nn.Module):
    """One step of an encoder–decoder's decoder; what it makes of the encoded text is made once."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self, encoder_attention_mask: Tensor, input_ids: Tensor, encoder_hidden_states: Tensor, *past: Tensor
    ) -> tuple[Any, ...]:
        """Scores, then key and value of the decoder's and of the encoded tokens of each layer."""
        across: Any = _cache(past[2::4], past[3::4], JoinedLayer)
        for layer in across.layers:
            layer.length = encoder_attention_mask.shape[1]
        cache = EncoderDecoderCache(_cache(past[0::4], past[1::4], DynamicLayer), across)
        cache.is_updated = dict.fromkeys(cache.is_updated, False)  # else what comes in is taken as it is
        logits = self.backbone(
            encoder_outputs=(encoder_hidden_states,),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits, *cached(cache).values()


def _cache(keys: Sequence[Tensor], values: Sequence[Tensor], kind: type[DynamicLayer]) -> Cache:
    layers: list[Any] = []
    for key, value in zip(keys, values, strict=True):
        layer = kind()
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
        layers.append(layer)
    return Cache(layers=layers)


def second_decoder_graph(model: MultiTaskModel) -> Graph:
    """The graph of an encoder–decoder's decoder."""
    ids = _ids(model, ENCODED)
    with torch.no_grad():
        encoded = model.backbone.get_encoder()(input_ids=ids).last_hidden_state
        filled = model.backbone(
            encoder_outputs=(encoded,), decoder_input_ids=ids[:, :CACHED], use_cache=True
        ).past_key_values
    past = {f"{PAST}.{name}": tensor for name, tensor in cached(filled).items()}
    inputs = {
        "encoder_attention_mask": torch.ones_like(ids),
        "input_ids": ids[:, :TOKENS],
        ENCODED_TEXT: encoded,
        **past,
    }
    lengths = {"decoder": "past_decoder_sequence_length", "encoder": "encoder_sequence_length_out"}
    dynamic: dict[str, dict[int, str]] = {name: {0: "batch_size", 2: lengths[name.split(".")[2]]} for name in past}
    dynamic["input_ids"] = {0: "batch_size", 1: "decoder_sequence_length"}
    dynamic["encoder_attention_mask"] = {0: "batch_size", 1: "encoder_sequence_length"}
    dynamic[ENCODED_TEXT] = {0: "batch_size", 1: "encoder_sequence_length_new"}
    outputs = ["logits", *(name.replace(PAST, PRESENT) for name in past)]
    return Graph(SecondDecoder(model.backbone), inputs, outputs, dynamic, make_once)


@torch.no_grad()
def written_scores(
    model: MultiTaskModel, sessions: Mapping[str, Any], batch: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Scores of the next token at all real tokens of a batch, [tokens, vocabulary]: the model's, and its graphs'.

    The graphs take the text in two steps, so that their caches are used.
    """
    if model.backbone.config.is_encoder_decoder:
        return _second_scores(model, sessions, batch)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    takes = signature(model.backbone.forward).parameters
    own = {"position_ids": positions} if "position_ids" in takes else {}
    expected = model.backbone(input_ids=ids, attention_mask=mask, **own).logits

    def step(tokens: slice, past: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {"input_ids": ids[:, tokens], "position_ids": positions[:, tokens]}
        return {**inputs, "attention_mask": mask[:, : tokens.stop], **past}

    found = _in_two_steps(sessions["model"], step, ids)
    return expected[mask.bool()], found[mask.bool()]


def _second_scores(
    model: MultiTaskModel, sessions: Mapping[str, Any], batch: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ids = batch["labels"].clamp(min=0) if "labels" in batch else given["input_ids"]
    expected = model.backbone(**given, decoder_input_ids=ids).logits
    (encoded,) = run_session(sessions["encoder_model"], given).values()

    def step(tokens: slice, past: dict[str, Tensor]) -> dict[str, Tensor]:
        text = {"encoder_attention_mask": given["attention_mask"], ENCODED_TEXT: encoded}
        return {**text, "input_ids": ids[:, tokens], **past}

    found = _in_two_steps(sessions["decoder_model_merged"], step, ids)
    return expected.flatten(0, 1), found.flatten(0, 1)


def _in_two_steps(session: Any, step: Callable[[slice, dict[str, Tensor]], dict[str, Tensor]], ids: Tensor) -> Tensor:
    """Scores [batch, tokens, vocabulary] of a text whose second half follows with a cache."""
    half, past, scores = ids.shape[1] // 2, _empty(session, len(ids)), []
    for tokens in (slice(0, half), slice(half, ids.shape[1])):
        outputs = run_session(session, step(tokens, past))
        scores.append(outputs.pop("logits"))
        past = {name.replace(PRESENT, PAST): value for name, value in outputs.items()}
    return torch.cat(scores, dim=1)


def write_greedily(sessions: Mapping[str, Any], inputs: Mapping[str, Tensor], count: int) -> Tensor:
    """The likeliest next tokens [batch, count] int64 of texts, one after the other, from their graphs.

    Whatever an encoder–decoder's own first token is, it begins with token 0: this is for measuring.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    fixed: dict[str, Tensor] = {}
    session = sessions.get("model")
    if session is None:
        session, encoder = sessions["decoder_model_merged"], sessions["encoder_model"]
        fixed = {"encoder_attention_mask": mask, ENCODED_TEXT: run_session(encoder, inputs)["last_hidden_state"]}
        ids = torch.zeros(len(ids), 1, dtype=torch.int64)
    past, written = _empty(session, len(ids)), list[Tensor]()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for _ in range(count):
        step = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        outputs = run_session(session, {**step, **fixed, **past})
        ids = outputs.pop("logits")[:, -1:].argmax(-1)
        past = {name.replace(PRESENT, PAST): value for name, value in outputs.items()}
        mask, positions = torch.cat([mask, torch.ones_like(ids)], dim=1), positions[:, -1:] + 1
        written.append(ids)
    return torch.cat(written, dim=1)


def _empty(session: Any, batch: int) -> dict[str, Tensor]:
    """A cache with nothing in it."""
    inputs = [one for one in session.get_inputs() if one.name.startswith(PAST)]
    return {one.name: torch.zeros(batch, one.shape[1], 0, one.shape[3]) for one in inputs}
