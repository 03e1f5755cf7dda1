"""The crops of an image: how they are drawn, and how they are cut as uint8 from a single decode.

A crop's box is a function of the image's key and of the crop's name and number. So are its photometric parameters,
which `augment` draws when it applies them to a whole batch. Loader processes therefore send pixels and keys only.
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
    """One random crop and its augmentation. By default it is flipped, and its colours stay as they are."""

    size: tuple[int, int]  # (h, w) in pixels of the result
    scale: tuple[float, float]  # share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the box
    flip_prob: float = 0.5  # left-right
    vertical_flip_prob: float = 0.0  # upside down
    rotate_prob: float = 0.0  # by 90, 180 or 270 degrees; with 0.75 all four directions are equally likely
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    channel_jitter: tuple[float, float] = (0.0, 0.0)  # brightness, contrast of each channel by itself
    jitter_prob: float = 0.0  # of both kinds of jitter
    gray_prob: float = 0.0
    blur_prob: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize_prob: float = 0.0
    tries: int = TRIES  # boxes drawn until one fits; if none does, the largest centred one. With 1: the box is clipped
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
    boxes, found = torch.stack([top, left, h, w], dim=1), fits.any(dim=1, keepdim=True)
    return boxes if found.all() else torch.where(found, boxes, _centre_boxes(crop, height, width))


def _centre_boxes(crop: Crop, height: Tensor, width: Tensor) -> Tensor:
    """The largest centred box of an allowed aspect ratio, as torchvision takes it when no drawn box fits."""
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
    if image.is_floating_point():  # bicubic weights overshoot; for uint8, torch clamps
        resized.clamp_(0, 255)
    return resized if image.ndim == 4 else resized.squeeze(0)


def cut(
    images: Sequence[Tensor], key: Tensor, views: Views, sizes: Sequence[tuple[int, int]] | None = None
) -> dict[str, Tensor]:
    """B images [C, H, W] of any sizes, uint8 or float in [0, 255] -> {name: [V, B, C, h, w]}, view after view.

    The crops of images that are channels last in memory are so too. Decoders give images so, and torch resamples
    colours so.

    sizes: (height, width) of the whole images, if some were read at a smaller scale. The crops are then those of the
    whole image, to half a pixel of the smaller one.
    """
    sizes = sizes or [(image.shape[-2], image.shape[-1]) for image in images]
    height, width = (torch.tensor(lengths) for lengths in zip(*sizes, strict=True))
    deep = any(image.is_floating_point() for image in images)
    # [1, C, H, W] with strides that torch recognises as channels last.
    pixels = [image.permute(1, 2, 0).unsqueeze(0).permute(0, 3, 1, 2) for image in images]
    batch = {}
    for name, crops in views.items():
        boxes = _boxes_of(crops, key, name, height, width)
        cuts = [torch.empty(0)] * (len(crops) * len(images))
        for b, image in enumerate(pixels):  # one image after another, so that it stays in the processor's cache
            for v, crop in enumerate(crops):
                top, left, h, w = boxes[v][b]
                if image.shape[-2:] != sizes[b]:
                    top, left, h, w = _at_scale(boxes[v][b], sizes[b], image.shape[-2:])
                cuts[v * len(images) + b] = resize(
                    image[:, :, top : top + h, left : left + w], crop.size, crop.interpolation
                )
        batch[name] = torch.cat([cut.float() for cut in cuts] if deep else cuts).unflatten(0, (len(crops), -1))
    return batch


def cut_at_once(pixels: Tensor, key: Tensor, views: Views) -> dict[str, Tensor]:
    """As `cut`, for images of one size on one device, by a few matrix products there.

    pixels: [B, C, H, W] uint8 on any device; key: [B] on the CPU. The result is on the device. It differs from that of
    `cut` by rounding: two levels of 255 at most, for few pixels.
    """
    height, width = (torch.full((len(key),), length) for length in pixels.shape[-2:])
    batch = {}
    for name, crops in views.items():
        boxes = _boxes_of(crops, key, name, height, width)
        cuts = [resample(pixels, torch.tensor(boxes[v]), crop.size, crop.interpolation) for v, crop in enumerate(crops)]
        batch[name] = torch.stack(cuts)
    return batch


def reduction(views: Views, key: Tensor, height: int, width: int) -> int:
    """How many times smaller an image may be read: 1, 2, 4 or 8.

    Along each side, every box must still have REDUCING_GAP times the pixels of its crop.
    key: [1], the image's; height, width: of the whole image, in pixels.
    """
    sizes = [crop.size for crops in views.values() for crop in crops]
    if min(min(height / h, width / w) for h, w in sizes) < 2 * REDUCING_GAP:
        return 1  # for most images, without drawing their boxes
    least = math.inf
    for name, crops in views.items():
        boxes = _boxes_of(crops, key, name, torch.tensor([height]), torch.tensor([width]))
        for crop, ((_, _, h, w),) in zip(crops, boxes, strict=True):
            least = min(least, h / crop.size[0], w / crop.size[1])
    return next((scale for scale in (8, 4, 2) if least >= scale * REDUCING_GAP), 1)


def _at_scale(box: list[int], whole: tuple[int, int], shape: Sequence[int]) -> list[int]:
    """A box of the whole image -> the same box, never empty, of the smaller image of that shape."""
    start, length = [], []
    for at, extent, full, size in zip(box[:2], box[2:], whole, shape, strict=True):
        first = min(round(at * size / full), size - 1)
        start.append(first)
        length.append(max(1, min(round((at + extent) * size / full), size) - first))
    return start + length


def _boxes_of(crops: list[Crop], key: Tensor, name: str, height: Tensor, width: Tensor) -> list[list[list[int]]]:
    """The box of each crop of each image, [V][B][4]. Crops with the same kind of boxes are drawn together: one call
    takes less time than several."""
    keys = [crop_key(key, name, v) for v in range(len(crops))]
    if len({(crop.scale, crop.ratio, crop.tries) for crop in crops}) > 1:
        return [draw_boxes(crop, k, height, width).tolist() for crop, k in zip(crops, keys, strict=True)]
    together = draw_boxes(crops[0], torch.cat(keys), height.repeat(len(crops)), width.repeat(len(crops)))
    return together.view(len(crops), -1, 4).tolist()


def random_batch(views: Views, batch_size: int, in_chans: int, device: torch.device) -> dict[str, Tensor]:
    """Noise with the shapes of an augmented batch: {"key": [B], name: [V, B, C, h, w] float32}."""
    batch = {"key": torch.arange(batch_size, device=device)}
    for name, crops in views.items():
        batch[name] = torch.randn(len(crops), batch_size, in_chans, *crops[0].size, device=device)
    return batch


def num_pixels(views: Views) -> int:
    """Of all crops of an image, channels apart."""
    return sum(math.prod(crop.size) for crops in views.values() for crop in crops)


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
