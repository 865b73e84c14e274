import gc
import subprocess
import sys

import pytest

from epmq.runtime import gc_frozen, gc_paused


@pytest.mark.parametrize("before", [True, False])
def test_collection_is_as_it_was_afterwards(before):
    was = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        with pytest.raises(KeyError), gc_paused():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == before
    finally:
        (gc.enable if was else gc.disable)()


@pytest.mark.parametrize("before", [True, False])
def test_what_there_is_stays_out_of_collections_for_a_while(before):
    assert not gc.get_freeze_count()
    try:
        if before:
            gc.freeze()
        with pytest.raises(KeyError), gc_frozen():
            assert gc.get_freeze_count() > 1000
            raise KeyError
        assert bool(gc.get_freeze_count()) == before
    finally:
        gc.unfreeze()


def test_what_was_imported_counts_as_old():
    code = (
        "import gc; from epmq.runtime import gc_paused\n"
        "with gc_paused():\n    import pydantic\n"
        "assert gc.isenabled() and not gc.get_freeze_count()\n"
        "print(len(gc.get_objects(generation=2)) > 10 * len(gc.get_objects(generation=0)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "True\n"


def test_the_end_looks_through_nothing():
    code = (
        "import atexit, gc; from epmq.runtime import skip_gc_at_exit\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 1000))\n"
        "skip_gc_at_exit()"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "True\n"


@pytest.mark.parametrize("module", ["epmq.reporting.inspection", "epmq.reporting.page", "epmq.reproduce.tables"])
def test_what_only_reads_and_draws_starts_without_transformers(module):
    code = f"import sys, {module}; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
