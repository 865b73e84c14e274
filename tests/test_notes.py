"""Notes, and which of them can be refused."""

import pytest

from epmq.errors import InputError
from epmq.notes import Notes


def test_a_departure_is_noted_once_and_in_order():
    notes = Notes()
    notes.depart("an output layer is left out")
    notes.append("a stopped run was gone on with")
    notes.depart("an output layer is left out")
    assert notes == ["an output layer is left out", "a stopped run was gone on with"]
    assert notes.departures == ["an output layer is left out"]


def test_departures_that_are_refused_are_named_in_one_error():
    notes = Notes()
    notes.append("of another kind")
    notes.refuse()
    with pytest.raises(InputError, match="strict: a is left out"):
        notes.depart("a is left out")


def test_those_that_there_are_already_are_refused_too():
    notes = Notes()
    notes.depart("a")
    notes.depart("b")
    with pytest.raises(InputError, match="strict: a; b"):
        notes.refuse()
