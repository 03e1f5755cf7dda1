"""What the linear probes share: choose settings on held-out training images, train again on all of them, test once.

A probe brings a list of settings and a function that trains one linear head for each of them. The held-out part has the
same share of each class, and at least one image of a class with two or more. Features are standardised by the mean and
the standard deviation of the training set. This is what the BatchNorm without affine parameters does in MAE's protocol
(He et al., appendix A.1, and the released code).
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import on_first_process, say
from ..errors import UserError
from ..model.encoder import Pool
from . import confusion, pictures, protocol, records, scores
from .config import ProbeConfig
from .features import Features
from .frozen import check_pool, describe_pool
from .strata import check_holdout, hold_out

MAX_LOGITS = 2**24  # in memory at once

Setting = dict[str, float]  # such as {"lr": 0.1, "weight_decay": 0.0}
# Features [N, D], labels [N], settings -> one head for each setting, [H, D + 1, C]; the last row is the bias.
Train = Callable[[Tensor, Tensor, Sequence[Setting]], Tensor]


C = TypeVar("C", bound=Any)


def run_probe(
    config: C, name: str, settings: Sequence[Setting], trainer: Callable[[C, int, torch.device], Train], what: str
) -> dict[str, Any]:
    """Features, sweep, choice, test, for each seed; prints and writes <run>/eval/<name>.json. Raises UserError.

    trainer: makes the training function from a configuration, the number of classes and the device. what: the name of
    the first setting, for people.
    """
    pictures.check(config.picture)
    check_seeds(config.seeds)
    check_holdout(config.holdout)
    if config.pools and config.pool != "auto":
        raise UserError(f"pool={config.pool} and pools={list(config.pools)}: give one of them.")
    frozen, split = protocol.open_split(config, name)
    pools = frozen.encoder.pools() if config.pool == "auto" else (frozen.pool,)
    if config.pools:
        pools = tuple(check_pool("pools", pool, frozen.encoder, config.run) for pool in config.pools)
    task = protocol.extract_split(frozen, split, name, config.cache, pools)

    def train_and_test(config: C) -> dict[str, Any]:
        return choose_and_test(config, task, settings, trainer(config, len(task.classes), frozen.accelerator.device))

    results = for_each_seed(config, train_and_test)
    first = next(iter(settings[0]))
    warn_at_edge(results, first, {setting[first] for setting in settings}, what)
    task.save(results)
    return results


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises UserError for a single seed, or for equal ones."""
    if len(set(seeds)) < len(seeds) or len(seeds) == 1:
        raise UserError(f"seeds={list(seeds)} must be two or more that differ: give seed= for one.")


def for_each_seed(config: C, train_and_test: Callable[[C], dict[str, Any]]) -> dict[str, Any]:
    """The results for `config.seed`, or those for each of `config.seeds` with their mean and standard deviation."""
    if not config.seeds:
        return train_and_test(config)
    results = [
        train_and_test(replace(config, seed=seed, picture="" if i else config.picture))
        for i, seed in enumerate(config.seeds)
    ]
    mean = scores.summary(results)
    say(f"top-1 {mean['top1']:.2f} +- {mean['top1_deviation']:.2f} over the seeds {list(config.seeds)} of the heads")
    return {**mean, "seeds": [{"seed": seed, **one} for seed, one in zip(config.seeds, results, strict=True)]}


def choose_and_test(
    config: ProbeConfig, task: protocol.Task, settings: Sequence[Setting], train: Train
) -> dict[str, Any]:
    """Choose one setting and one way of pooling on held-out images, train on all of them, test; prints tables.

    All processes call it, and the first does the work. One way of pooling is in memory at a time. Raises UserError.
    """

    def try_pool(pool: Pool) -> list[dict[str, Any]]:
        features, _ = task.whole(pool)
        return on_first_process(
            lambda: [{"pool": pool, **row} for row in try_settings(config, features, settings, train)]
        )

    sweep = [row for pool in task.sets for row in try_pool(pool)]
    best = best_of(sweep, task.frozen.encoder.pool)
    sets = task.whole(best["pool"])
    return on_first_process(lambda: _test_best(config, task.classes, *sets, sweep, best, settings, train))


def split(config: Any, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N] labels, -1 for none -> row numbers of all labelled images, of those that are trained on while settings are
    chosen, and of those held out. Raises UserError."""
    labelled = (labels >= 0).nonzero()[:, 0]
    held_out = hold_out(labels[labelled], config.holdout, config.seed)
    return labelled, labelled[~held_out], labelled[held_out]


def try_settings(config: Any, features: Features, settings: Sequence[Setting], train: Train) -> list[dict[str, float]]:
    """Train one head for each setting on the images that are not held out. Returns each setting with its accuracy
    (percent) and loss on the held-out ones."""
    _, learned, held_out = split(config, features.labels)
    heads, mean, std = fit(features, learned, settings, train)
    labels = features.labels[held_out]
    predictions, losses = predict(heads, features.values[held_out].sub_(mean).div_(std), labels)
    top1 = 100 * (predictions == labels).double().mean(dim=1)
    return [
        {**setting, "holdout_top1": round(accuracy, 4), "holdout_loss": round(loss, 5)}
        for setting, accuracy, loss in zip(settings, top1.tolist(), losses.tolist(), strict=True)
    ]


def fit(features: Features, rows: Tensor, settings: Sequence[Setting], train: Train) -> tuple[Tensor, Tensor, Tensor]:
    """Train one head for each setting on some of the images. Returns the heads, and mean and standard deviation of the
    features."""
    x = features.values[rows]
    mean, std = mean_and_std(x)
    heads = train(x.sub_(mean).div_(std), features.labels[rows], settings)  # in place: one copy of the features
    return heads, mean, std


def _test_best(
    config: ProbeConfig, classes: list[str], train_set: Features, test_set: Features, sweep: Sequence[dict[str, Any]],
    best: dict[str, Any], settings: Sequence[Setting], train: Train,
) -> dict[str, Any]:  # fmt: skip
    """Train the chosen head on all training images and test it; prints tables."""
    setting = {name: best[name] for name in settings[0]}
    labelled, _, held_out = split(config, train_set.labels)
    heads, mean, std = fit(train_set, labelled, [setting], train)
    rows = (test_set.labels >= 0).nonzero()[:, 0]
    labels = test_set.labels[rows]
    predictions, loss = predict(heads, test_set.values[rows].sub_(mean).div_(std), labels)
    _report_sweep(sweep, settings)
    chosen = ", ".join(f"{name} {value:g}" for name, value in setting.items())
    how = f"with {chosen} on {describe_pool(best['pool'])}"
    results = report(config, classes, predictions[0], labels, how)
    return {**results, "pool": best["pool"], "setting": setting, "test_loss": round(loss.item(), 5),
            "holdout_images": len(held_out), "holdout_top1": best["holdout_top1"], "sweep": sweep}  # fmt: skip


def best_of(sweep: Sequence[dict[str, Any]], trained: Pool | None = None) -> dict[str, Any]:
    """The row with the highest accuracy on held-out images; of equal ones, that of the pooling with which the encoder
    was trained, and then that with the lowest loss there. Rows whose loss is not finite come last."""

    def rank(row: dict[str, Any]) -> tuple[bool, float, bool, float]:
        finite = math.isfinite(row["holdout_loss"])
        return finite, row["holdout_top1"], row.get("pool") == trained, -row["holdout_loss"]

    return max(sweep, key=rank)


def report(config: Any, classes: list[str], predictions: Tensor, labels: Tensor, how: str) -> dict[str, Any]:
    """[N] predicted classes and [N] labels of the test images -> top-1, its interval, accuracy by class. Prints them,
    and draws the confusion matrix if `config.picture` is set."""
    right = predictions == labels
    top1 = 100 * right.double().mean().item()
    low, high = scores.accuracy_interval(int(right.sum()), len(right))
    summary = confusion.summary(predictions, labels, classes)
    by_class = summary["by_class"]
    worst, best = (extreme(by_class, key=lambda name: by_class[name]) for extreme in (min, max))
    say(f"test top-1 {top1:.2f} % (95 % interval {low:.1f} - {high:.1f}) {how}")
    say(f"by class from {by_class[worst]:.1f} % ({worst}) to {by_class[best]:.1f} % ({best})")
    if config.picture:
        confusion.picture(confusion.confusion(predictions, labels, len(classes)), classes, config.picture)
    return {
        "top1": round(top1, 4), "top1_interval": (low, high), **summary,
        "mean_by_class": round(sum(by_class.values()) / len(by_class), 4), "right": records.pack_bits(right),
    }  # fmt: skip


def _report_sweep(sweep: Sequence[dict[str, Any]], settings: Sequence[Setting]) -> None:
    """Print the best setting of each way of pooling."""
    best = [best_of([row for row in sweep if row["pool"] == pool]) for pool in dict.fromkeys(r["pool"] for r in sweep)]
    names = list(settings[0])
    rows = [[row["pool"], *(f"{row[name]:g}" for name in names), f"{row['holdout_top1']:.2f}"] for row in best]
    say(f"{len(sweep)} heads; the best of each way of pooling:")
    say(*records.table(["pool", *names, "held-out top-1 %"], rows))


def warn_at_edge(results: dict[str, Any], name: str, offered: Collection[float], what: str) -> None:
    """Say if a chosen setting is the smallest or the largest of several that were tried."""
    chosen = {one["setting"][name] for one in results.get("seeds", [results])}
    if len(offered) > 1 and chosen & {min(offered), max(offered)}:
        say(f"The chosen {what} is at the end of the list: a longer list may give a better one.")


def mean_and_std(x: Tensor) -> tuple[Tensor, Tensor]:
    """[N, D] -> mean and standard deviation of each feature, [D] and [D]."""
    return x.mean(dim=0), (x.var(dim=0, unbiased=False) + 1e-6).sqrt()


def predict(heads: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[H, D + 1, C] heads, [N, D] features, [N] labels -> [H, N] predicted classes, [H] float64 cross-entropy."""
    predictions, losses = [], []
    size = max(1, MAX_LOGITS // (heads.shape[0] * heads.shape[2]))
    for features, targets in zip(x.split(size), labels.split(size), strict=True):
        logits = F.pad(features, (0, 1), value=1.0) @ heads  # [H, part, C]
        predictions.append(logits.argmax(dim=-1))
        right = logits.gather(2, targets.view(1, -1, 1).expand(len(heads), -1, -1)).squeeze(2)
        losses.append((logits.logsumexp(dim=-1) - right).double().sum(dim=1))
    return torch.cat(predictions, dim=1), torch.stack(losses).sum(dim=0) / len(x)
