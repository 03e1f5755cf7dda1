"""Linear probe: many linear classifiers on frozen features, trained at once; one is chosen and tested.

The grid is learning rates x weight decays x ways of pooling the tokens (class token, mean of patches, both, the last
four blocks), as in DINOv2 (Oquab et al., 2023, appendix B.3; 52 heads there). One is chosen on a held-out part of the
training images, the same share of each class (at least one image where it has two or more), trained again on all of
them, and the test images are looked at once. Features are standardised by the training set's mean and deviation, which
is what the BatchNorm without affine parameters of MAE's protocol does (He et al., appendix A.1; its code).
`protocol=mae` and `protocol=dino` are the papers' own, see published.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rng, schedules
from ..distributed import on_first_process, say
from ..encoder import Pool
from ..errors import UserError, check_range
from . import confusion, pictures, protocol, scores
from .features import Features
from .strata import check_holdout, hold_out

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
CHUNK = 2**24  # logits at once

Setting = dict[str, float]
Train = Callable[[Tensor, Tensor, Sequence[Setting]], Tensor]


@dataclass
class Choice(protocol.Config):
    """What every probe that chooses its settings on held-out images shares."""

    pools: tuple[str, ...] = ()  # ways of pooling to choose from; empty: all that the encoder has, or pool= alone
    holdout: float = 0.1  # share of the training images of each class on which the choice is made
    seeds: tuple[int, ...] = ()  # one training of the heads after another, with mean and deviation; empty: seed
    picture: str = ""  # PNG with the confusion matrix of the test images; empty: none


@dataclass
class Config(Choice):
    lr: tuple[float, ...] = LEARNING_RATES  # of SGD at a batch of 1024; one is chosen
    weight_decay: tuple[float, ...] = (0.0, 1e-3)  # one is chosen
    epochs: int | None = None  # of the heads; null: 100, or what the published protocol has
    probe_batch_size: int = 1024  # features in a step of the heads
    protocol: Literal["sweep", "mae", "dino"] = "sweep"  # mae, dino: the papers' own, with crops, one head
    global_batch_size: int | None = None  # of protocol=mae and dino; null: 16384 and 1024, as published


def run(config: Config) -> dict[str, Any]:
    """Features, sweep, choice, test; prints and writes <run>/eval/linear.json. Raises UserError."""
    pictures.check(config.picture)
    if config.protocol != "sweep":
        from . import published

        return published.run(config)
    check(config)
    task = protocol.prepare(config, "linear", pools(config))
    device = task.frozen.accelerator.device

    def probe(one: Config) -> dict[str, Any]:
        return choose(one, task, grid(one), trainer(one, len(task.classes), device))

    results = repeated(config, probe)
    say_ends([one["setting"]["lr"] for one in results.get("seeds", [results])], config.lr, "learning rate")
    protocol.write(config, task, "linear", results)
    return results


def check(config: Config) -> None:
    """Refuse settings of the sweep that cannot be. Raises UserError."""
    if not config.lr or min(config.lr) <= 0 or not config.weight_decay or min(config.weight_decay) < 0:
        raise UserError(
            f"lr={list(config.lr)} must be numbers above 0, and weight_decay={list(config.weight_decay)} numbers of 0 "
            "or above."
        )
    check_range("", config, 1, None, "epochs", "probe_batch_size")
    check_holdout(config.holdout)
    if config.global_batch_size:
        raise UserError("global_batch_size belongs to protocol=mae and protocol=dino: give probe_batch_size instead.")


def grid(config: Config) -> list[Setting]:
    return [{"lr": lr, "weight_decay": decay} for lr, decay in product(config.lr, config.weight_decay)]


def trainer(config: Config, num_classes: int, device: torch.device) -> Train:
    """What trains the heads of some settings on features, for `choose`."""

    def train(x: Tensor, labels: Tensor, chosen: Sequence[Setting]) -> Tensor:
        rates, decays = [one["lr"] for one in chosen], [one["weight_decay"] for one in chosen]
        heads = train_heads(
            x.to(device), labels.to(device), num_classes, rates, config.epochs or 100, decays,
            config.probe_batch_size, config.seed,
        )  # fmt: skip
        return heads.cpu()

    return train


def pools(config: Choice) -> Sequence[str] | None:
    """The configured ways of pooling; null for the one of `pool=`, or () for all that the encoder has. Raises UserError
    for what cannot be chosen from."""
    check_seeds(config.seeds)
    check_holdout(config.holdout)
    if config.pools and config.pool != "auto":
        raise UserError(f"pool={config.pool} and pools={list(config.pools)}: give one of them.")
    return config.pools if config.pools or config.pool == "auto" else None


def repeated(config: Any, work: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """The result of the one seed, or of each of `config.seeds` with their mean and deviation, printed."""
    if not config.seeds:
        return work(config)
    found = [
        work(replace(config, seed=seed, picture="" if place else config.picture))
        for place, seed in enumerate(config.seeds)
    ]
    whole = scores.summary(found)
    say(f"top-1 {whole['top1']:.2f} +- {whole['top1_deviation']:.2f} over the seeds {list(config.seeds)} of the heads")
    return {**whole, "seeds": [{"seed": seed, **one} for seed, one in zip(config.seeds, found, strict=True)]}


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises UserError."""
    if len(set(seeds)) < len(seeds) or len(seeds) == 1:
        raise UserError(f"seeds={list(seeds)} must be two or more that differ: give seed= for one.")


def choose(config: Choice, task: protocol.Task, settings: Sequence[Setting], train: Train) -> dict[str, Any]:
    """Train heads of all settings on all ways of pooling, choose one on the held-out part, train it on everything and
    test it; prints tables. `train(x, labels, settings)` gives [H, D + 1, C] heads. Raises UserError.

    All processes call it. The first does the work, with the features of one way of pooling at a time.
    """

    def attempt(pool: Pool) -> list[dict[str, Any]]:
        whole = task.whole(pool)
        return on_first_process(lambda: [{"pool": pool, **row} for row in try_all(config, whole[0], settings, train)])

    sweep = [row for pool in task.sets for row in attempt(pool)]
    best = best_of(sweep)
    whole = task.whole(best["pool"])
    return on_first_process(lambda: test_best(config, task.classes, *whole, sweep, settings, train))


def split(config: Any, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N] labels, -1 for none -> numbers of all that have one, of those to learn from while choosing, and of those held
    out. Raises UserError."""
    known = (labels >= 0).nonzero()[:, 0]
    held_out = hold_out(labels[known], config.holdout, config.seed)
    return known, known[~held_out], known[held_out]


def try_all(config: Any, features: Features, settings: Sequence[Setting], train: Train) -> list[dict[str, float]]:
    """Train heads of all settings on what is not held out: each setting with what its head makes of the rest."""
    _, learned, held_out = split(config, features.labels)
    heads, mean, std = fit(features, learned, settings, train)
    asked = features.labels[held_out]
    told, loss = judge(heads, features.values[held_out].sub_(mean).div_(std), asked)
    right = (told == asked).double().mean(dim=1)
    return [
        {**setting, "holdout_top1": round(100 * r.item(), 4), "holdout_loss": round(v.item(), 5)}
        for setting, r, v in zip(settings, right, loss, strict=True)
    ]


def fit(features: Features, rows: Tensor, settings: Sequence[Setting], train: Train) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of all settings from some of the images, with the mean and deviation of their features, of which there is
    one copy: it is standardised in its place."""
    x = features.values[rows]
    mean, std = standardisation(x)
    return train(x.sub_(mean).div_(std), features.labels[rows], settings), mean, std


def test_best(
    config: Choice, classes: list[str], train_set: Features, test_set: Features, sweep: Sequence[dict[str, Any]],
    settings: Sequence[Setting], train: Train,
) -> dict[str, Any]:  # fmt: skip
    """Train the chosen head on everything and test it; prints tables."""
    best = best_of(sweep)
    setting = {name: best[name] for name in settings[0]}
    known, _, held_out = split(config, train_set.labels)
    heads, mean, std = fit(train_set, known, [setting], train)
    rows = (test_set.labels >= 0).nonzero()[:, 0]
    asked = test_set.labels[rows]
    told, loss = judge(heads, test_set.values[rows].sub_(mean).div_(std), asked)
    say_sweep(sweep, settings)
    words = ", ".join(f"{name} {value:g}" for name, value in setting.items())
    how = f"with {words} on {protocol.describe_pool(best['pool'])}"
    results = outcome(config, classes, told[0], asked, how)
    return {**results, "pool": best["pool"], "setting": setting, "test_loss": round(loss.item(), 5),
            "holdout_images": len(held_out), "holdout_top1": best["holdout_top1"], "sweep": sweep}  # fmt: skip


def best_of(sweep: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The most accurate on held-out images; of equals, the one with the lower loss there. Heads that diverged lose."""
    return max(sweep, key=lambda row: (math.isfinite(row["holdout_loss"]), row["holdout_top1"], -row["holdout_loss"]))


def outcome(config: protocol.Config, classes: list[str], told: Tensor, labels: Tensor, how: str) -> dict[str, Any]:
    """[N] classes that test images were told to be, [N] their labels -> top-1, its interval and by class; printed, and
    drawn if the configuration asks for a picture."""
    right = told == labels
    top1 = 100 * right.double().mean().item()
    low, high = scores.interval(int(right.sum()), len(right))
    matrix = confusion.confusion(told, labels, len(classes))
    by_class = {row["class"]: row["accuracy"] for row in confusion.per_class(matrix, classes) if row["images"]}
    worst, best = min(by_class, key=by_class.get), max(by_class, key=by_class.get)
    say(f"test top-1 {top1:.2f} % (95 % interval {low:.1f} - {high:.1f}) {how}")
    say(f"by class from {by_class[worst]:.1f} % ({worst}) to {by_class[best]:.1f} % ({best})")
    if config.picture:
        confusion.picture(matrix, classes, config.picture)
    return {
        "top1": round(top1, 4), "top1_interval": (low, high), "by_class": by_class,
        "mean_by_class": round(sum(by_class.values()) / len(by_class), 4), "right": protocol.packed(right),
    }  # fmt: skip


def say_sweep(sweep: Sequence[dict[str, Any]], settings: Sequence[Setting]) -> None:
    """The best of each way of pooling, and of the best one all settings."""
    places = list(dict.fromkeys(row["pool"] for row in sweep))
    best = {pool: best_of([row for row in sweep if row["pool"] == pool]) for pool in places}
    names = list(settings[0])
    rows = [[pool, *(f"{row[name]:g}" for name in names), f"{row['holdout_top1']:.2f}"] for pool, row in best.items()]
    say(f"{len(sweep)} heads; the best of each way of pooling:")
    say(*protocol.table(["pool", *names, "held-out top-1 %"], rows))


def say_ends(chosen: Sequence[float], offered: Sequence[float], what: str) -> None:
    """Say if a chosen value is the smallest or the largest of several that were offered."""
    if len(offered) > 1 and not {min(offered), max(offered)}.isdisjoint(chosen):
        say(f"The chosen {what} is at the end of the list: a longer list may give a better one.")


def standardisation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature, [D] and [D]."""
    return x.mean(dim=0), (x.var(dim=0, unbiased=False) + 1e-6).sqrt()


def train_heads(
    x: Tensor, labels: Tensor, num_classes: int, lrs: Sequence[float], epochs: int,
    weight_decay: float | Sequence[float], batch_size: int, seed: int,
) -> Tensor:  # fmt: skip
    """[N, D] features, [N] labels -> [H, D + 1, num_classes] weights (the last row is the bias), one head for each
    learning rate.

    The heads are independent: SGD with momentum 0.9 on the sum of their losses, each with its own rate and decay, on
    half a cosine. All of them are one matrix product. weight_decay: one for all, or one for each.
    """
    width, heads = x.shape[1] + 1, len(lrs)
    key = rng.fold_in(seed, "probe")
    start = 0.01 * (rng.uniform(key, width * num_classes).view(width, num_classes, 1) * 2 - 1) * 3**0.5
    start[-1] = 0
    # [D + 1, C, H]: a softmax over few classes is 18 times faster with the heads side by side than with the classes.
    weights = start.repeat(1, 1, heads).to(x.device)
    momentum = torch.zeros_like(weights)
    batch_size = min(batch_size, len(x))
    rates = torch.tensor(lrs, device=x.device) * batch_size / 1024
    decays = torch.as_tensor(weight_decay, dtype=x.dtype, device=x.device).expand(heads)
    decayed, rows_of_batch = bool((decays != 0).any()), torch.arange(batch_size, device=x.device)
    steps_per_epoch = len(x) // batch_size
    for step in range(epochs * steps_per_epoch):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:
            order = rng.permutation(rng.fold_in(key, epoch), len(x)).to(x.device)
        rows = order[place * batch_size : (place + 1) * batch_size]
        batch = F.pad(x[rows], (0, 1), value=1.0)  # and not once: that would be a second copy of all features
        probabilities = (batch @ weights.flatten(1)).view(batch_size, num_classes, heads).softmax(dim=1)
        probabilities[rows_of_batch, labels[rows]] -= 1
        momentum.mul_(0.9).add_((batch.t() @ probabilities.flatten(1)).view_as(weights), alpha=1 / batch_size)
        if decayed:
            momentum.addcmul_(weights, decays)
        shape = schedules.cosine(1.0, 0.0, step / (epochs * steps_per_epoch))
        weights.addcmul_(momentum, rates, value=-shape)
    return weights.permute(2, 0, 1).contiguous()


def judge(heads: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[H, D + 1, C], [N, D], [N] -> [H, N] int64, the class of the largest logit, and [H] cross-entropy."""
    told, loss = [], []
    size = max(1, CHUNK // (heads.shape[0] * heads.shape[2]))
    for rows, wanted in zip(x.split(size), labels.split(size), strict=True):
        logits = F.pad(rows, (0, 1), value=1.0) @ heads  # [H, rows, C]
        told.append(logits.argmax(dim=-1))
        chosen = logits.gather(2, wanted.view(1, -1, 1).expand(len(heads), -1, -1)).squeeze(2)
        loss.append((logits.logsumexp(dim=-1) - chosen).double().sum(dim=1))
    return torch.cat(told, dim=1), sum(loss) / len(x)


def accuracy(heads: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """[H, D + 1, C], [N, D], [N] -> [H] top-1 in percent."""
    return 100 * (judge(heads, x, labels)[0] == labels).double().mean(dim=1)
