"""What scores are, and how they are shown."""

import math

import pytest

from epmq.reporting.scores import gap_recovered, score_report, score_title, show_score, shown_scores


def test_gap_recovered_by_hand():
    assert gap_recovered(73.6, 65.0, 90.3) == pytest.approx(0.34, abs=0.001)
    assert gap_recovered(1.0, 1.0, 2.0) == 0 and gap_recovered(0.5, 1.0, 1.0) is None


def test_scores_for_people():
    assert show_score("log_perplexity", math.log(12.3)) == "12.30" and show_score("log_perplexity", 0.0) == "1.00"
    assert show_score("accuracy", 0.876) == "87.6 %" and show_score("exact_match", 1.0) == "100.0 %"
    assert score_title("log_perplexity") == "perplexity" and score_title("exact_match") == "exact match"
    assert (
        show_score("f1", 0.5) == "50.0 %"
        and show_score("pearson", 0.5) == "50.0"
        and show_score("mse", 0.0123) == "0.0123"
    )
    titles = {"f1": "F1", "spearman": "Spearman", "pearson": "Pearson", "mse": "mean squared error"}
    assert {metric: score_title(metric) for metric in titles} == titles
    assert score_title({"a": "accuracy"}) == score_title(None) == "score"


def test_tasks_of_different_metrics_have_a_mean_where_all_are_shares():
    metrics = {"a": "log_perplexity", "b": "exact_match", "c": "spearman"}
    mixed = score_report(metrics, {"a": math.log(3), "b": 0.5})
    assert mixed["metric"] == {"a": "log_perplexity", "b": "exact_match"} and mixed["mean_score"] is None
    shares = score_report(metrics, {"b": 0.5, "c": 0.7})
    assert shares["metric"] == {"b": "exact_match", "c": "spearman"} and shares["mean_score"] == pytest.approx(0.6)
    assert shown_scores(shares) == {"b": "50.0 % exact match", "c": "70.0 Spearman", "mean": "60.0"}
    errors = score_report({"a": "mse", "b": "accuracy"}, {"a": 2.5, "b": 0.5})
    assert errors["mean_score"] is None and shown_scores(errors) == {
        "a": "2.5 mean squared error",
        "b": "50.0 % accuracy",
    }
    assert score_report({"a": "mse"}, {"a": 2.5})["mean_score"] == 2.5
    alone = score_report(dict.fromkeys("ac", "log_perplexity"), {"a": 1.0, "c": 3.0})
    assert alone == {"metric": "log_perplexity", "scores": {"a": 1.0, "c": 3.0}, "mean_score": 2.0}


def test_scores_of_one_metric_as_text():
    perplexities = score_report(dict.fromkeys("ab", "log_perplexity"), {"a": 0.0, "b": math.log(4)})
    assert shown_scores(perplexities) == {"a": "1.00", "b": "4.00", "mean": "2.00"}
    assert shown_scores({}) == {}
