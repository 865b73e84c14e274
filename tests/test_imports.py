import gc

import pytest

from epmq.imports import uncollected


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
