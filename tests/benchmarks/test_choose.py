import json
import math
import sys

import pytest

from benchmarks import choose
from benchmarks.compare import GUIDED, RESULTS


def test_candidates_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
    old = {"expert_features": 0.6, "anchor_scale": 1, "anchor_strength": 0.03}  # from before there was a stream
    rows = [{"method": "gptq", "validation": 0.1}, {"method": "expert_guided", **old, "validation": 0.2}]
    (tmp_path / "choice-text8.json").write_text(json.dumps({"rows": rows}))
    asked = []

    def measured(suite, root, tasks, merge, quantize, **data):
        assert data["split"] == "validation"
        asked.append(quantize)
        return {"mean_score": 0.5, "scores": {}, "metric": "accuracy"}

    monkeypatch.setattr(choose, "RESULTS", tmp_path)
    monkeypatch.setattr(choose, "build", lambda suite: tmp_path)
    monkeypatch.setattr(choose, "measure", measured)
    monkeypatch.setattr(sys, "argv", ["choose", "text8"])
    choose.main()
    assert len(asked) == len(choose.CANDIDATES) - 1 and all(quantize["bits"] == 4 for quantize in asked)
    found = json.loads((tmp_path / "choice-text8.json").read_text())["rows"]
    assert found[:2] == rows and len(found) == len(choose.CANDIDATES) + 1
    choose.main()
    assert len(asked) == len(choose.CANDIDATES) - 1


@pytest.mark.parametrize("path", sorted(RESULTS.glob("choice-*.json")), ids=lambda path: path.stem)
def test_what_is_compared_is_the_best_that_was_measured(path):
    found = json.loads(path.read_text())
    sign = -1 if found.get("metric") == "log_perplexity" else 1
    guided = [row for row in found["rows"] if row["method"] == "expert_guided"]
    best = max(guided, key=lambda row: sign * row["validation"])
    assert math.isfinite(best["validation"])
    chosen = {"method": "expert_guided", **GUIDED[found["suite"]]}
    assert choose.key(chosen) == choose.key(best)
