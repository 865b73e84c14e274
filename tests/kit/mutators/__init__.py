"""Ways to damage a file: functions of its bytes and a random generator, by name.

`MUTATORS` says which ones suit which files; those that take bytes suit all of them.
"""

from __future__ import annotations

import random
from fnmatch import fnmatch

from tests.kit.mutators.files import (
    cells,
    evil_pickle,
    huge_picture,
    odd_arrays,
    one_line,
    template_code,
    yaml_bomb,
    yaml_code,
    yaml_field,
)
from tests.kit.mutators.json_values import (
    added,
    deep,
    missing,
    odd_constants,
    remote_code,
    renamed,
    retyped,
    scaled,
)
from tests.kit.mutators.raw import (
    Mutator,
    blank,
    drop,
    extend,
    flip,
    flip_early,
    number,
    replace,
    splice,
    truncate,
)
from tests.kit.mutators.tensors import entry, head_settings, header_length, in_header, not_finite

BYTES: tuple[Mutator, ...] = (flip, flip, flip_early, truncate, extend, splice, blank, drop, replace, number)
JSON: tuple[Mutator, ...] = (
    *(retyped, retyped, missing, renamed, scaled, scaled, added, added),
    *(remote_code, deep, odd_constants),
)
HEADERS = tuple(
    in_header(change) for change in (entry, entry, entry, retyped, missing, renamed, scaled, deep, odd_constants)
)
SAFETENSORS: tuple[Mutator, ...] = (header_length, not_finite, *HEADERS)
# Pattern of a file's path → what suits it beside the bytes; the first that fits is taken.
MUTATORS: dict[str, tuple[Mutator, ...]] = {
    "*head*.safetensors": (*SAFETENSORS, *[in_header(head_settings)] * 8),
    "*.safetensors": SAFETENSORS,
    "*.json": JSON,
    "*.yaml": (yaml_bomb, yaml_code, *[yaml_field] * 4),
    "*.jsonl": (one_line,),
    "*.csv": (cells,),
    "*.npz": (odd_arrays,),
    "*.png": (huge_picture,),
    "*.jinja": (template_code,),
    "*.bin": (evil_pickle,),
    "*": (),
}


def choose(path: str, rng: random.Random) -> Mutator:
    """A way to damage a file: of those for its bytes or of those for its format; the latter a little more often."""
    own = next(mutators for pattern, mutators in MUTATORS.items() if fnmatch(path, pattern))
    return rng.choice(own if own and rng.random() < 0.6 else BYTES)
