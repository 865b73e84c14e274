"""Ways to damage a file: functions of its bytes and a random generator, by name.

`MUTATORS` says which ones suit which files; those that take bytes suit all of them.
"""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

Mutator = Callable[[bytes, random.Random], bytes]
CANARY = "canary"
DEEP = 100_000
NUMBERS = (0, 1, -1, 2, 7, 2**16, 10**9, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(10**9), 0.5, 1e308)
STRINGS = (
    *(
        "",
        "\0",
        "\ud800",
        "../../canary",
        "/etc/passwd",
        "canary",
        "x" * 100_000,
        "None",
        "1e999",
        "{{ 1 }}",
        "%s",
        "ß",
    ),
    *("float32", "cuda", "owner/name", "é/../..", "LABEL_0", "__class__", "pipeline", "PreTrainedModel", "logging"),
)
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    [1, "x"],
    {"": None},
    {"a": {"b": []}},
    [-1],
    [10**9],
)
# Fields that configs may have and these do not.
FIELDS = (
    *("num_labels", "id2label", "label2id", "dtype", "torch_dtype", "quantization_config", "auto_map", "architectures"),
    *("tie_word_embeddings", "model_type", "attn_implementation", "_attn_implementation", "rope_scaling", "head_dim"),
    *(
        "rope_parameters",
        "layer_types",
        "is_decoder",
        "is_encoder_decoder",
        "problem_type",
        "text_config",
        "pad_token_id",
    ),
    *(
        "vision_config",
        "tokenizer_class",
        "image_processor_type",
        "processor_class",
        "added_tokens_decoder",
        "sub_configs",
    ),
    *(
        "transformers_version",
        "weight_map",
        "alpha_pattern",
        "rank_pattern",
        "use_dora",
        "auto_mapping",
        "base_model_class",
    ),
    *("model_max_length", "extra_special_tokens", "attribute_map", "num_hidden_layers", "hidden_size", "vocab_size"),
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


# --- bytes ---------------------------------------------------------------------------------------------------------


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


# --- JSON ----------------------------------------------------------------------------------------------------------


def parsed(content: bytes) -> Any:
    """The JSON in a file; the first line's, where every line is an object."""
    try:
        return json.loads(content)
    except ValueError:
        return json.loads(content.splitlines()[0])


def places(tree: Any) -> list[tuple[Any, Any]]:
    """All (container, key) in nested lists and dicts."""
    found: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in items:
            found.append((node, key))
            pending.append(child)
    return found


def retyped(content: bytes, rng: random.Random) -> bytes:
    """Put something else in the place of one value, or of two."""
    tree = parsed(content)
    for _ in range(rng.choice((1, 1, 2))):
        if found := places(tree):
            node, key = rng.choice(found)
            node[key] = copy.deepcopy(value(rng))  # the second place may lie within what was put into the first
    return json.dumps(tree).encode()


def missing(content: bytes, rng: random.Random) -> bytes:
    """Take one entry out."""
    tree = parsed(content)
    if found := places(tree):
        node, key = rng.choice(found)
        del node[key]
    return json.dumps(tree).encode()


def renamed(content: bytes, rng: random.Random) -> bytes:
    """Call one entry something else."""
    tree = parsed(content)
    found = [(node, key) for node, key in places(tree) if isinstance(node, dict)]
    if found:
        node, key = rng.choice(found)
        node[rng.choice((key + "x", key[:-1], *STRINGS))] = node.pop(key)
    return json.dumps(tree).encode()


def scaled(content: bytes, rng: random.Random) -> bytes:
    """Lie about one number."""
    tree = parsed(content)
    found = [(node, key) for node, key in places(tree) if type(node[key]) in (int, float)]
    if found:
        node, key = rng.choice(found)
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
    found = places(tree)
    if not found or rng.random() < 0.3:
        return bomb.encode()
    node, key = rng.choice(found)
    node[key] = "bomb"
    return json.dumps(tree).replace('"bomb"', bomb, 1).encode()


def odd_constants(content: bytes, rng: random.Random) -> bytes:
    """Values that Python's reader takes and JSON does not have, keys that are there twice, numbers of many digits."""
    tree = parsed(content)
    if found := places(tree):
        node, key = rng.choice(found)
        node[key] = "bomb"
    odd = ("NaN", "-Infinity", "1e999", "9" * 5000, '{"a": 1, "a": 2}', '"\\ud800"', '"\\u0000"')
    return json.dumps(tree).replace('"bomb"', rng.choice(odd), 1).encode()


# --- safetensors ---------------------------------------------------------------------------------------------------


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
    """Lie about one tensor's dtype, shape or place."""
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
    place = start + 4 * rng.randrange(max(1, (len(content) - start) // 4))
    return content[:place] + rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff")) + content[place + 4 :]


# --- recipes -------------------------------------------------------------------------------------------------------


def yaml_bomb(content: bytes, rng: random.Random) -> bytes:
    """Aliases of aliases, or what is nested without end."""
    ten = ", ".join(["*a{}"] * 10)
    levels = "\n".join(f"a{i}: &a{i} [{ten.replace('{}', str(i - 1))}]" for i in range(1, 12))
    merged = "\n".join(f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 10)}]}}" for i in range(1, 12))
    field = rng.choice((b"base", b"experts", b"merge", b"samples", b"x"))
    bombs = (
        f"a0: &a0 [x, x]\n{levels}\n".encode() + field + b": *a11\n",
        f"b0: &b0 {{x: 1}}\n{merged}\n".encode() + field + b": *b11\n",
        field + b": &a [*a]\n",
        field + b": &a {<<: *a}\n",
        field + b": " + b"[" * DEEP,
        field + b": " + b"[" * 500 + b"]" * 500 + b"\n",
        field + b": " + b"{a: " * 3000 + b"1" + b"}" * 3000 + b"\n",
        b"- " * DEEP,
        b"? " * 3000,
        field + b": " + b"9" * 5000 + b"\n",
        field + b": 0x" + b"f" * 10000 + b"\n",
        field + b": " + b":".join([b"59"] * 5000) + b"\n",
        field + b": 2001-99-99\n",
        field + b": !!binary x\n",
        field + b": !!timestamp x\n",
        b"? [a, b]\n: 1\n",
        b"? {a: b}\n: 1\n",
    )
    return rng.choice((b"", content)) + rng.choice(bombs)


def yaml_code(content: bytes, rng: random.Random) -> bytes:
    """Tags that a careless reader makes objects of."""
    tags = (
        b"!!python/object/apply:os.system ['touch canary']",
        b"!!python/object/new:subprocess.Popen [['touch', 'canary']]",
        b"!!python/name:os.system ''",
        b"!!python/module:canary ''",
        b"!!python/object/apply:builtins.open ['canary', 'w']",
    )
    field = rng.choice((b"base", b"output", b"samples", b"x"))
    return content + field + b": " + rng.choice(tags) + b"\n"


def yaml_field(content: bytes, rng: random.Random) -> bytes:
    """Put something else in the place of one value of a recipe, or add a field."""
    import yaml

    tree = yaml.safe_load(content)
    node, key = rng.choice(places(tree))
    if isinstance(node, dict) and rng.random() < 0.5:
        more = (
            "head",
            "dataset",
            "merge",
            "quantize",
            "device",
            "seed",
            "samples",
            "batch_size",
            "max_length",
            "format",
        )
        key = rng.choice((*more, "text", "label", "subset", "split", "activations", "bits", "task_weights", "scaling"))
    node[key] = value(rng)
    return yaml.safe_dump(tree).encode()


# --- data ----------------------------------------------------------------------------------------------------------


def one_line(content: bytes, rng: random.Random) -> bytes:
    """Damage one line of JSON, and leave the others."""
    lines = content.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = rng.choice((retyped, missing, renamed, scaled, deep, odd_constants, flip))(lines[place], rng)
    return b"\n".join(lines) + b"\n"


def cells(content: bytes, rng: random.Random) -> bytes:
    """Damage one cell of a csv file."""
    rows = [line.split(b",") for line in content.splitlines()]
    row = rng.choice(rows)
    odd = (
        b"",
        b"\0",
        b'"',
        b'""',
        b"\xff\xfe",
        b"1" * 5000,
        b"x" * 200_000,
        b"-1",
        b"1.5",
        b"9" * 30,
        b"a,b",
        b"\r",
        b'"a\nb',
    )
    row[rng.randrange(len(row))] = rng.choice(odd)
    return b"\n".join(b",".join(row) for row in rows) + b"\n"


def npy(descr: str, shape: str, data: bytes = b"") -> bytes:
    """An array as numpy writes it, with whatever it says of itself."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def odd_arrays(content: bytes, rng: random.Random) -> bytes:
    """Arrays that lie about their shape, or would have to be unpickled, or are a bomb."""
    pickled = b"\x80\x04cposix\nsystem\n(S'touch canary'\ntR."
    odd = (
        npy("'|u1'", "(1000000000, 100, 100, 3)"),
        npy("'|u1'", "(9223372036854775807, 9223372036854775807, 3, 3)"),
        npy("'|u1'", "(-1, 32, 32, 3)", bytes(3072)),
        npy("'|u1'", "(1, 32, 32, 3)", bytes(100)),
        npy("'|u1'", "(0, 32, 32, 3)"),
        npy("'|u1'", "(4, 0, 0, 3)"),
        npy("'|u1'", "(4, 1, 1, 3)", bytes(12)),
        npy("'|O'", "(1,)", pickled),
        npy("[('a', '|O')]", "(1,)", pickled),
        npy("'|V1000000000'", "(1000,)"),
        npy("__import__('os').system('touch canary')", "(1,)"),
        npy("'|u1'", "((((" * 200),
        npy("'|u1'", "(True, 'x')"),
        npy("'<f4'", "(4, 32, 32, 3)", bytes(4 * 32 * 32 * 3 * 4)),
        b"\x93NUMPY\x03\x00\xff\xff\xff\x7f{",
        b"\x93NUMPY\x09\x09",
        pickled,
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("images", "labels"):
            bad = name == "images" or rng.random() < 0.3
            archive.writestr(f"{name}.npy", rng.choice(odd) if bad else npy("'<i8'", "(4,)", bytes(32)))
        archive.writestr("../../canary", b"x")
    return file.getvalue()


def huge_picture(content: bytes, rng: random.Random) -> bytes:
    """A picture whose header says that it is very large."""
    import struct
    import zlib

    side = rng.choice((0, 1, 20_000, 100_000, 2**31 - 1))
    header = struct.pack(">IIBBBBB", side, side, rng.choice((8, 16, 3)), rng.choice((0, 2, 3, 6)), 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]


def template_code(content: bytes, rng: random.Random) -> bytes:
    """A chat template that reaches for what it should not."""
    return rng.choice(
        (
            b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
            b"{{ cycler.__init__.__globals__.os.system('touch canary') }}",
            b"{% include '/etc/passwd' %}",
            b"{{ messages[10**9].content }}",
            b"{{ 1 / 0 }}",
            b"{% for",
            b"{{ raise_exception('no') }}",
            b"{{ undefined.attribute }}",
            b"{{ 'x' * 10**12 }}",
            b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            b"{{ range(10**9) | list }}",
            b"{{ messages | tojson(indent=10**9) }}",
            b"\xff\xfe",
        )
    )


def evil_pickle(content: bytes, rng: random.Random) -> bytes:
    """A pickle that would run code, or that is nested, large or nothing of the kind."""
    return rng.choice(
        (
            b"\x80\x02cposix\nsystem\nq\x00X\x0c\x00\x00\x00touch canaryq\x01\x85q\x02Rq\x03.",
            b"cos\nsystem\n(S'touch canary'\ntR.",
            b"\x80\x04" + b"]" * DEEP + b".",
            b"\x80\x02}q\x00.",
            b"\x80\x02" + b"X\xff\xff\xff\x7f",
            b"\x80\x02" + b"\x8a\xff" + b"\xff" * 255 + b".",
        )
    )


BYTES: tuple[Mutator, ...] = (flip, flip, flip_early, truncate, extend, splice, blank, drop, replace, number)
JSON: tuple[Mutator, ...] = (
    retyped,
    retyped,
    missing,
    renamed,
    scaled,
    scaled,
    added,
    added,
    remote_code,
    deep,
    odd_constants,
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
    """A way to damage a file: of those for its bytes or of those for its kind, as often the one as the other."""
    own = next(found for pattern, found in MUTATORS.items() if fnmatch(path, pattern))
    return rng.choice(own if own and rng.random() < 0.6 else BYTES)
