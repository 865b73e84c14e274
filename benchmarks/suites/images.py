"""Small pieces the image tasks share: drawing to 56 × 56, splitting by group, writing a task's folder."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from epmq.files import write_json

SIDE = 56
SPLITS = ("test", "validation", "train")
# a handful of drawings in the sources are scanned at poster size and take most of the time to read
MOST_PIXELS = 2_000_000


@dataclass
class Pool:
    """All usable images of a source, before they are split.

    Attributes:
        labels: names of the classes.
        images: uint8 arrays [56, 56, 3].
        targets: class index of each image.
        groups: what must not be cut by a split (an emoji, a font family …), one hashable an image.
    """

    labels: list[str]
    images: list[np.ndarray] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    groups: list[Hashable] = field(default_factory=list)

    def add(self, image: np.ndarray, target: int, group: Hashable | None = None) -> None:
        """Add one image; without a `group` it is a group of its own."""
        self.images.append(image)
        self.targets.append(target)
        self.groups.append(len(self.images) if group is None else group)


def grey(pixels: np.ndarray) -> np.ndarray:
    """A grey image [height, width] uint8 as [56, 56, 3] uint8."""
    scaled = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.repeat(np.asarray(scaled)[:, :, None], 3, axis=2)


def picture(path: Path, margin: int = 2) -> np.ndarray | None:
    """An image file on a white 56 × 56 square, in its own proportions; None where it is blank, broken or huge."""
    try:
        with Image.open(path) as file:
            if file.width * file.height > MOST_PIXELS:
                return None
            image = file.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    box = image.getchannel("A").getbbox()
    if box is None:
        return None
    canvas = _centred(image.crop(box), SIDE - 2 * margin)
    return None if canvas.std() < 1.0 else canvas


def _centred(image: Image.Image, side: int) -> np.ndarray:
    """`image` (RGBA) scaled to fit `side` and laid in the middle of a white square."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIDE, SIDE), "white")
    canvas.alpha_composite(image, ((SIDE - width) // 2, (SIDE - height) // 2))
    return np.asarray(canvas.convert("RGB"))


def glyph(font: ImageFont.FreeTypeFont, character: str, margin: int = 6) -> np.ndarray | None:
    """One character in black, cropped and laid in the middle of a white square; None where it has no ink."""
    left, top, right, bottom = font.getbbox(character)
    if right <= left or bottom <= top:
        return None
    ink = Image.new("L", (int(right - left) + 1, int(bottom - top) + 1), 0)
    ImageDraw.Draw(ink).text((-left, -top), character, font=font, fill=255)
    box = ink.getbbox()
    if box is None:
        return None
    black = Image.new("RGBA", ink.size, "black")
    black.putalpha(ink)
    return _centred(black.crop(box), SIDE - 2 * margin)


def is_blank_like(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether the font draws `character` as it draws a code point that no font has (its "missing" box)."""
    mask, missing = font.getmask(character), font.getmask("\U000fffff")
    return mask.size == missing.size and bytes(mask) == bytes(missing)


def without_copies(pool: Pool, key: Callable[[np.ndarray], bytes] = np.ndarray.tobytes) -> Pool:
    """Keep the first of the images that have the same `key`; those that occur in two classes are all dropped."""
    classes: dict[bytes, set[int]] = {}
    keys = [key(image) for image in pool.images]
    for name, target in zip(keys, pool.targets):
        classes.setdefault(name, set()).add(target)
    kept, seen = Pool(pool.labels), set()
    for name, image, target, group in zip(keys, pool.images, pool.targets, pool.groups):
        if len(classes[name]) == 1 and name not in seen:
            seen.add(name)
            kept.add(image, target, group)
    return kept


def thumbnail(image: np.ndarray) -> bytes:
    """A coarse key, the same for copies that differ by scaling: 14 × 14 means of the colours, in 16 levels."""
    blocks = image.reshape(14, SIDE // 14, 14, SIDE // 14, 3).mean((1, 3))
    return (blocks // 16).astype(np.uint8).tobytes()


def first_of_group(pool: Pool, most: int) -> Pool:
    """At most the first `most` images of each group."""
    counts: dict[Hashable, int] = {}
    kept = []
    for i, group in enumerate(pool.groups):
        counts[group] = counts.get(group, 0) + 1
        if counts[group] <= most:
            kept.append(i)
    return take(pool, kept)


def draw_by_class(pool: Pool, most: int, seed: int) -> Pool:
    """A seeded draw of at most `most` images a class."""
    order, targets = np.random.default_rng(seed).permutation(len(pool.images)), np.asarray(pool.targets)
    kept = np.concatenate([order[targets[order] == k][:most] for k in range(len(pool.labels))])
    return take(pool, np.sort(kept))


def take(pool: Pool, index: Sequence[int] | np.ndarray) -> Pool:
    """The images at the positions `index`."""
    return Pool(
        pool.labels,
        [pool.images[i] for i in index],
        [pool.targets[i] for i in index],
        [pool.groups[i] for i in index],
    )


def split_by_group(pool: Pool, sizes: dict[str, int], seed: int) -> dict[str, Pool]:
    """Cut a pool into splits so that no group occurs in two of them.

    Whole groups, in a seeded order, go to the test split until it has its size, then to the validation split;
    the rest is for training. Each split is then cut to its size by a seeded draw. Where the pool is small, the
    test and validation splits get no more than 40 % and 15 % of it.
    """
    rng = np.random.default_rng(seed)
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(pool.groups):
        members.setdefault(group, []).append(i)
    names = list(members)
    limits = {
        "test": min(sizes["test"], int(0.4 * len(pool.images))),
        "validation": min(sizes["validation"], int(0.15 * len(pool.images))),
        "train": len(pool.images),
    }
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    for position in rng.permutation(len(names)):
        split = next(split for split in SPLITS if len(parts[split]) < limits[split])
        parts[split].extend(members[names[position]])
    return {split: take(pool, rng.permutation(part)[: sizes[split]]) for split, part in parts.items()}


def write_splits(folder: Path, splits: dict[str, Pool], source: dict[str, Any]) -> None:
    """Write `<split>.npz` (images uint8 [n, 56, 56, 3], labels int64 [n]), `labels.json` and `source.json`."""
    for split, pool in splits.items():
        images, targets = np.stack(pool.images), np.asarray(pool.targets, dtype=np.int64)
        np.savez_compressed(folder / f"{split}.npz", images=images, labels=targets)
    write_json(folder / "labels.json", splits["train"].labels)
    write_json(folder / "source.json", source)


def debian_version(folder: Path, package: str) -> str:
    """Version of an unpacked Debian package, from the first line of its changelog."""
    for path in sorted((folder / "usr" / "share" / "doc" / package).glob("changelog*.gz")):
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as lines:
            first = lines.readline()
        if first.startswith(f"{package} (") or " (" in first:
            return first.split("(", 1)[1].split(")", 1)[0]
    return "as the machine's apt offers it"
