"""Errors that a user can mend."""

from pathlib import Path

import pytest

from epmq.errors import (
    EnvironmentFault,
    EpmqError,
    InputError,
    MissingError,
    OutputDeniedError,
    OutputExistsError,
    UnknownTaskError,
    error_context,
    reason,
)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (InputError, ValueError),
        (MissingError, FileNotFoundError),
        (OutputExistsError, FileExistsError),
        (OutputDeniedError, PermissionError),
        (UnknownTaskError, KeyError),
        (EnvironmentFault, RuntimeError),
    ],
)
def test_every_error_is_also_the_one_that_python_has_for_it(error, builtin):
    assert issubclass(error, EpmqError) and issubclass(error, builtin)
    assert str(error("what is wrong")) == "what is wrong"


def test_the_name_goes_in_front_of_our_own_errors():
    with pytest.raises(InputError) as error, error_context("layer"), error_context(Path("file")):
        raise ValueError("not finite")
    assert str(error.value) == "layer: file: not finite"
    with pytest.raises(MissingError) as missing, error_context("field"):
        raise MissingError("no such file")
    assert str(missing.value) == "field: no such file"


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), FileNotFoundError("x"), KeyboardInterrupt()])
def test_what_is_no_error_of_ours_passes_as_it_is(error):
    with pytest.raises(type(error)) as raised, error_context("layer"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("x"), ValueError("x"), OSError("x"), RecursionError("x")]
)
def test_whatever_another_library_raises_is_a_fault_of_the_file(error):
    with pytest.raises(InputError) as raised, error_context("a.parquet", "not a readable file"):
        raise error
    assert str(raised.value) == f"a.parquet: not a readable file ({error})"
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [FileNotFoundError("x"), MissingError("x"), KeyboardInterrupt()])
def test_a_file_that_is_not_there_names_itself(error):
    with pytest.raises(type(error)) as raised, error_context("a.parquet", "not a readable file"):
        raise error
    assert raised.value is error


def test_nothing_is_raised_where_nothing_was():
    with error_context("layer"), error_context("file", "not a readable file"):
        pass


def test_a_reason_is_one_line():
    assert reason(ValueError(" one \n two\nthree")) == "one two"
    assert reason(ValueError()) == "ValueError"
