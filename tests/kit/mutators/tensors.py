"""Ways to damage a safetensors file: its header, and the numbers behind it."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.kit.mutators.json_values import (
    STRINGS,
    added,
    deep,
    missing,
    odd_constants,
    remote_code,
    renamed,
    retyped,
    scaled,
)
from tests.kit.mutators.raw import Mutator, flip


def header_length(content: bytes, rng: random.Random) -> bytes:
    """Lie about the header's length."""
    true = int.from_bytes(content[:8], "little")
    lengths = (
        0,
        1,
        2,
        true - 1,
        true + 1,
        true + 8,
        len(content),
        len(content) - 8,
        10**8,
        10**8 + 1,
        2**63,
        2**64 - 1,
    )
    return (rng.choice(lengths) % 2**64).to_bytes(8, "little") + content[8:]


def with_header(content: bytes, change: Mutator, rng: random.Random) -> bytes:
    """Change the header, with the right length before it."""
    length = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def entry(content: bytes, rng: random.Random) -> bytes:
    """Lie about one tensor's dtype, shape or offsets."""
    tree = json.loads(content)
    name, other = rng.choice(list(tree)), rng.choice(list(tree))
    wrong: tuple[Any, ...] = (
        *(
            {"dtype": d}
            for d in ("F32", "F64", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", None, 1)
        ),
        *(
            {"shape": s}
            for s in ([], [0], [-1, 32], [2**62, 4], [2**63], [1] * 100, [0.5], ["32"], None, 32, [10**9] * 3)
        ),
        *({"data_offsets": o} for o in ([0, 0], [4, 0], [-4, 0], [0, 2**63], [0, 10**12], [0], None, "0", [0.0, 4.0])),
        {"data_offsets": tree[other].get("data_offsets")},
        {"shape": list(reversed(tree[name].get("shape", [])))},
        dict(tree[other]),
    )
    tree[name] = {**tree[name], **rng.choice(wrong)}
    return json.dumps(tree).encode()


def head_settings(content: bytes, rng: random.Random) -> bytes:
    """Damage the settings in the metadata of a head."""
    tree = json.loads(content)
    metadata = tree.setdefault("__metadata__", {})
    if "head" in metadata:
        change = rng.choice((retyped, missing, renamed, scaled, added, deep, odd_constants, remote_code, flip))
        metadata["head"] = change(metadata["head"].encode(), rng).decode("utf-8", "replace")
    else:
        metadata[rng.choice(("head", "labels", "pooling", "normalize"))] = rng.choice(
            (*STRINGS, "[1]", "null", "{}", "[[]]")
        )
    return json.dumps(tree).encode()


def in_header(change: Mutator) -> Mutator:
    def changed(content: bytes, rng: random.Random) -> bytes:
        return with_header(content, change, rng)

    changed.__name__ = f"header_{change.__name__}"
    return changed


def not_finite(content: bytes, rng: random.Random) -> bytes:
    """Put NaN or infinity among the weights."""
    start = 8 + int.from_bytes(content[:8], "little")
    offset = start + 4 * rng.randrange(max(1, (len(content) - start) // 4))
    odd = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff"))
    return content[:offset] + odd + content[offset + 4 :]
