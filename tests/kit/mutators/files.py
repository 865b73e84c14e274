"""Ways to damage recipes, data files, chat templates and pickles."""

from __future__ import annotations

import io
import random
import zipfile

from tests.kit.mutators.json_values import (
    DEEP,
    deep,
    entries,
    missing,
    odd_constants,
    renamed,
    retyped,
    scaled,
    value,
)
from tests.kit.mutators.raw import flip


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


# Fields of a quantizer about how tensors are stored.
STORAGE = ("embeddings", "output_layer", "overrides", "rest", "scale_dtype", "budget", "size", "drop_unused", "skip")


def yaml_field(content: bytes, rng: random.Random) -> bytes:
    """Put something else in the place of one value of a recipe, or add a field."""
    import yaml

    tree = yaml.safe_load(content)
    node, key = rng.choice(entries(tree))
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
        if "group_size" in node and rng.random() < 0.5:
            more = STORAGE
        key = rng.choice((*more, "text", "label", "subset", "split", "activations", "bits", "task_weights", "scaling"))
    node[key] = value(rng)
    return yaml.safe_dump(tree).encode()


def one_line(content: bytes, rng: random.Random) -> bytes:
    """Damage one line of JSON, and leave the others."""
    lines = content.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = rng.choice((retyped, missing, renamed, scaled, deep, odd_constants, flip))(lines[number], rng)
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
