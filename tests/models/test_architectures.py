"""Architectures by number: one expert at scaling 1.0 is that expert, and a base loads as `from_pretrained` loads it.

A part of the mixtures of tied and untied is tried here; `python -m benchmarks.faults --only identities` tries all.
"""

from __future__ import annotations

import pytest

from epmq.errors import InputError
from tests.kit.architectures import ARCHITECTURES
from tests.kit.identity import (
    CASES,
    REFUSED,
    SCALES_TIED,
    drop_what_the_class_makes,
    merge_one,
    save_pair,
    unlike_from_pretrained,
    unlike_the_expert,
)

# All that have no output layer, and of the others a third: every architecture, and every mixture of most kinds.
SOME = [case for number, case in enumerate(CASES) if case[1] is None or number % 3 == 0]
# Their classes make the positions themselves, and some files of theirs on the Hub lack them.
MAKERS = ("roformer", "marian", "pegasus", "whisper", "m2m100")


@pytest.mark.parametrize(("name", "base", "expert"), SOME)
def test_one_expert_at_full_scale_is_that_expert(name, base, expert, tmp_path):
    save_pair(ARCHITECTURES[name], tmp_path, base, expert)
    try:
        merge_one(tmp_path)
    except InputError as error:
        mixed = name in SCALES_TIED and base != expert and "\n" not in str(error)
        assert mixed or REFUSED.get(name, "nothing else") in str(error)
        return
    assert unlike_the_expert(ARCHITECTURES[name], tmp_path) == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_base_loads_as_from_pretrained_loads_it(name, tmp_path):
    save_pair(ARCHITECTURES[name], tmp_path)
    try:
        assert unlike_from_pretrained(ARCHITECTURES[name], tmp_path) == []
    except InputError as error:
        assert REFUSED.get(name, "nothing else") in str(error)


@pytest.mark.parametrize("name", MAKERS)
def test_what_a_class_makes_itself_need_not_be_stored(name, tmp_path):
    save_pair(ARCHITECTURES[name], tmp_path)
    dropped = drop_what_the_class_makes(ARCHITECTURES[name], tmp_path)
    assert dropped or name in ("marian", "m2m100")  # their files do not hold them anyway
    assert unlike_from_pretrained(ARCHITECTURES[name], tmp_path) == []
    merge_one(tmp_path)
    assert unlike_the_expert(ARCHITECTURES[name], tmp_path) == []
