"""Attentive probe: a learned query gathers an image's frozen patch tokens, and a linear classifier reads the result.

The fair probe for encoders that were not trained to put their knowledge into one token or a mean, such as MAE (El-Nouby
et al., AIM, 2024, section 4). The head is that of CAPI (Darcet et al., 2025): one query, keys and values by linear
layers, heads of 64 channels. Tokens are standardised by the training set's mean and standard deviation, which is AIM's
BatchNorm without affine parameters. Settings are chosen on a held-out part of the training images (the same share of
each class). Then one head is trained on all of them and tested once.

With a single query, q . (K x) = (K' q) . x. So a head computes no keys, and no values of single tokens: it averages the
tokens and multiplies once. Function and gradients are the same, with a hundredth of the multiplications.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import optim, rng
from ..distributed import on_first_process, say
from ..errors import UserError, check_range
from . import Column, Command, pictures, probes, protocol, records
from .classes import check_readable, labels_of
from .config import Attentive as Config
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
class Set:
    """The labelled images of a set: their tokens and classes."""

    tokens: Tokens
    numbers: Tensor  # [M] int64, of the images in the source
    labels: Tensor  # [M] int64

    def __getitem__(self, rows: Tensor) -> "Set":
        return Set(self.tokens, self.numbers[rows], self.labels[rows])


def run(config: Config) -> dict[str, Any]:
    """Tokens, sweep, choice, test; prints and writes <run>/eval/attentive.json. Raises UserError."""
    if not config.lr or min(config.lr) <= 0 or not config.weight_decay or min(config.weight_decay) < 0:
        raise UserError(
            f"lr={list(config.lr)} must be numbers above 0, and weight_decay={list(config.weight_decay)} numbers of at "
            "least 0."
        )
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
    predictions, loss = predict(train_heads(config, fit, len(classes), settings, device), valid, device)
    top1 = 100 * (predictions == valid.labels).double().mean(dim=1)
    sweep = [
        {**setting, "holdout_top1": round(accuracy, 4), "holdout_loss": round(one, 5)}
        for setting, accuracy, one in zip(settings, top1.tolist(), loss.tolist(), strict=True)
    ]
    best = sweep.index(probes.best_of(sweep))
    rows = [[f"{r['lr']:g}", f"{r['weight_decay']:g}", f"{r['holdout_top1']:.2f}"] for r in sweep]
    say(*records.table(["lr", "weight decay", "held-out top-1 %"], rows))
    head = train_heads(config, train, len(classes), settings[best : best + 1], device)
    predictions, loss = predict(head, test, device)
    chosen = ", ".join(f"{name} {value:g}" for name, value in settings[best].items())
    results = probes.report(config, classes, predictions[0], test.labels, f"with {chosen}")
    return {**results, "setting": settings[best], "test_loss": round(loss.item(), 5),
            "holdout_top1": sweep[best]["holdout_top1"], "sweep": sweep}  # fmt: skip


class Head(nn.Module):
    """The parameters of one query's attention over patch tokens and of a linear classifier; see `Heads.logits`."""

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
    """Independent heads, and the mean [D] and standard deviation [D] of the tokens that they were trained on."""

    heads: nn.ModuleList
    mean: Tensor
    std: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """[B, N, D] tokens -> [H, B, C]."""
        stacked = {name: torch.stack([getattr(head, name) for head in self.heads]) for name, _ in
                   self.heads[0].named_parameters()}  # fmt: skip
        count, heads, width = stacked["query"].shape
        direction = torch.einsum("shd,shde->she", stacked["query"], stacked["keys"]) / width**0.5 / self.std
        # The mean is not subtracted here: it adds the same to all scores, which softmax over tokens ignores.
        attention = (x @ direction.flatten(0, 1).t()).softmax(dim=1)  # [B, N, H * heads]
        gathered = (attention.transpose(1, 2) @ x - self.mean) / self.std
        gathered = gathered.unflatten(1, (count, heads))
        out = torch.einsum("bshe,shde->sbhd", gathered, stacked["values"]) + stacked["value_bias"].unsqueeze(1)
        return out.flatten(2) @ stacked["weight"].transpose(1, 2) + stacked["bias"].unsqueeze(1)


def train_heads(
    config: Config, train: Set, num_classes: int, settings: Sequence[Setting], device: torch.device
) -> Heads:
    """One head for each setting, by AdamW on the sum of their losses: each learns as if it were the only one."""
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
            group["lr"] = optim.warmup_cosine(step + 1, group["peak"], 0.0, max(1, total // 10), total + 1)
        logits, labels = model.logits(batch.tokens[batch.numbers].to(device)), batch.labels.to(device)
        loss = torch.stack([F.cross_entropy(of_one, labels) for of_one in logits]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def standardisation(train: Set) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all tokens of all images, [D] and [D]."""
    total = squares = torch.zeros(train.tokens.values.shape[-1], dtype=torch.float64)
    count = 0
    for rows in train.numbers.split(1024):
        x = train.tokens[rows].flatten(0, 1).double()
        total, squares, count = total + x.sum(dim=0), squares + x.square().sum(dim=0), count + len(x)
    mean = total / count
    return mean.float(), (squares / count - mean.square() + 1e-6).sqrt().float()


@torch.no_grad()
def predict(model: Heads, images: Set, device: torch.device) -> tuple[Tensor, Tensor]:
    """[H, M] int64 predicted classes, and [H] cross-entropy."""
    predictions, loss = [], []
    for rows in torch.arange(len(images.labels)).split(512):
        batch = images[rows]
        logits, labels = model.logits(batch.tokens[batch.numbers].to(device)), batch.labels.to(device)
        predictions.append(logits.argmax(dim=-1).cpu())
        loss.append(torch.stack([F.cross_entropy(of_one, labels, reduction="sum") for of_one in logits]).cpu())
    return torch.cat(predictions, dim=1), torch.stack(loss).sum(dim=0) / len(images.labels)
