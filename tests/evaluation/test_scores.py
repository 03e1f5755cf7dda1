"""Scores by their definitions, and intervals that say what they should."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from sslvit.evaluation import retrieval, scores


@pytest.mark.parametrize(
    ("right", "count", "expected"),
    [(81, 263, (25.53, 36.62)), (15, 148, (6.24, 16.05)), (0, 20, (0.0, 16.11)), (1, 29, (0.61, 17.18))],
)
def test_the_interval_of_an_accuracy_is_that_of_published_tables(right, count, expected):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3: Wilson's score interval."""
    assert scores.accuracy_interval(right, count) == pytest.approx(expected)
    low, high = scores.accuracy_interval(count - right, count)
    assert (100 - high, 100 - low) == pytest.approx(expected)


def test_for_many_images_the_interval_is_that_of_drawing_them_anew():
    correct = np.arange(10_000) < 5200
    generator = np.random.default_rng(1)
    means = [100 * correct[generator.integers(0, 10_000, 10_000)].mean() for _ in range(2000)]
    assert scores.accuracy_interval(5200, 10_000) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.1)


def test_it_holds_the_true_accuracy_in_95_of_100_test_sets_and_has_a_width_at_both_ends():
    """Over all true accuracies, of 20 images: every number of right answers by its binomial probability."""
    ends = [scores.accuracy_interval(right, 20) for right in range(21)]
    covered = [
        sum(
            math.comb(20, k) * p**k * (1 - p) ** (20 - k)
            for k, (low, high) in enumerate(ends)
            if low <= 100 * p <= high
        )
        for p in np.linspace(0.01, 0.99, 99)
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)
    assert min(covered) > 0.8
    assert ends[0] == pytest.approx((0, 16.11))
    assert ends[20] == pytest.approx((83.89, 100))


def test_nothing_wrong_is_no_proof_that_nothing_could_be():
    """Of perfect retrieval and perfect labels every draw is perfect: the interval is that of as many right answers."""
    assert retrieval.interval(torch.ones(20, dtype=torch.float64), seed=0) == pytest.approx((83.89, 100))
    truth = (torch.arange(20) % 2).float().unsqueeze(1)
    found = scores.measure("multilabel", 4 * truth, truth, ["a"], 0)
    assert found["map_interval"] == found["auroc_interval"] == pytest.approx((83.89, 100))


def test_the_interval_of_a_share_does_not_leave_its_range():
    outputs = torch.arange(40.0).unsqueeze(1)
    truth = (outputs > 20).float()
    truth[19] = 1
    found = scores.measure("multilabel", outputs, truth, ["a"], 0)
    for name in ("map", "auroc"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high <= 100


def test_average_precision_and_auroc_equal_scikit_learns():
    generator = np.random.default_rng(0)
    score, truth = generator.integers(0, 6, 40).astype(float), generator.integers(0, 2, 40).astype(float)  # with ties
    weights = generator.integers(0, 3, 40).astype(float)
    ranked = scores.Ranked(score, truth)
    for w in (weights, np.ones(40)):
        assert ranked.auroc(w) == pytest.approx(roc_auc_score(truth, score, sample_weight=w))
        assert ranked.average_precision(w) == pytest.approx(average_precision_score(truth, score, sample_weight=w))
    perfect = scores.Ranked(truth, truth)
    assert perfect.auroc(np.ones(40)) == perfect.average_precision(np.ones(40)) == 1


def test_a_label_that_all_images_have_is_left_out():
    truth = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    none = scores.measure("multilabel", truth, truth[:, 1:].expand(-1, 2), ["a", "b"], 0)
    assert (none["map"], none["map_interval"], none["per_class"]) == (None, (None, None), {})
    found = scores.measure("multilabel", torch.tensor([[2.0, 0], [-1, 0], [1, 0]]), truth, ["a", "b"], 0)
    assert found["map"] == found["auroc"] == 100
    assert list(found["per_class"]) == ["a"]


def test_errors_of_numbers_are_their_formulas():
    outputs, truth = (
        torch.tensor([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]]),
        torch.tensor([[1.0, 7.0], [2.0, 7.0], [6.0, 7.0]]),
    )
    found = scores.measure("regression", outputs, truth, ["a", "b"], 0)
    assert found["mae"] == pytest.approx((2 / 3 + 2) / 2)
    assert found["per_target"]["a"]["r2"] == pytest.approx(1 - 2 / 14, abs=1e-4)  # mean 3: 4 + 1 + 9
    assert found["per_target"]["b"]["r2"] is None  # all alike: nothing to explain
    low, high = found["mae_interval"]
    assert low < found["mae"] < high
