import copy
from pathlib import Path

import pytest
from conftest import perturbed, tiny_bert
from families import FAMILIES


@pytest.fixture
def berts(tmp_path: Path) -> Path:
    """A folder with `base`, `one` and `two`."""
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("one", "two"), start=1):
        perturbed(copy.deepcopy(base), seed).save_pretrained(tmp_path / name)
    return tmp_path


@pytest.fixture
def t5s(tmp_path: Path) -> Path:
    """A folder with `base` and `one`, whose embeddings are shared."""
    base = FAMILIES["t5"].build()
    base.save_pretrained(tmp_path / "base")
    perturbed(copy.deepcopy(base), 1).save_pretrained(tmp_path / "one")
    return tmp_path
