import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import images

from epmq.data.examples import Examples


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 40), count=st.one_of(st.none(), st.integers(1, 50)), seed=st.integers(0, 100))
def test_a_draw_is_seeded_and_without_replacement(size, count, seed):
    examples = Examples("text", [str(i) for i in range(size)], np.arange(size))
    np.random.seed(5)
    before, state = np.random.get_state()[1].copy(), torch.get_rng_state()
    drawn = examples.draw(count, seed)
    assert np.array_equal(np.random.get_state()[1], before) and torch.equal(torch.get_rng_state(), state)
    assert len(drawn) == (size if count is None else min(size, count))
    assert drawn.inputs == [str(i) for i in drawn.labels] and len(set(drawn.inputs)) == len(drawn)
    assert drawn.labels.tolist() == sorted(drawn.labels.tolist())
    assert examples.draw(count, seed).inputs == drawn.inputs


def test_draws_differ_with_the_seed_and_take_arrays_and_no_labels():
    examples = Examples("image", images(100), None)
    first, second = examples.draw(10, 0), examples.draw(10, 1)
    assert first.inputs.shape == (10, 8, 8, 3) and first.labels is None
    assert not np.array_equal(first.inputs, second.inputs)


def test_short_texts_come_first():
    pairs = Examples("text", [("aaa", "b"), ("a", ""), ("aa", "aaaa")], np.arange(3))
    assert pairs.by_length().labels.tolist() == [1, 0, 2]
    translated = Examples("seq2seq", ["aa", "a"], targets=["x", "y"]).by_length()
    assert translated.inputs == ["a", "aa"] and translated.targets == ["y", "x"]
    chats = Examples("chat", [[{"role": "user", "content": "a"}]])
    assert chats.by_length() is chats
