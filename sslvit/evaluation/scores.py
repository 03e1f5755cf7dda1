"""Scores of predictions with intervals of 95 %: accuracy, average precision, AUROC, mean absolute error, R2."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

DRAWS = 500  # of the bootstrap
NORMAL = 1.959964  # standard deviations to each side that hold 95 % of a normal distribution
MAIN_SCORE = {"single": "top1", "multilabel": "map", "regression": "mae"}  # the number that a result is known by


def accuracy_interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval, in percent, of an accuracy: `right` of `count` test images were classified correctly.

    Wilson's interval (JASA 22, 1927), which Brown, Cai and DasGupta recommend for few images ("Interval Estimation for
    a Binomial Proportion", Statistical Science 16, 2001). For ten thousand images it equals the bootstrap's within
    hundredths of a point. At 0 % and 100 %, where all draws of the bootstrap are alike, it still has a width. It says
    nothing about other seeds of the training.
    """
    squared = NORMAL**2
    middle = (right + squared / 2) / (count + squared)
    half = NORMAL * math.sqrt(right * (count - right) / count + squared / 4) / (count + squared)
    return round(100 * max(0.0, middle - half), 2), round(100 * min(1.0, middle + half), 2)


def measure(task: str, outputs: Tensor, targets: Tensor, names: Sequence[str], seed: int) -> dict[str, Any]:
    """[N, K] outputs of the head (for regression in the targets' units), targets as in fine-tuning -> the scores."""
    return {"single": single, "multilabel": multilabel, "regression": regression}[task](outputs, targets, names, seed)


def single(outputs: Tensor, labels: Tensor, names: Sequence[str], seed: int) -> dict[str, Any]:
    """[N, K] logits, [N] int64 -> accuracies in percent; None for a class without images."""
    ranked = outputs.argsort(dim=1, descending=True, stable=True)[:, :5]
    correct = ranked == labels.unsqueeze(1)

    def percent(hits: Tensor) -> float:
        return round(100 * hits.double().mean().item(), 4)

    return {
        "top1": percent(correct[:, 0]),
        "top1_interval": accuracy_interval(int(correct[:, 0].sum()), len(labels)),
        **({"top5": percent(correct.any(dim=1))} if len(names) > 5 else {}),
        "loss": round(F.cross_entropy(outputs.double(), labels).item(), 6),
        "per_class": {
            name: percent(correct[labels == i, 0]) if (labels == i).any() else None for i, name in enumerate(names)
        },
    }


def multilabel(outputs: Tensor, targets: Tensor, names: Sequence[str], seed: int) -> dict[str, Any]:
    """[N, K] logits, [N, K] 0 or 1 -> average precision and AUROC in percent.

    A label that all or none of the images have has neither, and is left out of the means.
    """
    logits, truth = outputs.double().numpy(), targets.double().numpy()
    ranked = {
        name: Ranked(logits[:, i], truth[:, i]) for i, name in enumerate(names) if 0 < truth[:, i].sum() < len(truth)
    }
    once = np.ones(len(truth))

    def means(weights: np.ndarray) -> tuple[float, float]:
        both = np.array([(one.average_precision(weights), one.auroc(weights)) for one in ranked.values()])
        ap, auroc = both.reshape(-1, 2).T  # without any label too
        return 100 * mean_without_nan(ap), 100 * mean_without_nan(auroc)

    ap, auroc = means(once)
    intervals = bootstrap(means, len(truth), seed)
    ap_interval, auroc_interval = (
        _percent_interval(score, ends, len(truth)) for score, ends in zip((ap, auroc), intervals, strict=True)
    )
    return {
        "map": _rounded(ap), "map_interval": ap_interval, "auroc": _rounded(auroc), "auroc_interval": auroc_interval,
        "loss": round(F.binary_cross_entropy_with_logits(outputs.double(), targets.double()).item(), 6),
        "per_class": {
            name: {"ap": _rounded(100 * one.average_precision(once)), "auroc": _rounded(100 * one.auroc(once))}
            for name, one in ranked.items()
        },
    }  # fmt: skip


def regression(outputs: Tensor, targets: Tensor, names: Sequence[str], seed: int) -> dict[str, Any]:
    """[N, T] twice, in the targets' units -> mean absolute error and R2, each the mean over the targets."""
    error, truth = (outputs - targets).double().numpy(), targets.double().numpy()

    def per_target(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        share = (weights / weights.sum())[:, None]
        spread = (share * (truth - (share * truth).sum(axis=0)) ** 2).sum(axis=0)
        differ = spread > 1e-12 * (truth**2).max(axis=0)
        r2 = 1 - (share * error**2).sum(axis=0) / np.where(differ, spread, np.nan)  # none where all targets are equal
        return (share * np.abs(error)).sum(axis=0), r2

    def means(weights: np.ndarray) -> tuple[float, float]:
        mae, r2 = per_target(weights)
        return mae.mean(), mean_without_nan(r2)

    once = np.ones(len(truth))
    mae, r2 = means(once)
    mae_interval, r2_interval = bootstrap(means, len(truth), seed)
    each = per_target(once)
    return {
        "mae": _rounded(mae, 6), "mae_interval": tuple(_rounded(end, 6) for end in mae_interval),
        "r2": _rounded(r2), "r2_interval": tuple(map(_rounded, r2_interval)),
        "per_target": {
            name: {"mae": _rounded(each[0][i], 6), "r2": _rounded(each[1][i])} for i, name in enumerate(names)
        },
    }  # fmt: skip


def mean_without_nan(values: np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN without any."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else np.nan


class Ranked:
    """One label's images in the order of their scores, equal scores together, for any weights of the images.

    Equals scikit-learn's average_precision_score and roc_auc_score with sample_weight. Those sort the scores in every
    call: a draw of the bootstrap takes them 20 to 60 times as long (5,000 images: 5.9 against 0.17 ms).
    """

    def __init__(self, scores: np.ndarray, truth: np.ndarray) -> None:
        """[N] scores and [N] 0 or 1."""
        self.order = np.argsort(-scores, kind="stable")
        self.truth = truth[self.order] > 0.5
        ordered = scores[self.order]
        self.ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))

    def _counts(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positives and negatives with at least each of the scores."""
        w = weights[self.order]
        return np.cumsum(w * self.truth)[self.ends], np.cumsum(w * ~self.truth)[self.ends]

    def average_precision(self, weights: np.ndarray) -> float:
        """Sum over the scores of the gain in recall times the precision there; NaN without a positive."""
        positives, negatives = self._counts(weights)
        if not positives[-1]:
            return np.nan
        gain = np.diff(positives, prepend=0) / positives[-1]
        return float((gain * positives / np.maximum(positives + negatives, 1e-30)).sum())

    def auroc(self, weights: np.ndarray) -> float:
        """Share of pairs of a positive and a negative in which the positive scores higher, equal ones count half."""
        positives, negatives = self._counts(weights)
        if not positives[-1] or not negatives[-1]:
            return np.nan
        above = np.diff(negatives, prepend=0) * (positives + np.append(0, positives[:-1])) / 2
        return float(above.sum() / (positives[-1] * negatives[-1]))


def bootstrap(
    score: Callable[[np.ndarray], tuple[float, float]], num_images: int, seed: int
) -> list[tuple[float, float]]:
    """95 % intervals of two scores over the images that they were measured on: [(low, high), (low, high)].

    score: takes how many times each image was drawn, [N]. An interval is the score plus and minus 1.96 standard
    deviations of the draws, and not their percentiles: a draw holds images twice, which raises an average precision, so
    percentiles would lie above the score itself.
    """
    generator = np.random.default_rng(seed)
    draws = [score(np.bincount(generator.integers(num_images, size=num_images), minlength=num_images).astype(float))
             for _ in range(DRAWS)]  # fmt: skip
    intervals = []
    for middle, column in zip(score(np.ones(num_images)), np.array(draws).T, strict=True):
        finite = column[~np.isnan(column)]  # a draw may miss all images of a label
        half = NORMAL * finite.std() if len(finite) else np.nan
        intervals.append((middle - half, middle + half))
    return intervals


def _percent_interval(score: float, ends: tuple[float, float], count: int) -> tuple[float | None, float | None]:
    """The interval of a score in percent: the bootstrap's, cut at 0 and 100. All draws of a perfect score are perfect:
    it has the interval of `count` right answers of `count` images."""
    if score > 100 - 1e-9:
        return accuracy_interval(count, count)
    low, high = np.clip(ends, 0, 100)
    return _rounded(low), _rounded(high)


def _rounded(value: float, digits: int = 4) -> float | None:
    """None for what is not finite: JSON has no word for it."""
    return round(float(value), digits) if np.isfinite(value) else None


def summary(results: list[dict[str, Any]]) -> dict[str, float]:
    """Mean and standard deviation (of a sample) over the seeds, of each score that is a number in all of them."""
    found = {}
    for name, value in results[0].items():
        values = [result[name] for result in results]
        if isinstance(value, float) and all(isinstance(v, float) for v in values):
            found[name] = round(float(np.mean(values)), 4)
            found[f"{name}_deviation"] = round(float(np.std(values, ddof=1)), 4)
    return found
