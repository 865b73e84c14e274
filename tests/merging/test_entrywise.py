import math
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils as peft

from epmq.merging import entrywise as merging
from epmq.merging import methods
from epmq.merging.entrywise import average, breadcrumbs, consensus, dare, della, disjoint_mean, task_arithmetic
from epmq.merging.entrywise import ties as ties_merge

# RegMean's is the average, under another name.
METHODS = {name: one.entries for name, one in methods.METHODS.items() if not name.startswith("regmean")}
# For these, of the base, only dtype and device matter.
WITHOUT_BASE = ("average", "slerp", "karcher")
# Settings by which a single expert is the merge.
BE_THE_EXPERT = {
    "average": {},
    "karcher": {},
    "ties": {"density": 1.0},
    "dare": {"density": 1.0, "scaling": 1.0},
    "consensus": {"agreement": 1, "scaling": 1.0},
    "breadcrumbs": {"smallest": 0.0, "largest": 0.0, "scaling": 1.0},
    "della": {"density": 1.0, "window": 0.0},
}
BASE = torch.tensor([1.0, 2.0, 3.0, 4.0])
TAU = torch.tensor([[0.5, -1.0, 0.0, 2.0], [1.5, 3.0, -0.25, -2.0]])
EXPERTS = [BASE + tau for tau in TAU]


def close(found: torch.Tensor, expected: list[float] | torch.Tensor) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=1e-6, atol=1e-6)


def two_tasks(*shape: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    base = torch.randn(shape)
    return base, [base + torch.randn(shape), base + torch.randn(shape)]


def test_average_by_hand():
    close(average(BASE, EXPERTS), [2.0, 3.0, 2.875, 4.0])
    close(average(BASE, EXPERTS, weights=[3.0, 1.0]), [1.75, 2.0, 2.9375, 5.0])
    assert torch.equal(average(torch.zeros(4), EXPERTS), average(BASE, EXPERTS))


def test_task_arithmetic_by_hand():
    close(task_arithmetic(BASE, EXPERTS, scaling=0.5), [2.0, 3.0, 2.875, 4.0])
    close(task_arithmetic(BASE, EXPERTS, scaling=[1.0, 0.0]), EXPERTS[0])
    close(task_arithmetic(BASE, EXPERTS, scaling=[1.0, 2.0]), [4.5, 7.0, 2.5, 2.0])
    close(task_arithmetic(BASE, EXPERTS, scaling=0.0), BASE)


def test_ties_by_hand():
    # Half of each vector survives: [0, -1, 0, 2] and [0, 3, 0, -2]. Signs of the sums: 0, +, 0, and +0.
    close(ties_merge(BASE, EXPERTS, density=0.5, scaling=1.0), [1.0, 5.0, 3.0, 6.0])
    close(ties_merge(BASE, EXPERTS, density=0.5, scaling=0.5), [1.0, 3.5, 3.0, 5.0])
    # Nothing is trimmed: the first entry is a mean of two, the third has one voter.
    close(ties_merge(BASE, EXPERTS, density=1.0), [2.0, 5.0, 2.75, 6.0])
    # Thresholds of a whole-model trim take the place of the density.
    close(ties_merge(BASE, EXPERTS, density=1.0, thresholds=[2.0, 3.0]), [1.0, 5.0, 3.0, 6.0])
    close(ties_merge(BASE, EXPERTS, density=0.0), BASE)


def test_ties_can_add_up_what_agrees():
    # The sum of each column elects +, +, − and +; what agrees is (0.5, 1.5), (3), (−0.25) and (2).
    thresholds = [0.0, 0.0]
    summed = ties_merge(BASE, EXPERTS, scaling=0.5, agreed="sum", thresholds=thresholds)
    close(summed, BASE + 0.5 * torch.tensor([2.0, 3.0, -0.25, 2.0]))
    mean = ties_merge(BASE, EXPERTS, scaling=0.5, thresholds=thresholds)
    close(mean, BASE + 0.5 * torch.tensor([1.0, 3.0, -0.25, 2.0]))


def test_ties_keeps_every_entry_of_a_tied_magnitude():
    """peft keeps exactly ⌊density · n⌋ entries, arbitrary ones among equals; here equals share one fate."""
    base, expert = torch.zeros(4), torch.ones(4)
    assert torch.equal(ties_merge(base, [expert], density=0.5), expert)
    assert peft.magnitude_based_pruning(expert, 0.5).sum() == 2


def test_disjoint_mean_loses_no_entry_where_the_sum_is_zero():
    tau = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    close(disjoint_mean(tau), [1.0, 0.0])


def test_dare_by_hand(monkeypatch):
    masks = {"0/w/0": torch.tensor([1.0, 0.0, 1.0, 1.0]), "0/w/1": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    monkeypatch.setattr(merging, "_bernoulli", lambda shape, density, key: masks[key])
    close(dare(BASE, EXPERTS, density=0.5, scaling=0.5, name="w"), [3.0, 5.0, 2.75, 6.0])
    close(dare(BASE, EXPERTS, density=0.5, scaling=[1.0, 0.0], name="w"), [2.0, 2.0, 3.0, 8.0])
    close(dare(BASE, EXPERTS, density=0.5, scaling=1.0, name="w", combine="ties"), [3.0, 8.0, 2.5, 8.0])

    # As mergekit's dare_ties: what agrees is added up.
    close(dare(BASE, EXPERTS, density=0.5, scaling=1.0, name="w", combine="ties_sum"), [5.0, 8.0, 2.5, 8.0])


def test_consensus_by_hand():
    # With λ = 0.3 the first task uses all but its third entry, the second all four; the sum is [2, 2, -0.25, 0].
    close(consensus(BASE, EXPERTS, scaling=1.0, threshold=0.3), [3.0, 4.0, 3.0, 4.0])
    close(consensus(BASE, EXPERTS, scaling=0.5, threshold=0.3, agreement=1), [2.0, 3.0, 2.875, 4.0])
    # With λ = 0.5 the first task uses its last entry alone.
    close(consensus(BASE, EXPERTS, scaling=1.0, threshold=0.5), BASE)
    close(consensus(BASE, EXPERTS, scaling=0.7, threshold=0.0), task_arithmetic(BASE, EXPERTS, scaling=0.7))


def test_consensus_is_the_published_form():
    base = torch.randn(40, 30)
    experts = [base + torch.randn(40, 30) for _ in range(4)]
    merged = base + sum(expert - base for expert in experts)
    used = sum((base - expert).abs() > 0.6 * (merged - expert).abs() for expert in experts)
    assert len(used.unique()) == 5
    expected = base + 0.3 * (used >= 3) * (merged - base)
    close(consensus(base, experts, scaling=0.3, threshold=0.6, agreement=3), expected)


def test_breadcrumbs_by_hand():
    base, sizes = torch.zeros(10), torch.arange(1.0, 11.0) * torch.tensor([1.0, -1.0] * 5)
    middle = sizes * torch.tensor([0.0, 0, 0, 1, 1, 1, 1, 1, 0, 0])
    close(breadcrumbs(base, [sizes], scaling=1.0, smallest=0.3, largest=0.2), middle)
    close(breadcrumbs(base, [sizes, -sizes], scaling=[0.5, 0.2], smallest=0.3, largest=0.2), 0.3 * middle)
    close(breadcrumbs(base, [sizes, sizes], scaling=1.0, smallest=0.3, largest=0.2, combine="ties"), middle)
    # Equal magnitudes share one fate, or a tensor of one magnitude would lose all of it.
    close(breadcrumbs(base, [torch.ones(10)], scaling=1.0, smallest=0.3, largest=0.2), torch.ones(10))


@pytest.mark.parametrize("combine", ["task_arithmetic", "ties_sum"])
def test_breadcrumbs_is_mergekits(combine):
    base, experts = two_tasks(20, 10)
    kept = []
    for expert in experts:
        order = (expert - base).abs().flatten().argsort()
        mask = torch.zeros(200)
        mask[order[60:-20]] = 1  # density 0.6, gamma 0.1
        kept.append((expert - base) * mask.view(20, 10))
    agrees = [vector.sign() == (sum(kept) >= 0) * 2 - 1 for vector in kept]
    total = sum(kept) if combine == "task_arithmetic" else sum(vector * yes for vector, yes in zip(kept, agrees))
    found = breadcrumbs(base, experts, scaling=0.4, smallest=0.3, largest=0.1, combine=combine)
    close(found, base + 0.4 * total)


def published_magprune(tau: torch.Tensor, density: float, window: float, key: str) -> torch.Tensor:
    """Row by row: ranks from the smallest on, chances from density − window/2 on, and a draw."""
    chances = torch.empty_like(tau)
    for row, sizes in zip(chances, tau.abs()):
        row[sizes.argsort()] = (torch.arange(len(row)) / (len(row) - 1)) * window + density - window / 2
    drawn = torch.rand(tau.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    return tau * (drawn < chances) / chances


@pytest.mark.parametrize("combine", ["ties", "task_arithmetic"])
def test_della_is_the_published_form(monkeypatch, combine):
    base, experts = two_tasks(30, 16)
    pruned = [published_magprune(expert - base, 0.6, 0.4, f"3/w/{k}") for k, expert in enumerate(experts)]
    total = disjoint_mean(pruned) if combine == "ties" else sum(pruned)
    settings = {"scaling": 0.7, "density": 0.6, "window": 0.4, "seed": 3, "name": "w", "combine": combine}
    whole = della(base, experts, **settings)
    torch.testing.assert_close(whole, base + 0.7 * total, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(merging, "PIECE", 50)
    assert torch.equal(della(base, experts, **settings), whole)


def test_della_keeps_large_entries_more_often_and_the_mean():
    base, expert = torch.zeros(100, 400), torch.linspace(1.0, 2.0, 400).repeat(100, 1)
    merged = della(base, [expert], density=0.4, window=0.6)
    kept = (merged != 0).float().mean(0)
    # Five standard deviations of a mean of 10 000 draws; the chances are 0.1 to 0.7.
    for part, chance in ((kept[:100], 0.175), (kept[-100:], 0.625), (kept, 0.4)):
        assert abs(float(part.mean()) - chance) < 0.025
    assert abs(float(merged.mean()) - 1.5) < 0.1


def test_della_without_a_window_is_dare():
    base, experts = two_tasks(50, 6)
    for combine in merging.COMBINE:
        settings = {"density": 0.5, "scaling": 0.3, "seed": 5, "name": "w", "combine": combine}
        close(della(base, experts, window=0.0, **settings), dare(base, experts, **settings))


def test_dare_keeps_the_share_and_the_mean():
    base, expert = torch.zeros(200, 100), torch.ones(200, 100)
    for density in (0.1, 0.5, 0.9):
        merged = dare(base, [expert], density=density, scaling=1.0)
        kept = merged != 0
        torch.testing.assert_close(merged[kept], torch.full_like(merged[kept], 1 / density))
        # Five standard deviations of a mean of 20 000 Bernoulli draws.
        assert abs(float(kept.float().mean()) - density) < 5 * math.sqrt(density * (1 - density) / 20_000)


def test_dare_that_keeps_all_is_task_arithmetic():
    base, experts = two_tasks(5, 7)
    assert torch.equal(dare(base, experts, density=1.0, scaling=0.3), task_arithmetic(base, experts, scaling=0.3))


@pytest.mark.parametrize("method", [dare, della])
def test_a_draw_is_seeded_by_seed_name_and_expert_alone(method):
    base, experts = two_tasks(64, 64)
    state = torch.get_rng_state()
    first = method(base, experts, seed=1, name="a")
    other_name, other_seed = method(base, experts, seed=1, name="b"), method(base, experts, seed=2, name="a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(method(base, experts, seed=1, name="a"), first)
    assert not torch.equal(other_name, first) and not torch.equal(other_seed, first)
    # Experts that are equal get masks of their own.
    total = {"combine": "task_arithmetic"}
    alone = [method(base, experts[:1] * 2, scaling=scaling, **total) - base for scaling in ([1.0, 0.0], [0.0, 1.0])]
    assert not torch.equal(alone[0] == 0, alone[1] == 0)


def test_the_mask_of_dare_is_fixed():
    """The draw is part of what a recipe promises: it must not change between versions."""
    generator = torch.Generator().manual_seed(zlib.crc32(b"7/encoder.weight/0"))
    mask = torch.rand((3, 4), generator=generator) < 0.5
    merged = dare(torch.zeros(3, 4), [torch.ones(3, 4)], seed=7, name="encoder.weight", scaling=1.0)
    assert torch.equal(merged, 2.0 * mask)


@pytest.mark.parametrize("scaling", [0.3, [0.3, 0.7]])
def test_task_arithmetic_is_pefts(scaling):
    base, experts = two_tasks(6, 5)
    weights = torch.tensor([scaling] * 2 if isinstance(scaling, float) else scaling)
    expected = base + peft.task_arithmetic([expert - base for expert in experts], weights)
    close(task_arithmetic(base, experts, scaling=scaling), expected)


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 4),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 12)),
    density=st.floats(0, 0.99),
    scaling=st.floats(0.1, 2),
    seed=st.integers(0, 1000),
)
def test_ties_is_pefts(count, shape, density, scaling, seed):
    """peft weighs the vectors before their mean and has no base; with equal weights that is our scaling."""
    generator = torch.Generator().manual_seed(seed)
    experts = [torch.randn(shape, generator=generator) for _ in range(count)]
    expected = peft.ties(experts, torch.full((count,), scaling), density, majority_sign_method="total")
    close(ties_merge(torch.zeros(shape), experts, density=density, scaling=scaling), expected)


def test_ties_elects_by_the_sum_and_not_by_the_number_of_votes():
    base, experts = torch.zeros(1), [torch.tensor([x]) for x in (5.0, -1.0, -1.0)]
    weights = torch.ones(3)
    assert float(ties_merge(base, experts, density=0.99)) == 0.0  # one entry a vector: ⌊0.99⌋ = 0 are kept
    assert float(ties_merge(base, experts, density=1.0)) == 5.0
    with pytest.warns(UserWarning, match="no pruning"):
        assert float(peft.ties(experts, weights, 1.0, "total")) == 5.0
        assert float(peft.ties(experts, weights, 1.0, "frequency")) == -1.0


@pytest.mark.parametrize("combine", ["task_arithmetic", "ties"])
def test_dare_is_pefts_under_the_same_masks(monkeypatch, combine):
    base, experts = torch.zeros(8, 9), two_tasks(8, 9)[1]
    masks = [(torch.rand(8, 9) < 0.4).float() for _ in experts]
    ours, theirs = iter(masks), iter(masks)
    monkeypatch.setattr(merging, "_bernoulli", lambda shape, density, key: next(ours))
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: next(theirs))
    method = peft.dare_ties if combine == "ties" else peft.dare_linear
    expected = method([expert.clone() for expert in experts], torch.full((2,), 0.3), 0.4)
    close(dare(base, experts, density=0.4, scaling=0.3, combine=combine), expected)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("slerp", "model_stock")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_expert_is_enough(method, dtype):
    base = torch.randn(4, 6).to(dtype)
    expert = (base + torch.randn(4, 6).to(dtype)).to(dtype)
    merged = METHODS[method](base, [expert], **BE_THE_EXPERT.get(method, {"scaling": 1.0}))
    assert merged.dtype == dtype
    torch.testing.assert_close(merged, expert, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [("average", {"weights": [0, 1]}), *((method, {}) for method in METHODS)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", range(3))
def test_what_is_not_finite_stays_so(settings, value, where):
    """The merge is looked through for NaN and infinity in place of the weights."""
    method, given = settings
    base, experts = two_tasks(40, 6)
    tensors = [base, *experts]
    tensors[where][3, 2] = value
    merged = METHODS[method](base, experts, **given)
    if method in WITHOUT_BASE and where == 0:
        assert merged.isfinite().all()  # the base is not used
    else:
        assert not merged[3, 2].isfinite()


def test_a_tensor_of_nan_alone_stays_so():
    base, experts = two_tasks(40, 30)
    experts[0].fill_(math.nan)
    for method in METHODS.values():
        assert method(base, experts).isnan().all()


def test_infinities_that_cancel_stay_in_the_merge():
    base, experts = two_tasks(4, 6)
    experts[0][3, 2], experts[1][3, 2] = float("inf"), float("-inf")
    assert not any(METHODS[method](base, experts)[3, 2].isfinite() for method in METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_the_inputs_are_left_alone(method):
    base, experts = two_tasks(4, 6)
    copies = [tensor.clone() for tensor in (base, *experts)]
    METHODS[method](base, experts)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((base, *experts), copies))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (0,), (2, 3), (2, 1), (2, 1, 3, 3)])
def test_tensors_of_any_shape(method, shape):
    base, experts = two_tasks(*shape)
    assert METHODS[method](base, experts).shape == base.shape


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        (average, {"weights": [1.0]}, "merge.weights: 1 values for 2 experts"),
        (task_arithmetic, {"scaling": [1.0, 1.0, 1.0]}, "merge.scaling: 3 values for 2 experts"),
        (task_arithmetic, {"scaling": []}, "merge.scaling: 0 values for 2 experts"),
        (dare, {"scaling": [0.3]}, "merge.scaling: 1 values for 2 experts"),
        (dare, {"scaling": [0.3, 0.3], "combine": "ties"}, "merge.scaling: dare with combine: ties"),
        (dare, {"combine": "average"}, "merge.combine: 'average' is not task_arithmetic, ties or ties_sum"),
        (della, {"scaling": [0.3, 0.3]}, "merge.scaling: della with combine: ties"),
        (della, {"density": 0.9}, "merge.window: chances of 0.75 to 1.05 are not in 0 to 1"),
        (della, {"density": 0.1}, "merge.window: chances of -0.05 to 0.25"),
        (breadcrumbs, {"smallest": 0.5, "largest": 0.5}, "merge.smallest, merge.largest: 0.5 and 0.5 leave nothing"),
        (consensus, {"agreement": 3}, "merge.agreement: 3 tasks of 2"),
        (ties_merge, {"thresholds": [0.1]}, "shorter"),
    ],
)
def test_settings_that_do_not_fit_are_refused(method, wrong, message):
    with pytest.raises(ValueError, match=message):
        method(BASE, EXPERTS, **wrong)
