"""Nine corruptions of an image, each at five severities: noise, blur, light and digital artefacts.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019
(arXiv 1903.12261), section 3 and appendix B. The numbers are those of their released scripts: CIFAR-10-C for images of
up to 64 pixels, ImageNet-C for larger ones. As there, an image is first resized and cropped, then corrupted, and the
result is rounded to 8 bits. Fog, frost, snow, glass, motion, zoom and elastic are left out: they need more pictures or
libraries. So the mean over these nine is not the paper's mCE.

x is in [0, 1], c the severity's number:

gaussian_noise   x + c n, n normal, for each value
shot_noise       Poisson(c x) / c
impulse_noise    a share c of the values becomes 0 or 1, each with probability c / 2
gaussian_blur    a Gaussian of c pixels
defocus_blur     mean over a disk of radius r, itself smoothed by a Gaussian of s pixels, c = (r, s)
brightness       V + c in HSV, which multiplies all channels by (V + c) / V
contrast         m + c (x - m), m the mean of the channel
pixelate         reduced to a share c of the side and enlarged again, by box filters
jpeg             JPEG of quality c

Random numbers are a function of (seed, corruption, severity, image) only.
"""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .. import rng

SEVERITIES = (1, 2, 3, 4, 5)
LARGEST_SMALL = 64  # pixels of the longer side: images up to this size get CIFAR-10-C's numbers
CIFAR = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg": (80, 65, 58, 50, 40),
}
IMAGENET = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "gaussian_blur": (1, 2, 3, 4, 6),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg": (25, 18, 15, 10, 7),
}


def scale_of(size: tuple[int, int]) -> tuple[str, dict[str, tuple[Any, ...]]]:
    """(h, w) of an image in pixels -> the published set with numbers for this size, and its numbers."""
    return ("CIFAR-10-C", CIFAR) if max(size) <= LARGEST_SMALL else ("ImageNet-C", IMAGENET)


def corrupt(image: Tensor, name: str, severity: int, key: Tensor) -> Tensor:
    """[C, H, W] uint8 or float in [0, 255] -> uint8. key: of the image."""
    c = scale_of((image.shape[-2], image.shape[-1]))[1][name][severity - 1]
    generator = torch.Generator().manual_seed(int(rng.fold_in(key, "corruption", name, severity)) & (2**63 - 1))
    x = CORRUPTIONS[name](image.float() / 255, c, generator)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def gaussian_noise(x: Tensor, c: float, generator: torch.Generator) -> Tensor:
    return x + c * torch.randn(x.shape, generator=generator)


def shot_noise(x: Tensor, c: float, generator: torch.Generator) -> Tensor:
    return torch.poisson(x * c, generator=generator) / c


def impulse_noise(x: Tensor, c: float, generator: torch.Generator) -> Tensor:
    hit, salt = torch.rand((2, *x.shape), generator=generator)
    return torch.where(hit < c, (salt < 0.5).float(), x)


def gaussian_blur(x: Tensor, c: float, generator: torch.Generator) -> Tensor:
    return _gaussian(x, c, radius=math.ceil(4 * c))


def _gaussian(x: Tensor, sigma: float, radius: int) -> Tensor:
    """[..., h, w] -> the same, convolved with a Gaussian that is cut off at `radius` pixels. Edges are mirrored."""
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    for axis in (-2, -1):
        n = x.shape[axis]
        at = torch.arange(-radius, n + radius)
        mirrored = torch.where(at < 0, -1 - at, torch.where(at >= n, 2 * n - 1 - at, at)).clamp(0, n - 1)
        x = x.index_select(axis, mirrored).unfold(axis, len(taps), 1) @ (taps / taps.sum())
    return x


def defocus_blur(x: Tensor, c: tuple[float, float], generator: torch.Generator) -> Tensor:
    radius, sigma = c
    reach = max(8, math.ceil(radius))
    offset = torch.arange(-reach, reach + 1)
    disk = (offset.square() + offset.unsqueeze(1).square() <= radius**2).float()
    # The released code smooths the disk in a window of 3 pixels, or 5 for a radius above 8.
    kernel = _gaussian(disk / disk.sum(), sigma, radius=1 if radius <= 8 else 2)[None, None]
    padded = F.pad(x.unsqueeze(1), (reach,) * 4, mode="reflect" if min(x.shape[-2:]) > reach else "replicate")
    return F.conv2d(padded, kernel).squeeze(1)


def brightness(x: Tensor, c: float, generator: torch.Generator) -> Tensor:
    if len(x) != 3:  # no colours: each channel is its own V
        return x + c
    value = x.max(dim=0, keepdim=True).values
    brighter = (value + c).clamp(max=1)
    return torch.where(value > 0, x * brighter / value.clamp(min=1e-12), brighter)


def contrast(x: Tensor, c: float, generator: torch.Generator) -> Tensor:
    mean = x.mean(dim=(-2, -1), keepdim=True)
    return mean + c * (x - mean)


def pixelate(x: Tensor, c: float, generator: torch.Generator) -> Tensor:
    """By PIL, one channel at a time: so any number of channels works."""
    h, w = x.shape[-2:]
    small = (max(1, int(w * c)), max(1, int(h * c)))
    box = Image.Resampling.BOX
    channels = [Image.fromarray(channel).resize(small, box).resize((w, h), box) for channel in _bytes(x)]
    return torch.from_numpy(np.stack([np.array(channel) for channel in channels])).float() / 255


def jpeg(x: Tensor, c: int, generator: torch.Generator) -> Tensor:
    """By PIL: three channels as colours, any other number one by one as gray."""
    pixels = _bytes(x)
    pictures = [pixels.transpose(1, 2, 0)] if len(x) == 3 else list(pixels)
    out = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(picture)).save(file, "JPEG", quality=c)
        with Image.open(file) as image:
            out.append(np.array(image))
    stacked = out[0].transpose(2, 0, 1) if len(x) == 3 else np.stack(out)
    return torch.from_numpy(np.ascontiguousarray(stacked)).float() / 255


def _bytes(x: Tensor) -> np.ndarray:
    return (x * 255).round().to(torch.uint8).numpy()


CORRUPTIONS: dict[str, Callable[[Tensor, Any, torch.Generator], Tensor]] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "gaussian_blur": gaussian_blur,
    "defocus_blur": defocus_blur,
    "brightness": brightness,
    "contrast": contrast,
    "pixelate": pixelate,
    "jpeg": jpeg,
}
