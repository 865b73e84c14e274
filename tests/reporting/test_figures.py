"""Which pictures a page has, and what is drawn in them."""

from dataclasses import replace

import pytest
from made_runs import EXPERTS, RUNS, made
from svg import elements

from epmq.reporting.figures import MOST_MARKS, ScoreAxis, draw_figures
from epmq.reporting.runs import labels

LAYERS = [
    {"name": f"encoder.layer.{block}.query", "loss": 1.0 + block, "merge_loss": merge_loss}
    for block, merge_loss in enumerate((0.5, 0.0))
]


def marks(svg: str) -> int:
    return len(elements(svg, "mark"))


def test_there_is_a_picture_for_what_there_is_data_for():
    figures, missing = draw_figures(RUNS, labels(RUNS), EXPERTS)
    by_title = {figure.title: figure for figure in figures}
    assert list(by_title) == ["Accuracy by task and method", "Gap recovered by bits", "Size against score"]
    assert missing == ["loss by depth (a report with layers)"]
    assert marks(by_title["Accuracy by task and method"].svg) == 2 * (len(RUNS) + 1)
    assert marks(by_title["Size against score"].svg) == len(RUNS)
    assert marks(by_title["Gap recovered by bits"].svg) == 1


def test_metrics_that_fit_no_common_axis_are_not_drawn_on_one():
    shares, mixed = ({"one": "f1", "two": other} for other in ("spearman", "log_perplexity"))
    for metrics, drawn in ((shares, True), (mixed, False)):
        runs = [replace(RUNS[0], metric=None, metrics=metrics, mean=None)]
        figures, missing = draw_figures(runs, ["run"], None)
        assert ("Score by task and method" in [figure.title for figure in figures]) is drawn
        assert ("scores by task (metrics that fit one axis)" in missing) is not drawn


@pytest.mark.parametrize(
    ("metric", "unit", "shown"),
    [("mse", "mean squared error", 0.5), ("pearson", "Pearson × 100", 50), ("f1", "F1, %", 50)],
)
def test_the_axis_of_a_metric(metric, unit, shown):
    run = replace(RUNS[0], metric=metric)
    axis = ScoreAxis([run])
    assert axis.unit() == unit and axis.value(run, 0.5) == shown


def test_what_is_missing_is_said():
    figures, missing = draw_figures([], [], None)
    assert figures == [] and len(missing) == 3
    assert [text.partition(" (")[0] for text in missing] == [
        "gap recovered by bits",
        "size against score",
        "loss by depth",
    ]


def test_too_many_runs_are_drawn_on_their_finest_grid_only():
    runs = [made(method, 0.5 + bits / 100, bits) for bits in (2, 3, 4) for method in ("rtn", "gptq", "expert_guided")]
    figure = draw_figures(runs, labels(runs), None)[0][0]
    assert len(runs) > MOST_MARKS and marks(figure.svg) == 2 * 3
    assert "Merged by task_arithmetic; 4 bits, and full precision." in figure.caption


def test_losses_are_drawn_by_depth():
    run = replace(made("gptq", 0.5), report={"layers": LAYERS})
    figure = draw_figures([run], labels([run]), None)[0][-1]
    assert figure.title == "Loss by depth" and marks(figure.svg) == 2 + 1  # nothing was lost to merging in one block
    assert "(merging)" in figure.caption
    unmerged = replace(run, report={"layers": [{**layer, "merge_loss": None} for layer in LAYERS]})
    assert "(merging)" not in draw_figures([unmerged], ["a"], None)[0][-1].caption
    lossless = replace(run, report={"layers": [{**layer, "loss": 0.0, "merge_loss": 0.0} for layer in LAYERS]})
    assert all(figure.title != "Loss by depth" for figure in draw_figures([lossless], ["a"], None)[0])
    figures, _ = draw_figures([run, unmerged], ["a", "b"], None)
    assert [figure.title for figure in figures[-2:]] == ["Loss by depth: a", "Loss by depth: b"]


def test_how_layers_are_stored_is_drawn_where_they_differ():
    grid = {"group_size": -1, "symmetric": True, "merge_loss": None, "loss": None}
    layers = [{"name": f"layer.{block}.query", "bits": bits, **grid} for block, bits in enumerate((4, 8, 4))]
    layers.append({"name": "words", "bits": 8, **grid})
    run = replace(made("rtn", 0.5), report={"layers": layers})
    [figure] = [one for one in draw_figures([run], ["a"], None)[0] if one.title == "Bits by layer"]
    assert marks(figure.svg) == 3 and "Outside the blocks: words 8 bits, a row." in figure.caption
    assert run.weights == "4 to 8 bits, by layer"
    same = replace(run, report={"layers": layers[::2]})
    assert same.weights == "4 bits, a row" and "Bits by layer" not in str(draw_figures([same], ["a"], None))


def test_perplexities_have_an_axis_of_their_own():
    run = replace(made("gptq", 0.5), metric="log_perplexity")
    axis = ScoreAxis([run])
    assert axis.log and axis.unit("mean ") == "perplexity" and axis.value(run, 0.0) == 1
    axis = ScoreAxis(RUNS)
    assert not axis.log and axis.unit("mean ") == "mean accuracy, %"
    assert axis.value(RUNS[0], 0.5) == pytest.approx(50) and axis.show(50.0) == "50"


def test_refined_runs_show_their_held_out_losses():
    refined = {"held_out": [0.3, 0.2, 0.25], "kept": 1, "parameters": 5}
    runs = [replace(RUNS[0], report={"refine": refined}), replace(RUNS[1], report={"refine": {**refined, "kept": 0}})]
    [figure] = [one for one in draw_figures(runs, ["a", "b"], None)[0] if one.title.startswith("Refined")]
    assert marks(figure.svg) == 6
    assert "a: held-out loss 0.3 → 0.2, epoch 1 of 2" in figure.caption and "b: nothing" in figure.caption
    [figure] = [one for one in draw_figures(runs[:1], ["a"], None)[0] if one.title.startswith("Refined")]
    assert figure.caption.endswith("Kept: held-out loss 0.3 → 0.2, epoch 1 of 2.")
