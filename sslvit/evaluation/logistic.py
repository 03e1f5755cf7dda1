"""Logistic regression on frozen features, solved to its optimum by L-BFGS: no learning rate and no number of epochs.

The strength of the L2 penalty and the way of pooling are chosen on held-out training images. Then one regression is
solved on all training images and tested once (probes.py). CLIP (Radford et al., 2021, appendix A.3) and DINOv2 (Oquab
et al., 2023) do so.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, check_range
from . import Column, Command
from .config import Logistic as Config
from .probes import Setting, Train, run_probe

COMMAND = Command(
    "run=... data.train=... data.test=...",
    "logistic regression on frozen features",
    (Column("logistic", "top1"),),
)

ROWS = 2**15  # images in one part of the sum over images
CURVATURE = 0.1  # of cross-entropy along a logit, about p (1 - p)


def run(config: Config) -> dict[str, Any]:
    """Features, choice, test; prints and writes <run>/eval/logistic.json. Raises UserError."""
    if not config.l2 or min(config.l2) <= 0:
        raise UserError(f"l2={list(config.l2)} must be numbers above 0.")
    check_range("", config, 1, None, "iterations")
    return run_probe(config, "logistic", [{"l2": l2} for l2 in config.l2], trainer, "penalty")


def trainer(config: Config, num_classes: int, device: torch.device) -> Train:
    """The function that solves one regression for each setting, for `run_probe`."""

    def train(x: Tensor, labels: Tensor, settings: Sequence[Setting]) -> Tensor:
        penalties = [setting["l2"] for setting in settings]
        return solve(x.to(device), labels.to(device), num_classes, penalties, config.iterations).cpu()

    return train


def solve(x: Tensor, labels: Tensor, num_classes: int, penalties: Sequence[float], iterations: int) -> Tensor:
    """[N, D], [N] -> [H, D + 1, num_classes] weights with the bias last. A head minimises the mean cross-entropy plus
    half of its penalty times the sum of its squared weights. The bias is not penalised.

    All heads are solved as one problem, the sum of theirs: it has the same solution, and one pass over the features
    serves all. The weights are those of the principal components of the features, each scaled by the curvature of the
    loss there. Without it L-BFGS would need thousands of iterations: MAE's features have components that differ in size
    by a factor of thousands. The penalty is on the unscaled weights, so the solution stays the same.
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
        for rows, targets in zip(x.split(ROWS), labels.split(ROWS), strict=True):
            logits = (rows @ part_weights.flatten(1)).unflatten(1, shape[1:]) + bias
            targets = targets.unsqueeze(1).expand(-1, shape[1])
            part = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / len(x)
            part.backward()
            total += part.detach()
        penalty = (half * weights.square()).sum()
        (penalty + (weights * part_weights.grad).sum()).backward()
        return total + penalty.detach()

    optimizer.step(loss)
    weights = (directions @ (scaled[:-1] * scale).detach().flatten(1)).unflatten(1, shape[1:])
    return torch.cat([weights, scaled[-1:].detach()]).transpose(0, 1).contiguous()
