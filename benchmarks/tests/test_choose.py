import json
import sys
from importlib import import_module
from itertools import zip_longest

import pytest

from benchmarks import RESULTS
from benchmarks.accuracy import choose
from benchmarks.accuracy.choose import CANDIDATES
from benchmarks.accuracy.compare import GUIDED, is_language
from epmq.quantize_settings import ExpertGuided


def test_candidates_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
    old = CANDIDATES[True][1]
    rows = [
        {"method": "gptq", "seed": 0, "validation": 0.1},
        {"method": "expert_guided", **old, "seed": 0, "validation": 0.2},
        {"method": "gptq", "adapt_heads": True, "seed": 0, "validation": 0.1},
    ]
    (tmp_path / "choice-text8.json").write_text(json.dumps({"rows": rows}))
    seeds = []

    def measured(suite, root, tasks, merge, quantize, **data):
        assert data["split"] == "validation"
        seeds.append(data["seed"])
        assert quantize["bits"] == 4
        return {"mean_score": 0.5, "scores": {}, "metric": "accuracy"}

    monkeypatch.setattr(choose, "RESULTS", tmp_path)
    monkeypatch.setattr(choose, "build", lambda suite: tmp_path)
    monkeypatch.setattr(choose, "measure", measured)
    monkeypatch.setattr(sys, "argv", ["choose", "text8"])
    choose.main()
    count = len(CANDIDATES[True])
    assert seeds == (count - 1) * [0] + (count + 2) * [1]
    written = json.loads((tmp_path / "choice-text8.json").read_text())["rows"]
    assert written[:3] == rows and len(written) == 2 * (count + 2)
    choose.main()
    assert len(seeds) == 2 * count + 1


def made(suite, gptq, scores, metric="accuracy"):
    """Scores of the first candidates; the others do no better than GPTQ."""
    both = zip_longest(CANDIDATES[True], scores, fillvalue=gptq)
    rows = [{"method": "expert_guided", **candidate, "validation": score} for candidate, score in both]
    return {"suite": suite, "metric": metric, "rows": [{"method": "gptq", "validation": gptq}, *rows]}


def test_the_choice_is_the_one_whose_worst_suite_is_best():
    first = made("a", 0.5, [0.9, 0.8, 0.6, 0.5])
    assert choose.best([first], True) == CANDIDATES[True][0]
    assert choose.best([first, made("b", 0.5, [0.5, 0.7, 0.8, 0.9])], True) == CANDIDATES[True][1]
    assert choose.best([made("c", 3.0, [2.9, 2.9, 2.0, 2.5], "log_perplexity")], True) == CANDIDATES[True][2]
    # Of several draws the mean counts.
    twice = made("d", 0.5, [0.9, 0.5, 0.7, 0.5])
    twice["rows"] += made("d", 0.5, [0.5, 0.5, 0.8, 0.5])["rows"]
    assert choose.best([twice], True) == CANDIDATES[True][2]
    first["rows"].pop()
    with pytest.raises(ValueError, match=r"benchmarks\.accuracy\.choose a"):
        choose.best([first], True)


@pytest.mark.parametrize("heads", [True, False])
def test_the_default_is_the_best_that_was_measured(heads):
    choices = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("choice-*.json"))]
    with_heads = [not is_language(import_module(f"benchmarks.suites.{choice['suite']}")) for choice in choices]
    best = choose.best([choice for choice, has in zip(choices, with_heads) if has is heads], heads)
    default = ExpertGuided(**ExpertGuided().defaults(heads))
    assert with_heads.count(heads) == 2 and best == {name: getattr(default, name) for name in GUIDED}
