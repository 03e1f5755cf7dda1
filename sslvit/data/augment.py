"""Augmentation of whole batches on the training device: flips, turns, and photometric augmentation (jitter,
grayscale, blur, solarise), then normalisation.

Each operation follows torchvision's or PIL's formula on images in [0, 1], without the rounding to 8 bits that PIL does
after every operation. Parameters are drawn on the CPU from the keys of the crops. So the CPU knows which images of the
batch an operation concerns, and never waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from .. import rng
from .crops import Crop, Views, crop_key

GRAY = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
SOLARIZE_THRESHOLD = 128 / 255
NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # brightness, contrast, saturation and hue that change nothing


@dataclass(frozen=True)
class Normalize:
    """(x - mean) / std for images in [0, 1], one number a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return (x - per_channel(self.mean, x.device)) / per_channel(self.std, x.device)

    def undo(self, x: Tensor) -> Tensor:
        return x * per_channel(self.std, x.device) + per_channel(self.mean, x.device)


@lru_cache(maxsize=64)
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[C, 1, 1] on the device. Kept there: a copy from the CPU would wait until the device has finished its work."""
    with torch.inference_mode(False):  # the tensor is kept, and others may take gradients through it
        return torch.tensor(values, device=device).view(-1, 1, 1)


@dataclass(frozen=True)
class Parameters:
    """What happens to R crops. All tensors lie on the CPU."""

    flip: Tensor  # [R] bool
    jitter: Tensor  # [R] bool
    order: Tensor  # [R, 4] int64: order[r, i] is the jitter operation that comes i-th, 0 .. 3 as in `factors`
    factors: Tensor  # [R, 4] float32: brightness, contrast, saturation factors and hue shift (in turns)
    gray: Tensor  # [R] bool
    blur: Tensor  # [R] bool
    sigma: Tensor  # [R] float32, pixels
    solarize: Tensor  # [R] bool
    upside_down: Tensor  # [R] bool
    turns: Tensor  # [R] int64, 0 .. 3: quarter turns, counter-clockwise
    channels: Tensor  # [R, 2, C] float32: brightness and contrast factors of each channel by itself


def draw(crop: Crop, key: Tensor, channels: int = 3) -> Parameters:
    """[R] keys of crops of one kind -> their parameters."""
    u = rng.uniform(rng.fold_in(key, "colour"), 17)  # one number for each use below; append, and old draws stay
    strength = torch.tensor(crop.jitter)
    low = torch.cat([(1 - strength[:3]).clamp(min=0), -strength[3:]])
    high = torch.cat([1 + strength[:3], strength[3:]])
    each = _channel_factors(crop, key, channels) if any(crop.channel_jitter) else torch.ones(len(key), 2, channels)
    return Parameters(
        flip=u[:, 0] < crop.flip_prob,
        jitter=u[:, 1] < crop.jitter_prob,
        order=u[:, 2:6].argsort(dim=1),
        factors=low + (high - low) * u[:, 6:10],
        gray=u[:, 10] < crop.gray_prob,
        blur=u[:, 11] < crop.blur_prob,
        sigma=crop.blur_sigma[0] + (crop.blur_sigma[1] - crop.blur_sigma[0]) * u[:, 12],
        solarize=u[:, 13] < crop.solarize_prob,
        upside_down=u[:, 14] < crop.vertical_flip_prob,
        turns=torch.where(u[:, 15] < crop.rotate_prob, 1 + (3 * u[:, 16]).long(), 0),
        channels=each,
    )


def _channel_factors(crop: Crop, key: Tensor, channels: int) -> Tensor:
    """[R] keys -> [R, 2, C]: brightness and contrast factors of each channel by itself."""
    strength = torch.tensor(crop.channel_jitter).view(2, 1)
    least = (1 - strength).clamp(min=0)
    share = rng.uniform(rng.fold_in(key, "channels"), 2 * channels).view(-1, 2, channels)
    return least + (1 + strength - least) * share


@torch.no_grad()
def augment(batch: dict[str, Tensor], views: Views, normalize: Normalize, device: torch.device) -> dict[str, Tensor]:
    """{"key": [B], name: [V, B, C, h, w] uint8 or float in [0, 255]} -> the same, float32 and normalised, on the
    device."""
    key = batch["key"]
    out = {"key": key.to(device, non_blocking=True)}
    for name, crops in views.items():
        x = batch[name].to(device, non_blocking=True)
        drawn = [draw(crop, crop_key(key, name, v), x.shape[2]) for v, crop in enumerate(crops)]
        parameters = Parameters(
            *(torch.cat([getattr(p, field) for p in drawn]) for field in Parameters.__annotations__)
        )
        pixels = x.flatten(0, 1).to(torch.float32, memory_format=torch.contiguous_format)  # workers give channels last
        out[name] = normalize(apply(pixels / 255, parameters)).view(x.shape)
    return out


def apply(x: Tensor, p: Parameters) -> Tensor:
    """[R, C, h, w] float32 in [0, 1] -> the same, in DINO's order (section 3.2 and BYOL, appendix B)."""

    def on_rows(chosen: Tensor, operation: Callable[..., Tensor], *values: Tensor) -> None:
        """values: [R], or [R, C] for numbers of each channel."""
        rows = chosen.nonzero().squeeze(1)
        if len(rows):
            factors = [value[rows].view(len(rows), -1, 1, 1).to(x.device, non_blocking=True) for value in values]
            rows = rows.to(x.device, non_blocking=True)
            x.index_copy_(0, rows, operation(x.index_select(0, rows), *factors))

    colour = x.shape[1] == 3
    on_rows(p.flip, lambda y: y.flip(-1))
    on_rows(p.upside_down, lambda y: y.flip(-2))
    for turns in range(1, 4):
        on_rows(p.turns == turns, partial(torch.rot90, k=turns, dims=(-2, -1)))
    for turn in range(4):
        for number, operation in enumerate((brightness, contrast, saturation, hue)):
            if colour or number < 2:
                chosen = p.jitter & (p.order[:, turn] == number) & (p.factors[:, number] != NEUTRAL[number])
                on_rows(chosen, operation, p.factors[:, number])
    jittered = p.jitter & (p.channels != 1).flatten(1).any(dim=1)
    on_rows(jittered, brightness, p.channels[:, 0])
    on_rows(jittered, channel_contrast, p.channels[:, 1])
    if colour:
        on_rows(p.gray, lambda y: gray(y).expand_as(y))
    on_rows(p.blur, blur, p.sigma)
    on_rows(p.solarize, solarize)
    return x


def gray(x: Tensor) -> Tensor:
    """[R, C, h, w] -> [R, 1, h, w]: the luminance of 3 channels, the mean of any other number."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    return GRAY[0] * x[:, :1] + GRAY[1] * x[:, 1:2] + GRAY[2] * x[:, 2:]


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = gray(x).mean(dim=(-2, -1), keepdim=True)
    return (x * factor + mean * (1 - factor)).clamp_(0, 1)


def channel_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """The contrast of each channel about its own mean. factor: [R, C, 1, 1]."""
    return (x * factor + x.mean(dim=(-2, -1), keepdim=True) * (1 - factor)).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor + gray(x) * (1 - factor)).clamp_(0, 1)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by `shift` turns, as torchvision's adjust_hue."""
    value, _ = x.max(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    safe = torch.where(chroma == 0, 1.0, chroma)
    angle = torch.where(
        value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )  # in sixths of a turn
    angle = angle + 6 * shift
    # A channel is value - chroma * (how far the angle is from the sector in which the channel is at its maximum).
    channel = per_channel((5.0, 3.0, 1.0), x.device)
    distance = (channel + angle) % 6
    return value - chroma * torch.minimum(distance, 4 - distance).clamp_(0, 1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """PIL's GaussianBlur with a sigma of its own for each image, by two matrix products.

    sigma: [R, 1, 1, 1] pixels. The published code calls PIL, which approximates the Gaussian by three box filters. At
    small sigma they blur more: at 0.3, stripes of one pixel keep 0.83 of their contrast; with a sampled Gaussian 0.98.
    """
    radius = _box_radius(sigma.view(-1, 1, 1))
    rows, columns = (torch.linalg.matrix_power(_box_filter(n, radius), 3).unsqueeze(1) for n in x.shape[-2:])
    return rows @ x @ columns.transpose(-2, -1)


def _box_radius(sigma: Tensor) -> Tensor:
    """Radius, with a fraction, of the box filter that gives a Gaussian of this sigma when it is applied three times.

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering" (SSVM 2011), as in PIL.
    """
    variance = sigma.square() / 3
    whole = ((12 * variance + 1).sqrt() / 2 - 0.5).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1).square()))
    return whole + part


def _box_filter(n: int, radius: Tensor) -> Tensor:
    """[R, 1, 1] -> [R, n, n]: row i holds the weights with which the pixels of a line make its pixel i.

    The pixel at the edge is repeated.
    """
    place = torch.arange(n, device=radius.device)
    box = (radius + 1 - (place - place.unsqueeze(1)).abs()).clamp_(0, 1)
    box[:, :, 0] += (radius[:, 0] - place).clamp_(min=0)  # what would lie before the first pixel
    box[:, :, -1] += (radius[:, 0] - place.flip(0)).clamp_(min=0)
    return box / (2 * radius + 1)


def solarize(x: Tensor) -> Tensor:
    return torch.where(x >= SOLARIZE_THRESHOLD, 1 - x, x)
