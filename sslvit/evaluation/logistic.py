"""Logistic regression on frozen features, solved to its optimum by L-BFGS: no learning rate and no number of epochs.

The strength of the L2 penalty and the way of pooling are chosen on a held-out part of the training images, the same
share of each class (at least one image where it has two or more); then one regression is solved on all of them, and the
test images are looked at once. Features are standardised by the training set's mean and deviation. So do CLIP (Radford
et al., 2021, appendix A.3) and DINOv2 (Oquab et al., 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, check_range
from . import Column, Command, pictures
from .probes import ProbeConfig, Setting, Train, run_probe

COMMAND = Command(
    "run=... data.train=... data.test=...",
    "logistic regression on frozen features",
    (Column("logistic", "top1"),),
)

ROWS = 2**15  # features in a part of the sum over images
CURVATURE = 0.1  # of cross-entropy along a logit, about p (1 - p)


@dataclass
class Config(ProbeConfig):
    l2: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # penalty: l2 / 2 * sum of squared weights; one is chosen
    iterations: int = 100  # of L-BFGS at most


def run(config: Config) -> dict[str, Any]:
    """Features, choice, test; prints and writes <run>/eval/logistic.json. Raises UserError."""
    if not config.l2 or min(config.l2) <= 0:
        raise UserError(f"l2={list(config.l2)} must be numbers above 0.")
    check_range("", config, 1, None, "iterations")
    pictures.check(config.picture)
    return run_probe(config, "logistic", [{"l2": l2} for l2 in config.l2], trainer, "penalty")


def trainer(config: Config, num_classes: int, device: torch.device) -> Train:
    """What solves the regression of each setting, for `probes`."""

    def train(x: Tensor, labels: Tensor, settings: Sequence[Setting]) -> Tensor:
        penalties = [setting["l2"] for setting in settings]
        return solve(x.to(device), labels.to(device), num_classes, penalties, config.iterations).cpu()

    return train


def solve(x: Tensor, labels: Tensor, num_classes: int, penalties: Sequence[float], iterations: int) -> Tensor:
    """[N, D], [N] -> [H, D + 1, num_classes] weights with the bias last. A head minimises the mean cross-entropy plus
    half of its penalty times the sum of its squared weights; the bias is not penalised.

    The heads are one problem, the sum of theirs, which has the same solution: a pass over the features costs the same
    for all of them as for one. It is solved in the main directions of the features, each scaled by the curvature that a
    head has there: MAE's features differ by a factor of thousands between directions, and L-BFGS would need as many
    iterations. The penalty is on the weights as they are, so the solution is that of the problem as it is written.
    """
    shape = (x.shape[1] + 1, len(penalties), num_classes)
    covariance = sum(part.double().t() @ part.double() for part in x.split(ROWS)) / len(x)
    variances, directions = torch.linalg.eigh(covariance)
    l2 = torch.tensor(penalties, device=x.device, dtype=torch.float64)
    scale = (CURVATURE * variances.clamp(min=0).unsqueeze(1) + l2).rsqrt().to(x.dtype).unsqueeze(2)  # [D, H, 1]
    directions, half = directions.to(x.dtype), (l2 / 2).to(x.dtype).view(1, -1, 1)
    x = x @ directions
    scaled = torch.zeros(shape, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scaled], max_iter=iterations, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        weights, total = scaled[:-1] * scale, torch.zeros((), device=x.device)
        part_weights = weights.detach().requires_grad_()
        bias = scaled[-1]
        for rows, wanted in zip(x.split(ROWS), labels.split(ROWS), strict=True):
            logits = (rows @ part_weights.flatten(1)).unflatten(1, shape[1:]) + bias
            wanted = wanted.unsqueeze(1).expand(-1, shape[1])
            part = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum") / len(x)
            part.backward()
            total += part.detach()
        penalty = (half * weights.square()).sum()
        (penalty + (weights * part_weights.grad).sum()).backward()
        return total + penalty.detach()

    optimizer.step(loss)
    weights = (directions @ (scaled[:-1] * scale).detach().flatten(1)).unflatten(1, shape[1:])
    return torch.cat([weights, scaled[-1:].detach()]).transpose(0, 1).contiguous()
