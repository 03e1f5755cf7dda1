"""Crops of many images at once, resized on the device where they lie: two matrix products instead of a loop."""

from typing import Literal

import torch
from torch import Tensor

from .errors import UserError

CHUNK = 2**26  # values of the largest tensor in between; more images are taken in parts


def resample(
    pixels: Tensor, boxes: Tensor, size: tuple[int, int], interpolation: Literal["bicubic", "bilinear"] = "bicubic"
) -> Tensor:
    """[B, C, H, W] uint8 and [B, 4] int64 boxes (top, left, height, width) -> [B, C, h, w] uint8, antialiased.

    What `torch.nn.functional.interpolate(..., antialias=True)` and PIL do with each box: columns first, rounded to a
    level, then rows. Their weights are rounded as well, these are not.
    """
    if pixels.dtype != torch.uint8:
        raise UserError(f"images of 8 bits are resampled on the device, and these are {pixels.dtype}.")
    height, width = pixels.shape[-2:]
    rows = max(1, CHUNK // (pixels.shape[1] * max(height, size[0]) * max(width, size[1])))
    boxes = boxes.to(pixels.device, non_blocking=True)
    parts = []
    for part, box in zip(pixels.split(rows), boxes.split(rows), strict=True):
        across = weights(box[:, 1], box[:, 3], width, size[1], interpolation)
        down = weights(box[:, 0], box[:, 2], height, size[0], interpolation)
        narrow = _levels(part.float() @ across.unsqueeze(1).transpose(-1, -2))
        parts.append(_levels(down.unsqueeze(1) @ narrow).to(torch.uint8))
    return torch.cat(parts)


def weights(start: Tensor, length: Tensor, full: int, size: int, interpolation: str) -> Tensor:
    """[B] first pixels and lengths of spans of a line of `full` pixels -> [B, size, full] float32: what each pixel adds
    to each of the `size` that the span becomes. Rows sum to 1; what lies outside the span adds nothing."""
    scale = (length.float() / size).view(-1, 1, 1)
    centre = (torch.arange(size, device=start.device).float() + 0.5).view(1, -1, 1) * scale
    place = torch.arange(full, device=start.device).view(1, 1, -1) - start.view(-1, 1, 1)
    inside = (place >= 0) & (place < length.view(-1, 1, 1))
    kernel = _kernel((place + 0.5 - centre) / scale.clamp(min=1.0), interpolation) * inside
    return kernel / kernel.sum(-1, keepdim=True)


def _kernel(x: Tensor, interpolation: str) -> Tensor:
    """Triangle, or Keys' cubic with a = -1/2 ("Cubic convolution interpolation", 1981), as PIL has it."""
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _levels(values: Tensor) -> Tensor:
    """Rounded to whole levels of 0 .. 255."""
    return (values + 0.5).floor_().clamp_(0, 255)
