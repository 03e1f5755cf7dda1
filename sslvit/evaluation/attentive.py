"""Attentive probe: a learned query gathers an image's frozen patch tokens, and a linear classifier reads the result.

The fair probe for encoders that were not trained to put what they know into one token or mean, as MAE (El-Nouby et al.,
AIM, 2024, section 4; the head is that of CAPI, Darcet et al., 2025: one query, keys and values by linear layers, heads
of 64 channels). Tokens are standardised by the training set's mean and deviation, which is AIM's BatchNorm without
affine parameters. Settings are chosen on a held-out part of the training images (the same share of each class), one
head is trained again on all of them, and the test images are looked at once.

One query makes the keys a detour: q . (K x) = (K' q) . x, so a head never computes them, nor the values of single
tokens: it averages tokens and multiplies once. The same function and gradients, for a hundredth of the products.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import rng, schedules
from ..distributed import on_first_process, say
from ..errors import UserError, check_range
from . import Column, Command, pictures, probes, protocol, records
from .classes import check_readable, labels_of
from .probes import Setting
from .strata import check_holdout, hold_out
from .tokens import Tokens, patch_tokens

COMMAND = Command(
    "run=... data.train=... data.test=...",
    "attentive probe of frozen patch tokens",
    (Column("attentive", "top1"),),
)

HEAD_WIDTH = 64  # channels of an attention head


@dataclass
class Config(protocol.Config):
    lr: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)  # of AdamW; one is chosen
    weight_decay: tuple[float, ...] = (1e-4, 1e-1)  # one is chosen
    epochs: int = 20  # of the heads; the first tenth warms the learning rate up
    probe_batch_size: int = 512  # images in a step of the heads
    holdout: float = 0.1  # share of the training images of each class on which the choice is made
    seeds: tuple[int, ...] = ()  # one training of the heads after another, with mean and deviation; empty: seed
    picture: str = ""  # PNG with the confusion matrix of the test images; empty: none


@dataclass
class Set:
    """Images as the heads see them."""

    tokens: Tokens
    numbers: Tensor  # [M] int64, of the labelled images
    labels: Tensor  # [M] int64

    def __getitem__(self, rows: Tensor) -> "Set":
        return Set(self.tokens, self.numbers[rows], self.labels[rows])


def run(config: Config) -> dict[str, Any]:
    """Tokens, sweep, choice, test; prints and writes <run>/eval/attentive.json. Raises UserError."""
    if not config.lr or min(config.lr) <= 0 or not config.weight_decay or min(config.weight_decay) < 0:
        raise UserError("lr must be numbers above 0, and weight_decay numbers of 0 or above.")
    check_holdout(config.holdout)
    check_range("", config, 1, None, "epochs", "probe_batch_size")
    pictures.check(config.picture)
    probes.check_seeds(config.seeds)
    frozen, split = protocol.open_split(config, "attentive")
    folder = frozen.cache_folder(config.cache)
    sets = []
    for source in (split.train, split.test):
        tokens = patch_tokens(frozen, source, folder)
        labels = labels_of(source)[tokens.index]
        sets.append(Set(tokens, tokens.index[labels >= 0], labels[labels >= 0]))
    check_readable(sets[0].labels, sets[1].labels, split.specs)
    train, test = (records.describe_set(spec, len(one.tokens.index), one.tokens.unreadable)
                   for spec, one in zip(split.specs, sets, strict=True))  # fmt: skip
    say(f"attentive probe of {config.run}: {frozen.precision}; {len(sets[0].labels)} training and "
        f"{len(sets[1].labels)} test images in {len(split.classes)} classes")  # fmt: skip
    device = frozen.accelerator.device
    results = on_first_process(
        lambda: probes.for_each_seed(config, lambda one: choose(one, sets[0], sets[1], split.classes, device))
    )
    probes.warn_at_edge(results, "lr", config.lr, "learning rate")
    frozen.save("attentive", results, train=train, test=test, classes=len(split.classes), features="patch tokens")
    return results


def choose(config: Config, train: Set, test: Set, classes: list[str], device: torch.device) -> dict[str, Any]:
    """Train heads of all settings, choose on the held-out part, train the chosen one on everything, test it."""
    settings = [{"lr": lr, "weight_decay": decay} for lr in config.lr for decay in config.weight_decay]
    held_out = hold_out(train.labels, config.holdout, config.seed)
    fit, valid = train[~held_out], train[held_out]
    told, loss = judge(train_heads(config, fit, len(classes), settings, device), valid, device)
    right = (told == valid.labels).double().mean(dim=1)
    sweep = [
        {**setting, "holdout_top1": round(100 * r.item(), 4), "holdout_loss": round(v.item(), 5)}
        for setting, r, v in zip(settings, right, loss, strict=True)
    ]
    best = sweep.index(probes.best_of(sweep))
    rows = [[f"{r['lr']:g}", f"{r['weight_decay']:g}", f"{r['holdout_top1']:.2f}"] for r in sweep]
    say(*records.table(["lr", "weight decay", "held-out top-1 %"], rows))
    head = train_heads(config, train, len(classes), settings[best : best + 1], device)
    told, loss = judge(head, test, device)
    words = ", ".join(f"{name} {value:g}" for name, value in settings[best].items())
    results = probes.report(config, classes, told[0], test.labels, f"with {words}")
    return {**results, "setting": settings[best], "test_loss": round(loss.item(), 5),
            "holdout_top1": sweep[best]["holdout_top1"], "sweep": sweep}  # fmt: skip


class Head(nn.Module):
    """One query's attention over patch tokens, and a linear classifier. Its parameters only: `logits` runs many."""

    def __init__(self, width: int, num_classes: int, key: Tensor) -> None:
        super().__init__()
        heads = width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 1

        def drawn(name: str, *shape: int) -> nn.Parameter:
            normal = rng.uniform(rng.fold_in(key, name), math.prod(shape)).view(shape).clamp(1e-6, 1 - 1e-6)
            return nn.Parameter(0.02 * 2**0.5 * torch.erfinv(2 * normal - 1))

        self.query = drawn("query", heads, width // heads)
        self.keys = drawn("keys", heads, width // heads, width)
        self.values = drawn("values", heads, width // heads, width)
        self.value_bias = nn.Parameter(torch.zeros(heads, width // heads))
        self.weight = drawn("weight", num_classes, width)
        self.bias = nn.Parameter(torch.zeros(num_classes))


@dataclass
class Heads:
    """Independent heads, and the mean [D] and deviation [D] of the tokens that they were trained on."""

    heads: nn.ModuleList
    mean: Tensor
    std: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """[B, N, D] tokens -> [H, B, C]."""
        stacked = {name: torch.stack([getattr(head, name) for head in self.heads]) for name, _ in
                   self.heads[0].named_parameters()}  # fmt: skip
        count, heads, width = stacked["query"].shape
        direction = torch.einsum("shd,shde->she", stacked["query"], stacked["keys"]) / width**0.5 / self.std
        # Softmax over tokens does not see what all scores share, so the mean need not be taken off here.
        attention = (x @ direction.flatten(0, 1).t()).softmax(dim=1)  # [B, N, H * heads]
        gathered = (attention.transpose(1, 2) @ x - self.mean) / self.std
        gathered = gathered.unflatten(1, (count, heads))
        out = torch.einsum("bshe,shde->sbhd", gathered, stacked["values"]) + stacked["value_bias"].unsqueeze(1)
        return out.flatten(2) @ stacked["weight"].transpose(1, 2) + stacked["bias"].unsqueeze(1)


def train_heads(
    config: Config, train: Set, num_classes: int, settings: Sequence[Setting], device: torch.device
) -> Heads:
    """One head for each setting, by AdamW on the sum of their losses, so each as if alone. Raises UserError."""
    mean, std = standardisation(train)
    key = rng.fold_in(config.seed, "attentive")
    heads = nn.ModuleList(Head(len(mean), num_classes, key) for _ in settings).to(device)
    model = Heads(heads, mean.to(device), std.to(device))
    groups = [
        {"params": list(head.parameters()), "peak": one["lr"], "lr": 0.0, "weight_decay": one["weight_decay"]}
        for head, one in zip(heads, settings, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    size = min(config.probe_batch_size, len(train.labels))
    per_epoch = len(train.labels) // size
    total = config.epochs * per_epoch
    for step in range(total):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = rng.permutation(rng.fold_in(key, epoch), len(train.labels))
        batch = train[order[place * size : (place + 1) * size].sort().values]
        for group in optimizer.param_groups:
            group["lr"] = schedules.warmup_cosine(step + 1, group["peak"], 0.0, max(1, total // 10), total + 1)
        logits, labels = model.logits(batch.tokens[batch.numbers].to(device)), batch.labels.to(device)
        loss = sum(F.cross_entropy(of_one, labels) for of_one in logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def standardisation(train: Set) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel over all tokens of all images, [D] and [D]."""
    total, squares, count = 0.0, 0.0, 0
    for rows in train.numbers.split(1024):
        x = train.tokens[rows].flatten(0, 1).double()
        total, squares, count = total + x.sum(dim=0), squares + x.square().sum(dim=0), count + len(x)
    mean = total / count
    return mean.float(), (squares / count - mean.square() + 1e-6).sqrt().float()


@torch.no_grad()
def judge(model: Heads, images: Set, device: torch.device) -> tuple[Tensor, Tensor]:
    """[H, M] int64, the class of the largest logit, and [H] cross-entropy."""
    told, loss = [], []
    for rows in torch.arange(len(images.labels)).split(512):
        batch = images[rows]
        logits, labels = model.logits(batch.tokens[batch.numbers].to(device)), batch.labels.to(device)
        told.append(logits.argmax(dim=-1).cpu())
        loss.append(torch.stack([F.cross_entropy(of_one, labels, reduction="sum") for of_one in logits]).cpu())
    return torch.cat(told, dim=1), torch.stack(loss).sum(dim=0) / len(images.labels)
