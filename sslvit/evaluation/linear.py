"""Linear probe: many linear classifiers on frozen features, trained at once; one is chosen and tested.

The grid is learning rates x weight decays x ways of pooling the tokens (class token, mean of patches, both, the last
four blocks), as in DINOv2 (Oquab et al., 2023, appendix B.3, with 52 heads). probes.py chooses and tests.
`protocol=mae` and `protocol=dino` are the papers' own protocols, see published.py.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import optim, rng
from ..errors import UserError, check_range
from . import Column, Command, published
from .config import Linear as Config
from .probes import Setting, Train, run_probe
from .strata import check_holdout

COMMAND = Command(
    "run=... data.train=... data.test=...",
    "linear probe of frozen features",
    (
        Column("linear", "top1"),
        Column("linear (mae)", "top1", file="linear_mae"),
        Column("linear (dino)", "top1", file="linear_dino"),
    ),
)


def run(config: Config) -> dict[str, Any]:
    """Features, sweep, choice, test; prints and writes <run>/eval/linear.json. Raises UserError."""
    if config.protocol != "sweep":
        return run_published(config)
    check(config)
    return run_probe(config, "linear", grid(config), trainer, "learning rate")


def run_published(config: Config) -> dict[str, Any]:
    """One head by a paper's protocol. Raises UserError for keys of the sweep."""
    default = Config()
    for key in ("pools", "seeds", "weight_decay", "holdout", "probe_batch_size"):
        if getattr(config, key) != getattr(default, key):
            raise UserError(f"{key} belongs to protocol=sweep: leave it out for protocol={config.protocol}.")
    lr = None if config.lr == default.lr else config.lr
    if lr is not None and (len(lr) != 1 or lr[0] <= 0):
        raise UserError(
            f"lr={list(lr)}: protocol={config.protocol} has one learning rate above 0, at a batch of 256 images."
        )
    check_range("", config, 1, None, "epochs", "global_batch_size")
    return published.run(config, config.protocol, lr and lr[0], config.epochs, config.global_batch_size)


def check(config: Config) -> None:
    """Raises UserError for settings of the sweep that cannot work."""
    if not config.lr or min(config.lr) <= 0 or not config.weight_decay or min(config.weight_decay) < 0:
        raise UserError(
            f"lr={list(config.lr)} must be numbers above 0, and weight_decay={list(config.weight_decay)} numbers of at "
            "least 0."
        )
    check_range("", config, 1, None, "epochs", "probe_batch_size")
    check_holdout(config.holdout)
    if config.global_batch_size:
        raise UserError("global_batch_size belongs to protocol=mae and protocol=dino: give probe_batch_size instead.")


def grid(config: Config) -> list[Setting]:
    return [{"lr": lr, "weight_decay": decay} for lr, decay in product(config.lr, config.weight_decay)]


def trainer(config: Config, num_classes: int, device: torch.device) -> Train:
    """The function that trains one head for each setting, for `run_probe`."""

    def train(x: Tensor, labels: Tensor, settings: Sequence[Setting]) -> Tensor:
        rates, decays = [one["lr"] for one in settings], [one["weight_decay"] for one in settings]
        heads = train_heads(
            x.to(device), labels.to(device), num_classes, rates, config.epochs or 100, decays,
            config.probe_batch_size, config.seed,
        )  # fmt: skip
        return heads.cpu()

    return train


def train_heads(
    x: Tensor, labels: Tensor, num_classes: int, lrs: Sequence[float], epochs: int,
    weight_decay: float | Sequence[float], batch_size: int, seed: int, weights_of_loss: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[N, D] features, [N] labels -> [H, D + 1, num_classes] weights (the last row is the bias), one head for each
    learning rate. labels may also be [N, num_classes] shares of the classes; weights_of_loss: [N], of their loss.

    SGD with momentum 0.9 on the sum of the heads' losses, so each head learns as if it were the only one. Each has its
    own learning rate, which falls on half a cosine. All heads are one matrix product. weight_decay: one for all heads,
    or one for each.
    """
    width, heads = x.shape[1] + 1, len(lrs)
    key = rng.fold_in(seed, "probe")
    start = 0.01 * (rng.uniform(key, width * num_classes).view(width, num_classes, 1) * 2 - 1) * 3**0.5
    start[-1] = 0
    # [D + 1, C, H]: with the heads in the last dimension a softmax over few classes is 18 times faster.
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
        batch = F.pad(x[rows], (0, 1), value=1.0)  # of a batch: padding all features once would copy them
        probabilities = (batch @ weights.flatten(1)).view(batch_size, num_classes, heads).softmax(dim=1)
        if labels.ndim == 1:
            probabilities[rows_of_batch, labels[rows]] -= 1
        else:
            probabilities -= labels[rows].unsqueeze(2)
        if weights_of_loss is not None:
            probabilities *= weights_of_loss[rows].view(-1, 1, 1)
        momentum.mul_(0.9).add_((batch.t() @ probabilities.flatten(1)).view_as(weights), alpha=1 / batch_size)
        if decayed:
            momentum.addcmul_(weights, decays)
        shape = optim.cosine(1.0, 0.0, step / (epochs * steps_per_epoch))
        weights.addcmul_(momentum, rates, value=-shape)
    return weights.permute(2, 0, 1).contiguous()
