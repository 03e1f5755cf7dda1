"""Linear probe: many linear classifiers with different learning rates, trained at once on frozen features.

The learning rate is chosen on a held-out part of the training images, the classifier is trained again on all of them,
and the test images are looked at once. Features are standardised by the training set's mean and deviation, which is
what the BatchNorm without affine parameters of MAE's protocol does (He et al., appendix A.1; its code).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rng, schedules
from ..distributed import on_first_process, say
from ..errors import UserError
from . import protocol

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)


@dataclass
class Config(protocol.Config):
    lr: tuple[float, ...] = LEARNING_RATES  # of SGD at a batch of 1024; one is chosen
    epochs: int = 100  # of the heads
    weight_decay: float = 0.0  # of the heads
    holdout: float = 0.1  # share of the training images on which the learning rate is chosen
    probe_batch_size: int = 1024  # features in a step of the heads


def run(config: Config) -> dict[str, float]:
    """Features, sweep, choice, test; prints and writes <run>/eval/linear.json. Raises UserError."""
    if not 0 < config.holdout < 1:
        raise UserError(f"holdout={config.holdout} must lie between 0 and 1, both excluded.")
    if not config.lr or min(config.lr) <= 0 or config.epochs < 1 or config.probe_batch_size < 1:
        raise UserError("lr, epochs and probe_batch_size must be above 0.")
    task = protocol.prepare(config, "linear")
    results = on_first_process(lambda: probe(config, task))
    protocol.write(config, task, "linear", results)
    return results


def probe(config: Config, task: protocol.Task) -> dict[str, Any]:
    """Sweep, choice and test on features; prints a table. Raises UserError."""
    known = task.train_labels >= 0
    x, labels = task.train.values[known], task.train_labels[known]
    held_out = rng.permutation(rng.fold_in(config.seed, "holdout"), len(x)) < round(config.holdout * len(x))
    if not 0 < held_out.sum() < len(x):
        raise UserError(
            f"holdout={config.holdout} of {len(x)} training images leaves none on one side: use more images."
        )

    def train(x: Tensor, labels: Tensor, lrs: Sequence[float]) -> Tensor:
        return train_heads(
            x, labels, len(task.classes), lrs, config.epochs, config.weight_decay, config.probe_batch_size, config.seed
        )

    mean, std = standardisation(x[~held_out])
    heads = train((x[~held_out] - mean) / std, labels[~held_out], config.lr)
    valid = accuracy(heads, (x[held_out] - mean) / std, labels[held_out])
    loss = cross_entropy(heads, (x[held_out] - mean) / std, labels[held_out])
    best = max(
        range(len(config.lr)), key=lambda head: (valid[head].item(), -loss[head].item())
    )  # a tie: the lower loss
    mean, std = standardisation(x)
    head = train((x - mean) / std, labels, config.lr[best : best + 1])
    test = task.test_labels >= 0
    top1 = accuracy(head, (task.test.values[test] - mean) / std, task.test_labels[test]).item()
    low, high = protocol.interval(top1, int(test.sum()), config.seed)
    results = {
        "top1": round(top1, 4),
        "top1_interval": (low, high),
        "lr": config.lr[best],
        "holdout_top1": round(valid[best].item(), 4),
        "sweep": [{"lr": lr, "holdout_top1": round(v, 4)} for lr, v in zip(config.lr, valid.tolist(), strict=True)],
    }
    rows = [[f"{lr:g}", f"{value:.2f}"] for lr, value in zip(config.lr, valid.tolist(), strict=True)]
    say(*protocol.table(["lr", "held-out top-1 %"], rows))
    say(
        f"test top-1 {top1:.2f}% (95 % interval {low:.1f} - {high:.1f}) with lr {config.lr[best]:g}, "
        "chosen on the held-out part"
    )
    if best in (0, len(config.lr) - 1) and len(config.lr) > 1:
        say("The chosen learning rate is at the end of the list: a longer list may give a better one.")
    return results


def standardisation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature, [D] and [D]."""
    return x.mean(dim=0), (x.var(dim=0, unbiased=False) + 1e-6).sqrt()


def train_heads(
    x: Tensor, labels: Tensor, num_classes: int, lrs: Sequence[float], epochs: int, weight_decay: float,
    batch_size: int, seed: int,
) -> Tensor:  # fmt: skip
    """[N, D] features, [N] labels -> [H, D + 1, num_classes] weights (the last row is the bias), one head for each
    rate.

    The heads are independent: SGD with momentum 0.9 on the sum of their losses, each with its own rate, on half a
    cosine. All of them are one matrix product.
    """
    x = F.pad(x, (0, 1), value=1.0)
    key = rng.fold_in(seed, "probe")
    weights = 0.01 * (rng.uniform(key, x.shape[1] * num_classes).view(1, x.shape[1], num_classes) * 2 - 1) * 3**0.5
    weights = weights.repeat(len(lrs), 1, 1)
    weights[:, -1] = 0
    momentum = torch.zeros_like(weights)
    batch_size = min(batch_size, len(x))
    rates = torch.tensor(lrs).view(-1, 1, 1) * batch_size / 1024
    steps_per_epoch = len(x) // batch_size
    for step in range(epochs * steps_per_epoch):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:
            order = rng.permutation(rng.fold_in(key, epoch), len(x))
        rows = order[place * batch_size : (place + 1) * batch_size]
        batch = x[rows]
        probabilities = (batch @ weights).softmax(dim=-1)  # [H, B, C]
        probabilities[:, torch.arange(batch_size), labels[rows]] -= 1
        gradient = batch.t() @ probabilities / batch_size + weight_decay * weights
        momentum = 0.9 * momentum + gradient
        weights = weights - schedules.cosine(1.0, 0.0, step / (epochs * steps_per_epoch)) * rates * momentum
    return weights


def accuracy(heads: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """[H, D + 1, C], [N, D], [N] -> [H] top-1 in percent."""
    predictions = (F.pad(x, (0, 1), value=1.0) @ heads).argmax(dim=-1)
    return 100 * (predictions == labels).double().mean(dim=1)


def cross_entropy(heads: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """[H, D + 1, C], [N, D], [N] -> [H]."""
    logits = F.pad(x, (0, 1), value=1.0) @ heads
    return torch.stack([F.cross_entropy(of_one, labels) for of_one in logits])
