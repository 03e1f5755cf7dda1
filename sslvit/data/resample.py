"""Crops of many images, cut and resized at once on the device: two matrix products instead of a loop."""

from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError

CHUNK = 2**26  # values of the largest intermediate tensor; more images are done in parts


def resample(
    pixels: Tensor, boxes: Tensor, size: tuple[int, int], interpolation: Literal["bicubic", "bilinear"] = "bicubic"
) -> Tensor:
    """[B, C, H, W] uint8 and [B, 4] int64 boxes (top, left, height, width) -> [B, C, h, w] uint8, antialiased.

    The result is that of `torch.nn.functional.interpolate(..., antialias=True)` and PIL for each box: columns first,
    rounded to whole levels, then rows. They round their weights too; here the weights are float32.
    """
    if pixels.dtype != torch.uint8:
        raise UserError(f"images of 8 bits are resampled on the device, and these are {pixels.dtype}.")
    height, width = pixels.shape[-2:]
    most = max(1, CHUNK // (pixels.shape[1] * max(height, size[0]) * max(width, size[1])))
    boxes = boxes.to(pixels.device, non_blocking=True)
    return torch.cat(
        [_resample(*part, size, interpolation) for part in zip(pixels.split(most), boxes.split(most), strict=True)]
    )


def _resample(pixels: Tensor, boxes: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    b, c, height, width = pixels.shape
    across = weights(boxes[:, 1], boxes[:, 3], width, size[1], interpolation)
    down = weights(boxes[:, 0], boxes[:, 2], height, size[0], interpolation)
    # Plain batches of matrices, because torch would copy the weights for each channel to broadcast them.
    rows = pixels.permute(0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)
    narrow = _levels(torch.bmm(rows.view(b, height * c, width), across.transpose(1, 2))).view(b, height, c * size[1])
    crops = _levels(torch.bmm(down, narrow)).to(torch.uint8)
    return crops.view(b, size[0], c, size[1]).transpose(1, 2)


def weights(start: Tensor, length: Tensor, full: int, size: int, interpolation: str) -> Tensor:
    """Weights that resize a span of a line of `full` pixels to `size` pixels: [B, size, full] float32.

    start, length: [B], of the spans, in pixels. Rows sum to 1. Pixels outside the span have weight 0.
    """
    scale = (length.float() / size).view(-1, 1, 1)
    centre = (torch.arange(size, device=start.device).view(1, -1, 1) + 0.5) * scale
    place = torch.arange(full, device=start.device).view(1, 1, -1) - start.view(-1, 1, 1)
    inside = (place >= 0) & (place < length.view(-1, 1, 1))
    shrink = scale.clamp(min=1.0)
    kernel = _kernel((place + 0.5) / shrink - centre / shrink, interpolation).mul_(inside)
    return kernel.div_(kernel.sum(-1, keepdim=True))


def _kernel(x: Tensor, interpolation: str) -> Tensor:
    """Triangle, or Keys' cubic with a = -1/2 ("Cubic convolution interpolation", 1981), as PIL has it."""
    x = x.abs_()
    if interpolation == "bilinear":
        return x.neg_().add_(1).clamp_(min=0)
    near = ((1.5 * x).sub_(2.5).mul_(x)).mul_(x).add_(1)
    far = ((-0.5 * x).add_(2.5).mul_(x)).sub_(4).mul_(x).add_(2)
    return torch.where(x < 1, near, far.mul_(x < 2))


def _levels(values: Tensor) -> Tensor:
    """Rounded in place to whole levels of 0 .. 255."""
    return values.add_(0.5).floor_().clamp_(0, 255)
