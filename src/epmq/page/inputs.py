"""What a page does with a text or a picture before the model gets it: a tokenizer's or a processor's settings.

They are tried when the page is made: what the page's own code makes of some inputs is held against what Python makes
of them.
"""

import json
from collections.abc import Sequence
from importlib.resources import as_file, files
from typing import Any

import numpy as np

from epmq.data.encoding import encode
from epmq.data.examples import Examples
from epmq.data.processors import image_processor_of, tokenizer_of
from epmq.errors import InputError
from epmq.packages import call
from epmq.page.vendored import CODE, TOKENIZERS

# A tokenizer without a limit of its own says a number that is larger.
LARGEST_LIMIT = 1_000_000
TEXTS = (
    "two words",
    "A film to remember, by Zoë & François: it's well-acted, isn't it?",
    "Call +1 (555) 010-9999 or write to someone@example.org; it costs $1,234.56!",
    "  tabs\tand  spaces \n and two lines ",
    "naïve café 東京 привет ひらがな 한국어 😀👍🏽 … – “quoted”",
    "antidisestablishmentarianism and floccinaucinihilipilification in CAPITALS",
    "long " * 3000,
)
# Width and height of pictures that are tried.
SIZES = ((64, 64), (100, 37), (31, 90), (300, 200))
# Grey levels of 255 by which pixels of noise may differ on average. Libraries resize rows or columns first, each with
# rounding of its own; another filter, or a place further left, is off by more than ten.
LEVELS = 1.0


def text_settings(tokenizer: Any, config: dict[str, Any]) -> dict[str, Any]:
    """What a page has to know of a tokenizer.

    Returns:
        `tokenizer` and `config`, as its library in the browser takes them; `limit`, tokens that a text is cut to, or
        None; `cut`, the side that it is cut at.

    Raises:
        InputError: it has no fast form, which is what `tokenizer.json` holds.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise InputError(f"{type(tokenizer).__name__} has no tokenizer.json, which is all that a browser reads")
    content = {**json.loads(core.to_str()), "truncation": None, "padding": None}
    limits = [tokenizer.model_max_length, config.get("max_position_embeddings") or LARGEST_LIMIT]
    limit = min(limits)
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return {
        "tokenizer": content,
        "config": special,
        "limit": None if limit >= LARGEST_LIMIT else int(limit),
        "cut": tokenizer.truncation_side,
    }


def picture_settings(processor: Any) -> dict[str, Any]:
    """What a page has to know of an image processor.

    Returns:
        `size` (`width` and `height`, or `shortest_edge`) and `crop` (`width` and `height`), each None where that is
        not done; `filter`, as Pillow numbers it; a pixel becomes (pixel · `factor` − `mean`) / `std`.

    Raises:
        InputError: it resizes to another kind of size.
    """

    def does(name: str) -> bool:
        return bool(getattr(processor, f"do_{name}", False))

    size = _named_size(processor.size) if does("resize") else None
    if size is not None and size.keys() not in ({"width", "height"}, {"shortest_edge"}):
        raise InputError(
            f"{type(processor).__name__} resizes to {size}; a page knows width and height, or shortest_edge"
        )
    normal = does("normalize")
    return {
        "size": size,
        "filter": int(processor.resample if processor.resample is not None else 2),
        "crop": _named_size(processor.crop_size) if does("center_crop") else None,
        "factor": processor.rescale_factor if does("rescale") else 1,
        "mean": list(processor.image_mean) if normal else [0, 0, 0],
        "std": list(processor.image_std) if normal else [1, 1, 1],
    }


def _named_size(size: Any) -> dict[str, int]:
    return {name: int(value) for name, value in dict(size).items() if value is not None}


def try_texts(processor: Any, settings: dict[str, Any]) -> None:
    """Hold the tokens of some texts against those that Python makes of them.

    Raises:
        InputError: they are others; the text is named.
        RuntimeError: node is missing.
    """
    batches = encode(Examples("text", list(TEXTS)), processor, 1, settings["limit"])
    expected = [batch["input_ids"][0].tolist() for batch in batches]
    for text, ours, theirs in zip(TEXTS, expected, _made("text", settings, TEXTS)):
        if ours != theirs:
            name = type(tokenizer_of(processor)).__name__
            raise InputError(f"{name}: in a browser it makes other tokens of {text[:70]!r}")


def try_pictures(processor: Any, settings: dict[str, Any]) -> None:
    """Hold what becomes of some pictures against what Python makes of them; errors as in `try_texts`."""
    noise = np.random.default_rng(0)
    name = type(image_processor_of(processor)).__name__
    shapes = set()
    pictures = [noise.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in SIZES]
    given = [{"width": w, "height": h, "data": one.ravel().tolist()} for (w, h), one in zip(SIZES, pictures)]
    for picture, found in zip(pictures, _made("picture", settings, given)):
        pixels = next(encode(Examples("image", [picture]), processor))["pixel_values"][0].numpy()
        shapes.add(pixels.shape)
        if pixels.shape != (3, found["height"], found["width"]):
            raise InputError(f"{name}: a page makes pictures of another size: {found['width']} × {found['height']}")
        error = np.abs(pixels.ravel() - np.array(found["values"], np.float32)).reshape(3, -1).mean(1)
        if (levels := float((error * settings["std"] / settings["factor"]).mean())) > LEVELS:
            raise InputError(f"{name}: a page makes other pixels, by {levels:.1f} grey levels on average")
    if len(shapes) > 1:
        raise InputError(f"{name}: pictures of several shapes become inputs of several shapes; the model takes one")


def _made(kind: str, settings: dict[str, Any], examples: Sequence[Any]) -> Any:
    """What a page's own code makes of texts or pictures, run by node."""
    with as_file(files("epmq.page")) as folder:
        scripts = {name: str(folder / f"{name}.js") for name in ("text", "picture")}
        scripts["tokenizers"] = str(TOKENIZERS.fetch() / CODE) if kind == "text" else ""
        content = {"kind": kind, "scripts": scripts, "settings": settings, "examples": list(examples)}
        return json.loads(call(["node", str(folder / "try.cjs")], "a page cannot be tried", text=json.dumps(content)))
