"""What one image becomes: crops, cut on the CPU as uint8 from a single decode, and what is later done to their colours.

A crop's box is a function of the image's key and the crop's place, and so are its colour parameters, which `augment`
draws when it applies them to a whole batch on the training device. Workers therefore send nothing but pixels and keys.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rng
from ..errors import UserError
from .resample import resample

REDUCING_GAP = 2.0  # PIL's name for it (Image.thumbnail), and its default
TRIES = 10  # torchvision's RandomResizedCrop draws up to ten boxes and then takes the centre


@dataclass(frozen=True)
class Crop:
    """One random crop and its colours. The defaults do nothing to the colours."""

    size: tuple[int, int]  # (h, w) in pixels of the result
    scale: tuple[float, float]  # share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the box
    flip_prob: float = 0.5  # left-right
    vertical_flip_prob: float = 0.0  # upside down
    rotate_prob: float = 0.0  # by a quarter, a half or three quarters of a turn; 0.75 makes all four ways up alike
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    channel_jitter: tuple[float, float] = (0.0, 0.0)  # brightness, contrast of each channel by itself
    jitter_prob: float = 0.0  # of both kinds of jitter
    gray_prob: float = 0.0
    blur_prob: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize_prob: float = 0.0
    tries: int = TRIES  # boxes drawn until one fits; then the largest centred one, or with 1 the drawn one, clamped
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def __post_init__(self) -> None:
        if self.rotate_prob and self.size[0] != self.size[1]:
            raise UserError(
                f"rotate_prob={self.rotate_prob} turns crops by 90 degrees, and those of {self.size[0]}x{self.size[1]} "
                "pixels are not square: set rotate_prob=0 (vertical_flip_prob does for any shape)."
            )


Views = dict[str, list[Crop]]  # crops of one name have one size and travel as one tensor


def draw_boxes(crop: Crop, key: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Boxes of torchvision's RandomResizedCrop, for many images at once.

    key, height, width: [B] int64 -> [B, 4] int64: top, left, height, width in pixels.
    """
    tries = crop.tries
    u = rng.uniform(rng.fold_in(key, "box"), 2 * tries + 2).double()
    area = (height * width).double().unsqueeze(1) * (crop.scale[0] + (crop.scale[1] - crop.scale[0]) * u[:, :tries])
    log_lo, log_hi = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    ratio = torch.exp(log_lo + (log_hi - log_lo) * u[:, tries : 2 * tries])
    w = (area * ratio).sqrt().round().long()
    h = (area / ratio).sqrt().round().long()
    if tries == 1:
        h, w = h.clamp(min=1).minimum(height.unsqueeze(1)), w.clamp(min=1).minimum(width.unsqueeze(1))
    fits = (w > 0) & (h > 0) & (w <= width.unsqueeze(1)) & (h <= height.unsqueeze(1))
    first = fits.int().argmax(dim=1, keepdim=True)  # argmax gives the first of equal values
    h, w = h.gather(1, first).squeeze(1), w.gather(1, first).squeeze(1)
    top = (u[:, -2] * (height - h + 1)).long()
    left = (u[:, -1] * (width - w + 1)).long()
    boxes = torch.stack([top, left, h, w], dim=1)
    return torch.where(fits.any(dim=1, keepdim=True), boxes, _centre_boxes(crop, height, width))


def _centre_boxes(crop: Crop, height: Tensor, width: Tensor) -> Tensor:
    """What torchvision falls back to: the largest centred box whose aspect ratio is allowed."""
    image_ratio = width / height
    h = torch.where(image_ratio < crop.ratio[0], (width / crop.ratio[0]).round().long(), height)
    w = torch.where(image_ratio > crop.ratio[1], (height * crop.ratio[1]).round().long(), width)
    h, w = torch.minimum(h.clamp(min=1), height), torch.minimum(w.clamp(min=1), width)
    return torch.stack([(height - h) // 2, (width - w) // 2, h, w], dim=1)


def resize(image: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """[C, H, W] or [B, C, H, W], uint8 or float -> the same of (h, w) pixels: antialiased, as PIL's."""
    if tuple(image.shape[-2:]) == size:
        return image
    batch = image if image.ndim == 4 else image.unsqueeze(0)
    resized = F.interpolate(batch, size, mode=interpolation, antialias=True, align_corners=False)
    if image.is_floating_point():  # of bytes torch itself takes care
        resized.clamp_(0, 255)
    return resized if image.ndim == 4 else resized.squeeze(0)


def cut(
    images: Sequence[Tensor], key: Tensor, views: Views, sizes: Sequence[tuple[int, int]] | None = None
) -> dict[str, Tensor]:
    """B images [C, H, W] of any sizes, uint8 or float in [0, 255] -> {name: [V, B, C, h, w]}, view after view.

    Crops of images that lie pixel by pixel in memory (channels last, as decoders give them and as torch resamples
    colours) do so too: nothing is put into another order here.

    sizes: (height, width) of each image as its file has it, for images that were read at a smaller scale; the crops
    are those of the whole image, to half a pixel of the smaller one.
    """
    sizes = sizes or [(image.shape[-2], image.shape[-1]) for image in images]
    height, width = (torch.tensor(lengths) for lengths in zip(*sizes, strict=True))
    deep = any(image.is_floating_point() for image in images)
    pixels = [image.permute(1, 2, 0).unsqueeze(0).permute(0, 3, 1, 2) for image in images]  # or torch overlooks it
    batch = {}
    for name, crops in views.items():
        boxes = _boxes_of(crops, key, name, height, width)
        cuts = [torch.empty(0)] * (len(crops) * len(images))
        for b, image in enumerate(pixels):  # image after image: it stays in the cache of the processor
            for v, crop in enumerate(crops):
                top, left, h, w = _at_scale(boxes[v][b], sizes[b], image.shape[-2:])
                cuts[v * len(images) + b] = resize(
                    image[:, :, top : top + h, left : left + w], crop.size, crop.interpolation
                )
        batch[name] = torch.cat([cut.float() for cut in cuts] if deep else cuts).unflatten(0, (len(crops), -1))
    return batch


def cut_at_once(pixels: Tensor, key: Tensor, views: Views) -> dict[str, Tensor]:
    """`cut` of images of one size that lie on one device, all crops of a name by a few matrix products there.

    pixels: [B, C, H, W] uint8 on any device; key: [B] on the CPU. The result is on the device, and equals `cut` but for
    rounding: a level of 255 here and there, two at most.
    """
    height, width = (torch.full((len(key),), length) for length in pixels.shape[-2:])
    batch = {}
    for name, crops in views.items():
        boxes = _boxes_of(crops, key, name, height, width)
        cuts = [resample(pixels, torch.tensor(boxes[v]), crop.size, crop.interpolation) for v, crop in enumerate(crops)]
        batch[name] = torch.stack(cuts)
    return batch


def reduction(views: Views, key: Tensor, height: int, width: int) -> int:
    """How many times smaller (1, 2, 4 or 8) an image may be read for all its crops to be cut from at least REDUCING_GAP
    times the pixels, along each side, that they become.

    key: [1], the image's; height, width: of the whole image, in pixels.
    """
    sizes = [crop.size for crops in views.values() for crop in crops]
    if min(min(height / h, width / w) for h, w in sizes) < 2 * REDUCING_GAP:
        return 1  # as most images: nothing is drawn for them
    least = math.inf
    for name, crops in views.items():
        boxes = _boxes_of(crops, key, name, torch.tensor([height]), torch.tensor([width]))
        for crop, ((_, _, h, w),) in zip(crops, boxes, strict=True):
            least = min(least, h / crop.size[0], w / crop.size[1])
    return next((scale for scale in (8, 4, 2) if least >= scale * REDUCING_GAP), 1)


def _at_scale(box: list[int], whole: tuple[int, int], shape: Sequence[int]) -> list[int]:
    """A box of the whole image -> of the smaller one of that shape; never empty."""
    if tuple(shape) == tuple(whole):
        return box
    start, length = [], []
    for at, extent, full, size in zip(box[:2], box[2:], whole, shape, strict=True):
        first = min(round(at * size / full), size - 1)
        start.append(first)
        length.append(max(1, min(round((at + extent) * size / full), size) - first))
    return start + length


def _boxes_of(crops: list[Crop], key: Tensor, name: str, height: Tensor, width: Tensor) -> list[list[list[int]]]:
    """Box of each crop of each image, [V][B][4]. Crops that differ in colours only are drawn together, because a call
    costs more than what it computes."""
    keys = [crop_key(key, name, v) for v in range(len(crops))]
    if len({(crop.scale, crop.ratio, crop.tries) for crop in crops}) > 1:
        return [draw_boxes(crop, k, height, width).tolist() for crop, k in zip(crops, keys, strict=True)]
    together = draw_boxes(crops[0], torch.cat(keys), height.repeat(len(crops)), width.repeat(len(crops)))
    return together.view(len(crops), -1, 4).tolist()


def random_batch(views: Views, batch_size: int, in_chans: int, device: torch.device) -> dict[str, Tensor]:
    """Noise in the shape of an augmented batch: {"key": [B], name: [V, B, C, h, w] float32}."""
    batch = {"key": torch.arange(batch_size, device=device)}
    for name, crops in views.items():
        batch[name] = torch.randn(len(crops), batch_size, in_chans, *crops[0].size, device=device)
    return batch


def crop_key(key: Tensor, name: str, view: int) -> Tensor:
    """[B] keys of images -> [B] keys of their crop number `view` of the given name."""
    return rng.fold_in(key, name, view)


def centre(image: Tensor, size: tuple[int, int], resize_ratio: float = 1.0) -> Tensor:
    """[C, H, W] -> [C, h, w]: the image scaled until it covers `size / resize_ratio`, then its centre (for evaluation).

    resize_ratio 224 / 256 is the published evaluation at 224 pixels. Lengths are truncated to whole pixels and margins
    rounded, as torchvision's Resize and CenterCrop do.
    """
    height, width = image.shape[-2:]
    h, w = int(size[0] / resize_ratio), int(size[1] / resize_ratio)
    if h * width > w * height:
        w = int(h * width / height)
    else:
        h = int(w * height / width)
    image = resize(image, (h, w))
    top, left = round((h - size[0]) / 2), round((w - size[1]) / 2)
    return image[:, top : top + size[0], left : left + size[1]]
