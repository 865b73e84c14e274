import gc

import pytest

from epmq.imports import settled, uncollected


@pytest.mark.parametrize("before", [True, False])
def test_collection_is_as_it_was_afterwards(before):
    was = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        with pytest.raises(KeyError), uncollected():
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
        with pytest.raises(KeyError), settled():
            assert gc.get_freeze_count() > 1000
            raise KeyError
        assert bool(gc.get_freeze_count()) == before
    finally:
        gc.unfreeze()
