"""Codes in the blocks of GGUF, each of which computes (code − zero point) · scale exactly, in float32."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from epmq.quantization.grid import Grid, QuantizedTensor

Bytes = NDArray[np.uint8]
# Weights of a block with one scale, and of one with scales of its parts.
SMALL, LARGE = 32, 256
# Weights that are packed at once.
CHUNK = 1 << 22


@dataclass(frozen=True)
class BlockType:
    """One of GGUF's types.

    Attributes:
        name: as ggml calls it.
        weights: that make a block; they share one float16 scale.
        bytes: of a block.
        pack: levels (code − zero point) [blocks, weights] int16, their zero points [blocks, 1] int16 and scales
            [blocks, 2] uint8 (a float16) → blocks [blocks, bytes].
    """

    name: str
    weights: int
    bytes: int
    pack: Callable[[NDArray[np.int16], NDArray[np.int16], Bytes], Bytes]


def block_type(grid: Grid, columns: int) -> BlockType | None:
    """The smallest type that holds every weight [out, columns] on a grid exactly; None if there is none."""
    large = grid.group_size == -1 and columns % LARGE == 0
    if columns % SMALL:
        return None
    if grid.bits == 8:
        return Q8_0 if grid.symmetric else None
    if large and grid.bits == 2:
        return Q2_K  # TQ2_0 is smaller, but GPUs do not know it
    if large and grid.bits == 3 and grid.symmetric:
        return Q3_K
    if grid.bits < 4 or grid.symmetric:
        return Q4_0
    return Q4_K if large else Q5_0


def pack_rows(weight: QuantizedTensor, kind: BlockType) -> Iterator[Bytes]:
    """The blocks of a quantized tensor, [rows, bytes a row], some rows at a time.

    Its scales are such that float16 holds them.
    """
    rows, columns = weight.codes.shape
    width = weight.grid.width(columns)
    for part in torch.arange(rows).split(max(1, CHUNK // columns)):
        scale = weight.scale[part].to(torch.float16)
        zero = weight.zero_point[part].to(torch.int16)
        levels = weight.codes[part].to(torch.int16).reshape(len(part), -1, width) - zero.unsqueeze(-1)
        repeats = width // kind.weights
        scales = scale.repeat_interleave(repeats, 1).reshape(-1, 1).numpy().view(np.uint8)
        zeros = (zero - weight.grid.lowest).repeat_interleave(repeats, 1).reshape(-1, 1).numpy()
        yield kind.pack(levels.reshape(-1, kind.weights).numpy(), zeros, scales).reshape(len(part), -1)


def _q4_0(levels: NDArray[np.int16], zeros: NDArray[np.int16], scales: Bytes) -> Bytes:
    """The scale, then levels + 8: the first half of the block in low nibbles, the second in high ones."""
    codes = (levels + 8).astype(np.uint8)
    return np.hstack([scales, codes[:, :16] | codes[:, 16:] << 4])


def _q5_0(levels: NDArray[np.int16], zeros: NDArray[np.int16], scales: Bytes) -> Bytes:
    """The scale, the fifth bits of levels + 16, and the other four as in Q4_0."""
    codes = (levels + 16).astype(np.uint8)
    low = codes & 15
    fifth = np.packbits(codes >> 4, axis=1, bitorder="little")
    return np.hstack([scales, fifth, low[:, :16] | low[:, 16:] << 4])


def _q8_0(levels: NDArray[np.int16], zeros: NDArray[np.int16], scales: Bytes) -> Bytes:
    """The scale, then levels as int8."""
    return np.hstack([scales, levels.astype(np.int8).view(np.uint8)])


def _q2_k(levels: NDArray[np.int16], zeros: NDArray[np.int16], scales: Bytes) -> Bytes:
    """Scale and minimum of each 16 as multiples (1, the zero point) of the scale; then unsigned codes."""
    parts = np.repeat((zeros << 4 | 1).astype(np.uint8), LARGE // 16, axis=1)
    return np.hstack([parts, _pairs((levels + zeros).astype(np.uint8)), scales, scales])


def _q3_k(levels: NDArray[np.int16], zeros: NDArray[np.int16], scales: Bytes) -> Bytes:
    """The third bits of levels + 4, the other two, and 33 − 32 for the scale of each 16."""
    codes = (levels + 4).astype(np.uint8)
    third = np.packbits((codes >> 2).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    parts = np.array([0x11] * 8 + [0xAA] * 4, np.uint8)  # 16 times 33: low four bits 1, high two bits 2
    return np.hstack([third, _pairs(codes & np.uint8(3)), np.broadcast_to(parts, (len(codes), 12)), scales])


def _q4_k(levels: NDArray[np.int16], zeros: NDArray[np.int16], scales: Bytes) -> Bytes:
    """Scale and minimum of each 32 as multiples (1, the zero point) of the scale; then unsigned codes."""
    zero, one = zeros.astype(np.uint8), np.ones_like(zeros, dtype=np.uint8)
    parts = [one, one, one, one, zero, zero, zero, zero, *[one | zero << 4] * 4]
    codes = (levels + zeros).astype(np.uint8).reshape(-1, 4, 2, 32)
    nibbles = (codes[:, :, 0] | codes[:, :, 1] << 4).reshape(-1, 128)
    return np.hstack([scales, scales, *parts, nibbles])


def _pairs(codes: Bytes) -> Bytes:
    """Two bits each: of 128 weights, the n-th 32 lie in the n-th pair of bits of 32 bytes."""
    parts = codes.reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    packed: Bytes = np.bitwise_or.reduce(parts, axis=2).reshape(-1, 64)
    return packed


Q4_0, Q5_0, Q8_0 = (
    BlockType("Q4_0", SMALL, 18, _q4_0),
    BlockType("Q5_0", SMALL, 22, _q5_0),
    BlockType("Q8_0", SMALL, 34, _q8_0),
)
Q2_K, Q3_K, Q4_K = (
    BlockType("Q2_K", LARGE, 84, _q2_k),
    BlockType("Q3_K", LARGE, 110, _q3_k),
    BlockType("Q4_K", LARGE, 144, _q4_k),
)
