"""Importing large libraries in less time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage for the length of a `with` block.

    torch and transformers make so many objects that stay that looking through them time and again is a tenth of
    their import.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def settled() -> Iterator[None]:
    """Leave out of collections, for the length of a `with` block, all objects that there are.

    They are imported modules for the most part, a million objects that stay, and are looked through again whenever
    some thousands of new ones have been made.
    """
    before = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not before:  # else they are somebody else's to let go
            gc.unfreeze()
