"""Errors that a user can mend, and the names of layers, files and fields in front of their messages."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class EpmqError(Exception):
    """What a user can mend: a file, a field, a disk. Anything else that is raised is a bug of epmq."""


class InputError(EpmqError, ValueError):
    """A field, file or tensor that is not what it should be."""


class MissingError(EpmqError, FileNotFoundError):
    """Something that is named and not there."""


class OutputExistsError(EpmqError, FileExistsError):
    """An output that would be overwritten."""


class OutputDeniedError(EpmqError, PermissionError):
    """A folder that cannot be written to."""


class UnknownTaskError(EpmqError, KeyError):
    """A task that a model does not have."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError shows its message in quotes


class EnvironmentFault(EpmqError, RuntimeError):
    """Something outside of epmq: another process, a registry, a program that is missing."""


def reason(error: BaseException) -> str:
    """An error in one line; its type, where it says nothing."""
    lines = str(error).strip().splitlines()
    return " ".join(line.strip() for line in lines[:2]) if lines else type(error).__name__


@contextmanager
def error_context(name: str | Path, fault: str | None = None) -> Iterator[None]:
    """Say of what is raised in a `with` block where it comes from.

    Args:
        name: the layer, file, folder or field at hand; it goes in front of the message.
        fault: where the block is one call of another library: what is wrong with `name` if the call fails, such as
            `not a readable parquet file`. Damaged files make libraries raise what they were never meant to raise.
            Without it only our own errors are named.

    Raises:
        FileNotFoundError: as it was raised, where `fault` is given: it names the file already.
        InputError: something else was raised; `name` is in its message.
    """
    try:
        yield
    except Exception as error:
        if fault is None and isinstance(error, MissingError):
            raise MissingError(f"{name}: {error}") from None
        if fault is None and isinstance(error, ValueError):
            raise InputError(f"{name}: {error}") from None
        if fault is not None and not isinstance(error, FileNotFoundError):
            raise InputError(f"{name}: {fault} ({reason(error)})") from error
        raise
