import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from epmq.models.heads import POOLINGS, Head, load_head, pool, save_head


def hidden_and_mask(batch: int, tokens: int, features: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, tokens, features, generator=generator)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    return hidden, (torch.arange(tokens) < lengths[:, None]).long()


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]]])
    assert pool(hidden, None, "cls").tolist() == [[1.0, 2.0]]
    assert pool(hidden, None, "mean").tolist() == [[3.0, 5.0]]
    assert pool(hidden, None, "cls_mean").tolist() == [[1.0, 2.0, 4.0, 6.5]]
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0, 3.0]]
    assert pool(hidden, mask, "cls_mean").tolist() == [[1.0, 2.0, 3.0, 4.0]]


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 4), tokens=st.integers(1, 6), pooling=st.sampled_from(POOLINGS), seed=st.integers(0, 100))
def test_padding_does_not_enter_the_features(batch, tokens, pooling, seed):
    hidden, mask = hidden_and_mask(batch, tokens, 3, seed)
    spoiled = torch.where(mask[..., None] == 1, hidden, torch.tensor(1e6))
    assert torch.equal(pool(hidden, mask, pooling), pool(spoiled, mask, pooling))
    for row, real in enumerate(mask.sum(1).tolist()):
        alone = pool(hidden[row : row + 1, :real], None, pooling)
        torch.testing.assert_close(pool(hidden, mask, pooling)[row : row + 1], alone, rtol=1e-5, atol=1e-6)


def test_a_sample_without_real_tokens_has_no_nan():
    hidden, mask = torch.randn(1, 3, 4), torch.zeros(1, 3).long()
    for pooling in POOLINGS:
        assert torch.isfinite(pool(hidden, mask, pooling)).all()


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="'max' is not one of cls, mean, cls_mean"):
        pool(torch.randn(1, 2, 3), None, "max")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_a_linear_map_of_the_features(normalize, dtype):
    hidden, mask = hidden_and_mask(3, 5, 4, 0)
    head = Head(torch.randn(2, 4), torch.randn(2), "mean", normalize)
    features = pool(hidden.to(dtype), mask, "mean").float()
    if normalize:
        features = features / features.norm(dim=-1, keepdim=True)
    logits = head.logits(hidden.to(dtype), mask)
    assert logits.dtype == torch.float32 and logits.shape == (3, 2)
    torch.testing.assert_close(logits, features @ head.weight.T + head.bias)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_head_comes_back(tmp_path, pooling, normalize):
    labels = ["ja", "nein, „vielleicht“", ""]
    head = Head(torch.randn(6, 3).T, torch.randn(3), pooling, normalize, labels)
    save_head(head, tmp_path / "head.safetensors")
    found = load_head(tmp_path / "head.safetensors")
    assert torch.equal(found.weight, head.weight) and torch.equal(found.bias, head.bias)
    assert (found.pooling, found.normalize, found.labels) == (pooling, normalize, labels)


def test_a_head_is_stored_in_float32(tmp_path):
    head = Head(torch.randn(3, 6).bfloat16(), torch.randn(3).bfloat16())
    save_head(head, tmp_path / "head.safetensors")
    found = load_head(tmp_path / "head.safetensors")
    assert found.weight.dtype == torch.float32 and torch.equal(found.weight, head.weight.float())


def test_a_file_without_settings_has_the_defaults(tmp_path):
    save_file({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, tmp_path / "head.safetensors")
    found = load_head(tmp_path / "head.safetensors")
    assert (found.pooling, found.normalize, found.labels) == ("cls", True, [])


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        ({"weight": (2, 3)}, {}, r"missing: \['bias'\]"),
        ({"classifier.weight": (2, 3)}, {}, r"missing: \['bias', 'weight'\]"),
        ({"weight": (2, 3), "bias": (3,)}, {}, r"weight \[2, 3\] and bias \[3\] must be"),
        ({"weight": (6,), "bias": (6,)}, {}, r"weight \[6\] and bias \[6\] must be"),
        ({"weight": (2, 3), "bias": (2,)}, {"pooling": "max"}, "pooling 'max' is not one of"),
        ({"weight": (2, 3), "bias": (2,)}, {"labels": "a, b"}, "metadata are not JSON"),
        ({"weight": (2, 3), "bias": (2,)}, {"normalize": "yes"}, "metadata are not JSON"),
        ({"weight": (2, 3), "bias": (2,)}, {"labels": '["a"]'}, "1 labels for 2 classes"),
    ],
)
def test_a_bad_head_names_the_file(tmp_path, shapes, settings, message):
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "head.safetensors", metadata=settings)
    with pytest.raises(ValueError, match=rf"head\.safetensors: .*{message}"):
        load_head(tmp_path / "head.safetensors")


def test_a_file_that_is_no_head_is_named(tmp_path):
    (tmp_path / "head.safetensors").write_bytes(b"not a head")
    with pytest.raises(ValueError, match=r"head\.safetensors: not a readable safetensors file"):
        load_head(tmp_path / "head.safetensors")
    with pytest.raises(FileNotFoundError, match="none"):
        load_head(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "settings_",
    [
        "[]",
        "null",
        "[" * 100_000,
        '{"labels": "abc"}',
        '{"labels": [1, 2, 3]}',
        '{"labels": 3}',
        '{"normalize": "no"}',
        '{"pooling": ["cls"]}',
        '{"pooling": {}}',
    ],
)
def test_settings_of_another_kind_are_refused_by_name(tmp_path, settings_):
    tensors = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    save_file(tensors, tmp_path / "head.safetensors", metadata={"head": settings_})
    with pytest.raises(ValueError, match=r"head\.safetensors: "):
        load_head(tmp_path / "head.safetensors")


def test_a_head_with_nan_is_refused(tmp_path):
    save_head(Head(torch.full((3, 2), torch.nan), torch.ones(3)), tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"head\.safetensors: tensor 'weight' has NaN or Inf"):
        load_head(tmp_path / "head.safetensors")


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3), max_leaves=4
)


@settings(deadline=None)
@given(values=st.fixed_dictionaries({}, optional=dict.fromkeys(["pooling", "normalize", "labels", "x"], JSON)))
def test_settings_are_good_or_an_error_names_the_file(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "head.safetensors"
    save_file({"weight": torch.ones(3, 2), "bias": torch.ones(3)}, path, metadata={"head": json.dumps(values)})
    try:
        assert load_head(path).pooling in POOLINGS
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


def test_a_head_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match=r"nowhere/head\.safetensors: cannot be written"):
        save_head(Head(torch.ones(2, 3), torch.ones(2)), tmp_path / "nowhere" / "head.safetensors")


def test_the_places_of_a_map_are_tokens():
    maps = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(pool(maps, None, "mean"), maps.mean((2, 3)))
    torch.testing.assert_close(pool(maps, None, "cls"), maps[:, :, 0, 0])
