"""Ways to damage the bytes of any file."""

from __future__ import annotations

import random
from collections.abc import Callable

Mutator = Callable[[bytes, random.Random], bytes]


def flip(content: bytes, rng: random.Random) -> bytes:
    """Flip some bits."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 4, 64)) if content else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_early(content: bytes, rng: random.Random) -> bytes:
    """Flip some bits where headers are."""
    return flip(content[:256], rng) + content[256:]


def truncate(content: bytes, rng: random.Random) -> bytes:
    """Cut the end off, perhaps all of it."""
    return content[: rng.choice((0, 1, 7, 8, 9, rng.randrange(len(content) + 1), max(0, len(content) - 1)))]


def extend(content: bytes, rng: random.Random) -> bytes:
    """Let something follow."""
    return content + rng.choice((b"\0", b"\n", b"}", content, bytes(1 << 16), rng.randbytes(100)))


def splice(content: bytes, rng: random.Random) -> bytes:
    """Copy one part over another."""
    source, target = rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)
    part = content[source : source + rng.choice((1, 8, 100, 1000))]
    return content[:target] + part + content[target + rng.choice((0, len(part))) :]


def blank(content: bytes, rng: random.Random) -> bytes:
    """Put zeros, ones or noise in the place of a part."""
    start, size = rng.randrange(len(content) + 1), rng.choice((1, 4, 8, 100, 1000))
    filler = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    return content[:start] + filler + content[start + size :]


def drop(content: bytes, rng: random.Random) -> bytes:
    """Take a part out."""
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.choice((1, 2, 8, 100)) :]


def replace(content: bytes, rng: random.Random) -> bytes:
    """Another file altogether."""
    other = (
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\0" * 64,
        b"PK\x03\x04",
        b"\x80\x04K\x01.",
        b"\x93NUMPY\x01\0",
        b"<html></html>",
    )
    return rng.choice((*other, b"version https://git-lfs.github.com/spec/v1\n", rng.randbytes(1000)))


def number(content: bytes, rng: random.Random) -> bytes:
    """Write a number of 2, 4 or 8 bytes somewhere: lengths and offsets of whatever format it is."""
    size = rng.choice((2, 4, 8))
    start, written = rng.randrange(max(1, len(content))), rng.choice((0, 1, 2**15, 2**31, 2**62, 2**63, 2**64 - 1))
    return content[:start] + (written % 2 ** (8 * size)).to_bytes(size, "little") + content[start + size :]
