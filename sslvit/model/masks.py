"""Which patches are hidden, drawn from each image's key (data/loader.py makes it of seed, epoch and image).

In a mask, True = hidden from the encoder.
"""

import math

import torch
from torch import Tensor

from .. import rng


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """How many patches stay visible, rounded down as in the published MAE: int(100 * (1 - 0.9)) is 9, not 10."""
    return int(num_patches * (1 - mask_ratio))


def random_order(key: Tensor, num_patches: int) -> Tensor:
    """[B] int64 keys -> [B, N] int64, a random order of each image's patches."""
    return rng.permutation(rng.fold_in(key, "mask"), num_patches)


def split(order: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """[B, N] order -> keep [B, K], hide [B, N-K]: indices of the visible and of the hidden patches.

    The list is shuffled and its first part kept (MAE, section 3, "Masking").
    """
    return order[:, :kept], order[:, kept:]


def from_indices(hide: Tensor, num_patches: int) -> Tensor:
    """[B, H] indices -> [B, N] bool, True at these."""
    return torch.zeros(len(hide), num_patches, dtype=torch.bool, device=hide.device).scatter_(1, hide, True)


def enlarge(mask: Tensor, grid: tuple[int, int], factor: tuple[int, int]) -> Tensor:
    """[B, N] on a grid of (h, w) large patches -> [B, N * f * g] on a grid of small ones, (f, g) in each (SimMIM)."""
    cells = mask.unflatten(1, grid)
    return cells.repeat_interleave(factor[0], dim=1).repeat_interleave(factor[1], dim=2).flatten(1)


def random_blocks(
    key: Tensor, grid: tuple[int, int], num_hidden: int | Tensor, min_area: float,
    aspect: tuple[float, float] = (0.3, 1 / 0.3), tries: int = 10, draws: int = 60,
) -> Tensor:  # fmt: skip
    """[B] int64 keys -> [B, h * w] bool: random rectangles (BEiT, Bao et al., 2022, algorithm 1 and its code; iBOT).

    num_hidden: patches of each image, a number or [B]. Fewer are hidden after `tries` draws in a row that do not fit,
    as in the published code, or after `draws` in all. min_area: of a rectangle, in patches (BEiT 16, DINOv2 4, iBOT
    (min(h, w) // 3)^2). aspect: range of height / width.
    """
    h, w = grid
    rows, columns = torch.arange(h, device=key.device).view(-1, 1), torch.arange(w, device=key.device)
    mask = torch.zeros(len(key), h, w, dtype=torch.bool, device=key.device)
    wanted = num_hidden.view(-1, 1, 1) if isinstance(num_hidden, Tensor) else num_hidden
    failed = torch.zeros_like(key).view(-1, 1, 1)  # draws since the last rectangle
    low, high = math.log(aspect[0]), math.log(aspect[1])
    uniform = rng.uniform(rng.fold_in(key, "mask"), 4 * draws).view(-1, draws, 4, 1, 1)
    # A fixed number of draws for the whole batch: to ask whether all images are done would wait for the device.
    for i in range(draws):
        u = uniform[:, i]  # [B, 4, 1, 1]
        room = wanted - mask.sum(dim=(1, 2), keepdim=True)
        area, ratio = min_area + (room - min_area) * u[:, 0], torch.exp(low + (high - low) * u[:, 1])
        height, width = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        top, left = (u[:, 2] * (h - height + 1)).long(), (u[:, 3] * (w - width + 1)).long()
        inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
        new = (inside & ~mask).sum(dim=(1, 2), keepdim=True)
        fits = (height < h) & (width < w) & (new > 0) & (new <= room) & (failed < tries)
        mask |= inside & fits
        failed = torch.where(fits, 0, failed + 1)
    return mask.flatten(1)
