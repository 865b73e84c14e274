"""Importing large libraries in less time."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """Collect no garbage for the length of a `with` block.

    torch and transformers make so many objects that stay that looking through them time and again is a good part of
    their import. What they have made counts as old afterwards: young, it would be looked through at once.
    """
    before, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules and not gc.get_freeze_count():  # what is frozen is somebody else's to let go
            gc.freeze()
            gc.unfreeze()  # puts them among the oldest
        if before:
            gc.enable()


def skip_gc_at_exit() -> None:
    """Let the process end without a last look through all that is imported, which takes long."""
    atexit.register(gc.freeze)


@contextmanager
def gc_frozen() -> Iterator[None]:
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
