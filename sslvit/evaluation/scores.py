"""What predictions are worth: accuracy, average precision and AUROC, errors of numbers, with intervals of 95 %."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 500  # of the bootstrap
NORMAL = 1.959964  # deviations to each side that hold 95 % of a normal distribution
MAIN_SCORE = {"single": "top1", "multilabel": "map", "regression": "mae"}  # the number that a result is known by


def accuracy_interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval, in percent, of the accuracy that `right` of `count` test images were classified rightly.

    Wilson's (JASA 22, 1927), which Brown, Cai and DasGupta ("Interval Estimation for a Binomial Proportion",
    Statistical Science 16, 2001) recommend for few images; for ten thousand it is the bootstrap's but for hundredths of
    a point. At 0 % and 100 %, where images drawn anew are all alike, it has a width. It says nothing about other seeds
    of the training.
    """
    squared = NORMAL**2
    middle = (right + squared / 2) / (count + squared)
    half = NORMAL * math.sqrt(right * (count - right) / count + squared / 4) / (count + squared)
    return round(100 * max(0.0, middle - half), 2), round(100 * min(1.0, middle + half), 2)


def measure(task: str, outputs: Tensor, targets: Tensor, names: Sequence[str], seed: int) -> dict[str, Any]:
    """[N, K] outputs of the head (for regression in the targets' units), targets as in fine-tuning -> the scores."""
    return {"single": single, "multilabel": multilabel, "regression": regression}[task](outputs, targets, names, seed)


def single(outputs: Tensor, labels: Tensor, names: Sequence[str], seed: int) -> dict[str, Any]:
    """[N, K] logits, [N] int64 -> accuracies in percent; a class without images has none."""
    ranked = outputs.argsort(dim=1, descending=True, stable=True)[:, :5]
    correct = ranked == labels.unsqueeze(1)
    top1 = 100 * correct[:, 0].double().mean().item()
    per_class = {
        name: round(100 * correct[labels == i, 0].double().mean().item(), 4) if (labels == i).any() else None
        for i, name in enumerate(names)
    }
    return {
        "top1": round(top1, 4),
        "top1_interval": accuracy_interval(int(correct[:, 0].sum()), len(labels)),
        **({"top5": round(100 * correct.any(dim=1).double().mean().item(), 4)} if len(names) > 5 else {}),
        "loss": round(F.cross_entropy(outputs.double(), labels).item(), 6),
        "per_class": per_class,
    }


def multilabel(outputs: Tensor, targets: Tensor, names: Sequence[str], seed: int) -> dict[str, Any]:
    """[N, K] logits, [N, K] 0 or 1 -> average precision and AUROC in percent.

    A label that all or none of the images have has neither, and is left out of the means.
    """
    scores, truth = outputs.double().numpy(), targets.double().numpy()
    ranked = [Ranked(scores[:, i], truth[:, i]) for i in range(len(names)) if 0 < truth[:, i].sum() < len(truth)]
    judged = [name for i, name in enumerate(names) if 0 < truth[:, i].sum() < len(truth)]
    even = np.ones(len(truth))

    def means(weights: np.ndarray) -> tuple[float, float]:
        both = np.array([[of_one.average_precision(weights), of_one.auroc(weights)] for of_one in ranked])
        return 100 * known_mean(both[:, 0]), 100 * known_mean(both[:, 1])

    known = bool(ranked)
    ap, auroc = means(even) if known else (None, None)
    drawn = bootstrap(means, len(truth), seed) if known else [(None, None)] * 2
    of_ap, of_auroc = (_of_share(score, ends, len(truth)) for score, ends in zip((ap, auroc), drawn, strict=True))
    return {
        "map": _rounded(ap), "map_interval": of_ap, "auroc": _rounded(auroc), "auroc_interval": of_auroc,
        "loss": round(F.binary_cross_entropy_with_logits(outputs.double(), targets.double()).item(), 6),
        "per_class": {
            name: {"ap": _rounded(100 * one.average_precision(even)), "auroc": _rounded(100 * one.auroc(even))}
            for name, one in zip(judged, ranked, strict=True)
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
        return mae.mean(), known_mean(r2)

    mae, r2 = means(np.ones(len(truth)))
    of_mae, of_r2 = bootstrap(means, len(truth), seed)
    each = per_target(np.ones(len(truth)))
    return {
        "mae": _rounded(mae, 6), "mae_interval": tuple(_rounded(value, 6) for value in of_mae),
        "r2": _rounded(r2), "r2_interval": tuple(map(_rounded, of_r2)),
        "per_target": {
            name: {"mae": _rounded(each[0][i], 6), "r2": _rounded(each[1][i])} for i, name in enumerate(names)
        },
    }  # fmt: skip


def known_mean(values: np.ndarray) -> float:
    """The mean of those that are not NaN, NaN if all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


class Ranked:
    """One label's images in the order of their scores, equal scores together, for any weights of the images."""

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

    The score plus and minus 1.96 deviations of the bootstrap's draws, and not their percentiles: a draw holds images
    twice, which raises an average precision, so that its percentiles would lie above the score itself.

    score: of the numbers of times that each image was drawn.
    """
    generator = np.random.default_rng(seed)
    drawn = [score(np.bincount(generator.integers(num_images, size=num_images), minlength=num_images).astype(float))
             for _ in range(DRAWS)]  # fmt: skip
    intervals = []
    for middle, column in zip(score(np.ones(num_images)), np.array(drawn).T, strict=True):
        known = column[~np.isnan(column)]  # a draw may miss all images of a label
        half = NORMAL * known.std() if len(known) else np.nan
        intervals.append((middle - half, middle + half))
    return intervals


def _of_share(score: float | None, ends: tuple, count: int) -> tuple[float | None, float | None]:
    """The interval of a score in percent: the bootstrap's within 0 and 100; of a perfect one, which every draw has too,
    that of as many right answers as there are images."""
    if score is None:
        return ends
    if score > 100 - 1e-9:
        return accuracy_interval(count, count)
    return tuple(_rounded(min(100.0, max(0.0, end))) for end in ends)


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), digits)


def summary(results: list[dict[str, Any]]) -> dict[str, float]:
    """Mean and deviation (of a sample) over the seeds, of each score that is a number in all of them."""
    found = {}
    for name, value in results[0].items():
        values = [result[name] for result in results]
        if isinstance(value, float) and all(isinstance(v, float) for v in values):
            found[name] = round(float(np.mean(values)), 4)
            found[f"{name}_deviation"] = round(float(torch.tensor(values).double().std()), 4)
    return found
