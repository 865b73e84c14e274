"""Which tokens the merged model has: the base's, those of all, or one expert's.

Experts may have tokens that the base lacks, in rows that its embeddings have to spare or in rows of their own, and may
number tokens otherwise. Rows are merged by token, whatever their numbers are.
"""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from epmq.data.tokens import Tokens, has_tokenizer, join, open_tokenizer, read_tokens, same_tokenizer, special_tokens
from epmq.errors import InputError, error_context
from epmq.merging.experts import ExpertSet
from epmq.merging.readers import ExpertReader
from epmq.merging.token_rows import TokenRows, Vocabulary, read_rows
from epmq.models import meta

# Share of the tokens that two tokenizers number alike, above which they are one with a few changes.
SAME_TOKENS = 0.99
# Least share of their tokens that two tokenizers of one model have in common.
COMMON_TOKENS = 0.5
# Least cosine between the rows that one token has in base and expert; and how many tokens are looked at.
RELATED, SAMPLE = 0.3, 64
# Tokens that a note names.
NAMED = 4
WORDS = ("auto", "base", "union")


def agree_on_tokens(experts: ExpertSet, choice: str = "auto") -> None:
    """Decide which tokens the merged model has, and let all readers give the rows of their tables by token.

    Args:
        experts: base and experts, opened; their vocabulary, model and config are set.
        choice: `base`, `union`, the name of an expert, or `auto`: the base's where no expert has a token that it lacks,
            else the union.

    Raises:
        InputError: the base's tokenizer has more tokens than the model has rows, an expert's tokens are others than
            the base's, or the expert that is named has no tokenizer; expert and token are named.
    """
    base, rows = experts.base, meta.vocabulary(experts.model)
    ours = read_tokens(base.path)
    if rows is not None and max(ours.numbers.values(), default=-1) >= rows:
        most = max(ours.numbers.values())
        raise InputError(f"{base.path}: the tokenizer has token number {most}, but the embeddings {rows} rows")
    theirs = {
        task: ours if same_tokenizer(base.path, expert.path) else read_tokens(expert.path)
        for task, expert in sorted(experts.experts.items())
    }
    source = base.path
    if rows is not None and not ours.numbers and not has_tokenizer(base.path):
        ours, source = _adopted(experts, theirs, rows)
    if choice not in WORDS and not theirs[choice].numbers:
        raise InputError(f"tokenizer: expert {choice} has none that can be read ({experts.experts[choice].path})")
    if not ours.numbers:
        return
    named = {task for task, tokens in theirs.items() if tokens.numbers}
    theirs = {task: tokens if tokens.numbers else ours for task, tokens in theirs.items()}
    experts.vocabulary = Vocabulary(ours.numbers, source if choice in WORDS else experts.experts[choice].path)
    if any(tokens != ours for tokens in theirs.values()) or _other_shapes(experts):
        tables = _tables(experts)
        if tables:
            _Agreement(experts, ours, theirs, named, tables).settle(choice, source)


def _adopted(experts: ExpertSet, theirs: Mapping[str, Tokens], rows: int | None) -> tuple[Tokens, Path]:
    """What stands for the tokens of a base without a tokenizer: those that all experts number alike."""
    named = [task for task, tokens in theirs.items() if tokens.numbers]
    if not named:
        return Tokens(), experts.base.path
    common = set.intersection(*(set(theirs[task].numbers.items()) for task in named))
    numbers = sorted((number, token) for token, number in common if rows is None or number < rows)
    experts.notes.append(f"the base has no tokenizer: the output takes that of expert {named[0]}")
    return Tokens({token: number for number, token in numbers}, theirs[named[0]].added), experts.experts[named[0]].path


def _other_shapes(experts: ExpertSet) -> bool:
    """Whether any expert has a tensor of another shape than the base's."""
    return any(
        expert.checkpoint.shape(stored) != experts.base.shape(name)
        for expert in experts.experts.values()
        for name, stored in expert.stored.items()
        if name in experts.base.stored and (expert.adapter is None or expert.adapter.replaces(stored))
    )


def _tables(experts: ExpertSet) -> dict[str, int]:
    """The tables of tokens of the model, as in `TokenRows`; none where it takes no tokens."""
    rows = meta.vocabulary(experts.model)
    if rows is None:
        return {}
    found = meta.token_tables(experts.model, experts.meta_model(tokens=rows + 1))
    return {name: dimension for name, dimension in found.items() if name in experts.names or name in experts.tied}


class _Agreement:
    """What base and experts have, while it is decided what the merged model has.

    Attributes:
        ours, theirs: tokens of the base and, by task, of the experts.
        named: experts with a tokenizer; for the others it is the base's.
        tables: as in `TokenRows`.
        rows: how many rows the base's tables have.
        sizes: task → how many rows each table of the expert has.
    """

    def __init__(
        self,
        experts: ExpertSet,
        ours: Tokens,
        theirs: dict[str, Tokens],
        named: Collection[str],
        tables: dict[str, int],
    ) -> None:
        self.experts, self.ours, self.theirs, self.named, self.tables = experts, ours, theirs, named, tables
        self.rows = meta.vocabulary(experts.model) or 0
        sizes = {task: _sizes(expert, tables, self.rows, experts.tied) for task, expert in experts.experts.items()}
        self.sizes = {task: dict(own) for task, own in sizes.items()}

    def settle(self, choice: str, source: Path) -> None:
        """Check that tokens are those of one base, choose, and set what readers and model need."""
        for task, tokens in self.theirs.items():
            if tokens.numbers != self.ours.numbers:
                self._check(self.experts.experts[task], tokens.numbers)
            self._leave_out_without_rows(task)
        vocabulary = self._choose(choice, source)
        models = {"": self.ours, **self.theirs}
        vocabulary.theirs = {
            task: tokens.numbers for task, tokens in models.items() if tokens.numbers != vocabulary.numbers
        }
        roles = special_tokens(vocabulary.source or source)
        if vocabulary.tokenizer is not None:
            roles = vocabulary.tokenizer.special_tokens_map
        vocabulary.pad = vocabulary.numbers.get(roles.get("pad_token", roles.get("eos_token", "")))
        last = max(self.ours.numbers.values())
        fits = {task for task, sizes in self.sizes.items() if last < min(sizes.values()) <= self.rows}
        vocabulary.fits = frozenset(fits | set(self.named))
        self.experts.vocabulary = vocabulary
        self._set_rows(vocabulary)

    def _check(self, expert: ExpertReader, theirs: dict[str, int]) -> None:
        """Refuse a tokenizer that numbers tokens otherwise, unless the expert's own rows say so, too."""
        ours, task = self.ours.numbers, expert.task
        shared = ours.keys() & theirs.keys()
        moved = [token for token in sorted(shared) if ours[token] != theirs[token]]
        alike = (len(shared) - len(moved)) / min(len(ours), len(theirs))
        common = len(shared) / min(len(ours), len(theirs))
        if alike < SAME_TOKENS and not (common >= COMMON_TOKENS and self._rows_agree(expert, moved, theirs)):
            example = f", such as {moved[0]!r}" if moved else ""
            raise InputError(
                f"expert {task}: its tokenizer numbers only {100 * alike:.0f} % of the tokens as the base's does"
                f"{example} ({expert.path})"
            )
        if moved:
            self.experts.notes.append(
                f"expert {task}: {len(moved)} tokens have other numbers than in the base, such as {moved[0]!r}"
            )

    def _rows_agree(self, expert: ExpertReader, moved: list[str], theirs: dict[str, int]) -> bool:
        """Whether an expert's rows are nearer to the base's of the same tokens than to those of the same numbers."""
        name = next((name for name, dimension in self.tables.items() if not dimension), None)
        if name is None or not moved:
            return name is not None
        sample = moved[:: -(-len(moved) // SAMPLE)]
        mine, own = (torch.tensor([numbers[token] for token in sample]) for numbers in (self.ours.numbers, theirs))
        mine, own = (numbers[own < min(self.rows, self.sizes[expert.task][name])] for numbers in (mine, own))
        if not len(own):
            return False
        rows = read_rows(expert.own, name, own).float()
        by_token, by_number = (
            torch.cosine_similarity(read_rows(self.experts.base.own, name, numbers).float(), rows).mean()
            for numbers in (mine, own)
        )
        return float(by_token) > max(float(by_number), RELATED)

    def _leave_out_without_rows(self, task: str) -> None:
        """Forget tokens that an expert's tokenizer has and its tables do not."""
        tokens, rows = self.theirs[task], max(self.sizes[task].values())
        beyond = {token for token, number in tokens.numbers.items() if number >= rows}
        if beyond and task in self.named:
            self.experts.notes.depart(
                f"expert {task}: {len(beyond)} tokens of its tokenizer have no row in its embeddings, left out: "
                f"{_few(sorted(beyond))}"
            )
            numbers = {token: number for token, number in tokens.numbers.items() if token not in beyond}
            self.theirs[task] = Tokens(numbers, tokens.added - beyond)
        unnamed = min(self.sizes[task].values()) - max(
            self.rows, 1 + max(self.theirs[task].numbers.values(), default=-1)
        )
        if unnamed > 0 and task in self.named:
            self.experts.notes.append(
                f"expert {task}: its embeddings have {unnamed} rows more than the base's that no token has, left out"
            )

    def _choose(self, choice: str, source: Path) -> Vocabulary:
        """The tokens of the merged model, without its tables."""
        if choice not in WORDS:
            return self._all_of(choice)
        wanted = {task: self._wanted(task) for task in self.theirs}
        if choice != "base" and any(wanted.values()):
            vocabulary = self._union(choice, source, wanted)
            if vocabulary is not None:
                return vocabulary
        vocabulary = Vocabulary(self.ours.numbers, source)
        self._note_left(vocabulary)
        return vocabulary

    def _wanted(self, task: str) -> list[str]:
        """Tokens of an expert that the base lacks, or would split, in the order of their numbers."""
        tokens, ours = self.theirs[task], self.ours
        new = [token for token in tokens.numbers if token not in ours.numbers or token in tokens.added - ours.added]
        return sorted(new, key=tokens.numbers.__getitem__)

    def _union(self, choice: str, source: Path, wanted: dict[str, list[str]]) -> Vocabulary | None:
        """The base's tokens and those that experts add; None where there are none after all."""
        others = {task: _opened(self.experts.experts[task].path) for task, tokens in wanted.items() if tokens}
        joined = join(_opened(source), ((task, other, wanted[task]) for task, other in others.items()))
        alike = len({tuple(self.theirs[task].numbers.items()) for task in self.named}) == 1
        if joined.left and choice == "auto" and alike and len(self.named) == len(self.theirs):
            return self._all_of(next(iter(self.theirs)))
        for task, tokens in joined.left.items():
            self.experts.notes.depart(
                f"expert {task}: {len(tokens)} tokens of its own vocabulary cannot be added to the base's tokenizer, "
                f"left out: {_few(tokens)} (tokenizer: {task} keeps them)"
            )
        numbers = dict(self.ours.numbers)
        for task, tokens in joined.added.items():
            self.experts.notes.append(
                f"the output's tokenizer has {len(tokens)} tokens from expert {task}: {_few(tokens)}"
            )
            numbers |= {token: joined.tokenizer.convert_tokens_to_ids(token) for token in tokens}
        if not joined.added:
            return Vocabulary(numbers, source)
        _check_saved(joined.tokenizer, numbers)
        return Vocabulary(numbers, source, joined.tokenizer)

    def _all_of(self, task: str) -> Vocabulary:
        """The tokens of one expert."""
        expert = self.experts.experts[task]
        vocabulary = Vocabulary(self.theirs[task].numbers, expert.path)
        self.experts.notes.append(f"the output's tokenizer is that of expert {task}")
        self._note_left(vocabulary)
        return vocabulary

    def _note_left(self, vocabulary: Vocabulary) -> None:
        """Note whose tokens the output does not have."""
        models = {"the base": self.ours, **{f"expert {task}": tokens for task, tokens in self.theirs.items()}}
        for model, tokens in models.items():
            left = [token for token in tokens.numbers if token not in vocabulary.numbers]
            if left:
                self.experts.notes.depart(
                    f"{model}: {len(left)} tokens are not in the output's tokenizer, left out: {_few(left)}"
                )

    def _set_rows(self, vocabulary: Vocabulary) -> None:
        """Let model, config and readers have the merged model's rows, unless they are everyone's own."""
        experts, base = self.experts, self.experts.base
        size = max(self.rows, 1 + max(vocabulary.numbers.values()))
        ours = {name: self.rows for name in self.tables}
        index = {
            task: _index(vocabulary.numbers, tokens.numbers, size, max(self.sizes[task].values()))
            for task, tokens in self.theirs.items()
        }
        index[""] = _index(vocabulary.numbers, self.ours.numbers, size, self.rows)
        same = all(torch.equal(one, torch.arange(self.rows)) for one in index.values())
        if same and all(rows == self.rows for sizes in self.sizes.values() for rows in sizes.values()):
            return
        vocabulary.tables = self.tables
        self._note_rows_of_none(vocabulary, index)
        experts.config = vocabulary.renumbered("", experts.config)
        if size != self.rows:
            experts.resize(size)
        for task, expert in experts.experts.items():
            sizes = self.sizes[task]
            expert.tokens = TokenRows(self.tables, index[task], sizes, expert.own, base.token_rows)
        fill = partial(_mean_of_experts, experts)
        base.tokens = TokenRows(self.tables, index[""], ours, base.own, fill)

    def _note_rows_of_none(self, vocabulary: Vocabulary, index: Mapping[str, Tensor]) -> None:
        """Note tokens for which a table has a row in no model, as where an adapter was saved without it."""
        for name in self.tables:
            if name not in self.experts.names:
                continue
            sizes = {"": self.rows, **{task: own[name] for task, own in self.sizes.items()}}
            have = torch.stack([(own >= 0) & (own < sizes[task]) for task, own in index.items()]).any(0)
            none = [token for token, number in vocabulary.numbers.items() if not have[number]]
            if none:
                self.experts.notes.depart(f"no model has a row of {name} for {_few(none)}: it is zero")


def _sizes(
    expert: ExpertReader, tables: Mapping[str, int], rows: int, tied: Mapping[str, str]
) -> Iterator[tuple[str, int]]:
    """How many rows of its own an expert has in each table; an adapter whose parts disagree is an InputError."""
    for name, dimension in tables.items():
        stored, adapter, size = expert.stored.get(name) or expert.stored.get(tied.get(name, name)), expert.adapter, rows
        if stored is not None and (adapter is None or adapter.replaces(stored)):
            shape = expert.checkpoint.shape(stored)
            size = shape[dimension] if dimension < len(shape) else rows
        if stored is not None and adapter is not None and adapter.changes(stored):
            shape = adapter.change_shape(stored)
            changed = (shape[::-1] if expert.is_transposed(name) else shape)[dimension]
            if changed != size:
                raise InputError(
                    f"expert {expert.task}: the adapter changes {changed} rows of {name!r}, which has {size} "
                    f"({expert.path})"
                )
        yield name, size


def _index(numbers: Mapping[str, int], own: Mapping[str, int], size: int, rows: int) -> Tensor:
    """`TokenRows.index` of a model with tokens of its `own` numbers; rows of no token stay where they are."""
    positions = torch.arange(size)
    index, named = positions.where(positions < rows, -1), torch.tensor(list(numbers.values()))
    index[named] = -1
    shared = [(number, own[token]) for token, number in numbers.items() if token in own]
    if shared:
        here, there = torch.tensor(shared).T
        index[here] = there
    return index


def _mean_of_experts(experts: ExpertSet, name: str, positions: Tensor) -> Tensor:
    """Rows of tokens that the base lacks: the mean of those that experts have; zero where there is none."""
    total, count, dimension = None, torch.zeros(len(positions)), experts.vocabulary.tables[name]
    for expert in experts.experts.values():
        if expert.tokens is None or not expert.has(name):
            continue
        there = expert.tokens.own(name)[positions] >= 0
        if there.any():
            found = expert.tokens.at(name, positions[there]).float()
            if total is None:
                shape = [len(positions) if i == dimension else size for i, size in enumerate(found.shape)]
                total = torch.zeros(shape)
            total.index_add_(dimension, there.nonzero()[:, 0], found)
            count += there
    shape = [len(positions) if i == dimension else size for i, size in enumerate(experts.base.shape(name))]
    if total is None:
        return torch.zeros(shape, dtype=experts.base.dtype(name))
    weights = count.clamp(min=1).view([-1 if i == dimension else 1 for i in range(len(shape))])
    return (total / weights).to(experts.base.dtype(name))


def _opened(folder: Path) -> Any:
    with error_context(folder, "transformers cannot open the tokenizer"):
        return open_tokenizer(folder)


def _check_saved(tokenizer: Any, numbers: Mapping[str, int]) -> None:
    """Refuse a tokenizer that is another one when it is saved and opened again."""
    fault = "transformers cannot save it; choose tokenizer: base, or that of an expert"
    with TemporaryDirectory() as folder, error_context("the tokenizer with all tokens", fault):
        tokenizer.save_pretrained(folder)
        found = open_tokenizer(Path(folder)).get_vocab()
    wrong = [token for token, number in numbers.items() if found.get(token) != number]
    if wrong:
        raise InputError(
            f"tokenizer: saved and opened again, the tokenizer with all tokens has another number for {_few(wrong)}; "
            "choose tokenizer: base, or that of an expert"
        )


def _few(tokens: Collection[str]) -> str:
    """Some tokens in words."""
    names = ", ".join(repr(token) for token in list(tokens)[:NAMED])
    return names if len(tokens) <= NAMED else f"{names} and {len(tokens) - NAMED} more"
