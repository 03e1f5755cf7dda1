"""Attacks on a classifier: each pixel of an image moves by at most eps, to raise the cross-entropy of the right class.

fgsm   x + eps sign(gradient). Goodfellow et al., ICLR 2015 (arXiv 1412.6572), section 4.
pgd    From a random point within eps, `steps` steps of 2.5 eps / steps along the sign of the gradient. Each is clipped
       to at most eps from x and to [0, 1]. Madry et al., ICLR 2018 (arXiv 1706.06083), section 2.1. Of all points on
       the way, the one with the largest loss is the attack.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rng

Logits = Callable[[Tensor], Tensor]  # [B, C, H, W] in [0, 1] -> [B, classes]


def fgsm(logits: Logits, x: Tensor, labels: Tensor, eps: float, steps: int, key: Tensor) -> Tensor:
    """[B, C, H, W] in [0, 1], [B] -> images at most eps from x and in [0, 1]. steps and key are for pgd."""
    return _within(x + eps * _uphill(logits, x, labels)[0], x, eps)


def pgd(logits: Logits, x: Tensor, labels: Tensor, eps: float, steps: int, key: Tensor) -> Tensor:
    """As `fgsm`, in `steps` steps from a random point. key: [B], of the images."""
    if eps == 0:
        return x
    start = rng.uniform(rng.fold_in(key, "start"), x[0].numel()).view(x.shape).to(x.device)
    moved = _within(x + eps * (2 * start - 1), x, eps)
    best, largest = moved, torch.full((len(x),), -torch.inf, device=x.device)
    for _ in range(steps):
        direction, loss = _uphill(logits, moved, labels)
        best, largest = _worse(best, largest, moved, loss)
        moved = _within(moved + 2.5 * eps / steps * direction, x, eps)
    with torch.no_grad():
        loss = F.cross_entropy(logits(moved), labels, reduction="none")
    return _worse(best, largest, moved, loss)[0]


def _uphill(logits: Logits, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sign of the gradient of the loss by the image, and the loss of each image."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        loss = F.cross_entropy(logits(x), labels, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), x)
    return gradient.sign(), loss.detach()


def _worse(best: Tensor, largest: Tensor, moved: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    worse = loss > largest
    return torch.where(worse.view(-1, 1, 1, 1), moved, best), torch.where(worse, loss, largest)


def _within(moved: Tensor, x: Tensor, eps: float) -> Tensor:
    return torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0, 1)


ATTACKS = {"fgsm": fgsm, "pgd": pgd}
