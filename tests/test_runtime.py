import gc
import subprocess
import sys

import pytest

from epmq.errors import InputError
from epmq.runtime import gc_frozen, select_device


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


def test_the_end_looks_through_nothing():
    code = (
        "import atexit, gc; from epmq.runtime import spare_gc\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 1000))\n"
        "spare_gc()"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "True\n"


@pytest.mark.parametrize("module", ["epmq.reporting.inspection", "epmq.reporting.page", "epmq.reproduce.tables"])
def test_what_only_reads_and_draws_starts_without_transformers(module):
    code = f"import sys, {module}; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("name", ["banana", "meta", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused_in_one_line(name):
    with pytest.raises(InputError, match=f"^device: {name} cannot be used here [^\n]*$"):
        select_device(name)
