"""Ways to damage JSON: other values, names and nesting."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

DEEP = 100_000
NUMBERS = (0, 1, -1, 2, 7, 2**16, 10**9, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(10**9), 0.5, 1e308)
STRINGS = (
    *("", "\0", "\ud800", "../../canary", "/etc/passwd", "canary", "x" * 100_000, "None", "1e999"),
    *("{{ 1 }}", "%s", "ß", "float32", "cuda", "owner/name", "é/../..", "LABEL_0", "__class__"),
    *("pipeline", "PreTrainedModel", "logging"),
)
OTHERS: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [None], [1, "x"], {"": None}, {"a": {"b": []}}, [-1], [10**9]),
)
# Fields that configs may have and these do not.
FIELDS = (
    *("num_labels", "id2label", "label2id", "dtype", "torch_dtype", "quantization_config", "auto_map"),
    *("architectures", "tie_word_embeddings", "model_type", "attn_implementation", "_attn_implementation"),
    *("rope_scaling", "head_dim", "rope_parameters", "layer_types", "is_decoder", "is_encoder_decoder"),
    *("problem_type", "text_config", "pad_token_id", "vision_config", "tokenizer_class"),
    *("image_processor_type", "processor_class", "added_tokens_decoder", "sub_configs"),
    *("transformers_version", "weight_map", "alpha_pattern", "rank_pattern", "use_dora", "auto_mapping"),
    *("base_model_class", "model_max_length", "extra_special_tokens", "attribute_map", "num_hidden_layers"),
    *("hidden_size", "vocab_size"),
)
CODE = {
    "AutoConfig": "canary.Canary",
    "AutoModel": "canary.Canary",
    "AutoTokenizer": ["canary.Canary", None],
    "AutoImageProcessor": "canary.Canary",
    "AutoProcessor": "canary.Canary",
}


def value(rng: random.Random) -> Any:
    """Something that a field should not hold."""
    return rng.choice(rng.choice((NUMBERS, STRINGS, OTHERS)))


def parsed(content: bytes) -> Any:
    """The JSON in a file; the first line's, where every line is an object."""
    try:
        return json.loads(content)
    except ValueError:
        return json.loads(content.splitlines()[0])


def entries(tree: Any) -> list[tuple[Any, Any]]:
    """All (container, key) in nested lists and dicts."""
    pairs: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in items:
            pairs.append((node, key))
            pending.append(child)
    return pairs


def retyped(content: bytes, rng: random.Random) -> bytes:
    """Put something else in the place of one value, or of two."""
    tree = parsed(content)
    for _ in range(rng.choice((1, 1, 2))):
        if pairs := entries(tree):
            node, key = rng.choice(pairs)
            node[key] = copy.deepcopy(value(rng))  # the second entry may lie within what was put into the first
    return json.dumps(tree).encode()


def missing(content: bytes, rng: random.Random) -> bytes:
    """Take one entry out."""
    tree = parsed(content)
    if pairs := entries(tree):
        node, key = rng.choice(pairs)
        del node[key]
    return json.dumps(tree).encode()


def renamed(content: bytes, rng: random.Random) -> bytes:
    """Call one entry something else."""
    tree = parsed(content)
    pairs = [(node, key) for node, key in entries(tree) if isinstance(node, dict)]
    if pairs:
        node, key = rng.choice(pairs)
        node[rng.choice((key + "x", key[:-1], *STRINGS))] = node.pop(key)
    return json.dumps(tree).encode()


def scaled(content: bytes, rng: random.Random) -> bytes:
    """Lie about one number."""
    tree = parsed(content)
    pairs = [(node, key) for node, key in entries(tree) if type(node[key]) in (int, float)]
    if pairs:
        node, key = rng.choice(pairs)
        node[key] = rng.choice((node[key] * 2, node[key] + 1, -node[key], str(node[key]), *NUMBERS))
    return json.dumps(tree).encode()


def added(content: bytes, rng: random.Random) -> bytes:
    """Add a field that the format knows, with something else in it."""
    tree = parsed(content)
    if isinstance(tree, dict):
        tree[rng.choice(FIELDS)] = value(rng)
    return json.dumps(tree).encode()


def remote_code(content: bytes, rng: random.Random) -> bytes:
    """Name code that lies beside the file."""
    tree = parsed(content)
    if isinstance(tree, dict):
        tree["auto_map"] = CODE
        name = rng.choice(("model_type", "architectures", "tokenizer_class", "image_processor_type", "processor_class"))
        if rng.random() < 0.7:
            tree[name] = ["Canary"] if name == "architectures" else "Canary"
    return json.dumps(tree).encode()


def deep(content: bytes, rng: random.Random) -> bytes:
    """Nest one value, or everything, deeper than any reader goes."""
    depth = rng.choice((500, 990, 3000, DEEP))
    opened, closed = rng.choice((("[", "]"), ('{"a":', "}")))
    bomb = opened * depth + "1" + closed * depth
    tree = parsed(content)
    pairs = entries(tree)
    if not pairs or rng.random() < 0.3:
        return bomb.encode()
    node, key = rng.choice(pairs)
    node[key] = "bomb"
    return json.dumps(tree).replace('"bomb"', bomb, 1).encode()


def odd_constants(content: bytes, rng: random.Random) -> bytes:
    """Values that Python's reader takes and JSON does not have, keys that are there twice, numbers of many digits."""
    tree = parsed(content)
    if pairs := entries(tree):
        node, key = rng.choice(pairs)
        node[key] = "bomb"
    odd = ("NaN", "-Infinity", "1e999", "9" * 5000, '{"a": 1, "a": 2}', '"\\ud800"', '"\\u0000"')
    return json.dumps(tree).replace('"bomb"', rng.choice(odd), 1).encode()
