"""The strong augmentation of published fine-tuning: RandAugment, random erasing, mixup, CutMix, label smoothing.

RandAugment is timm's. It draws from global generators, which are set to the image's own place before it and put back
after it. Erasing and mixing are written here instead of calling timm's, because theirs draw once for the images that
happen to lie on one device: here a pair is two neighbours in the global order of the epoch, whose parameters are
functions of their key, so that neither processes nor micro-batches change what is learned.
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from ... import rng
from ...data.crops import Crop, draw_boxes
from ...errors import UserError

ERASED = {"scale": (0.02, 1 / 3), "ratio": (0.3, 1 / 0.3)}  # Zhong et al., 2020, as timm's defaults
SWITCH = 0.5  # share of pairs that get CutMix where both are wanted


class RandAugment:
    """timm's RandAugment for the crops of a micro-batch, by the workers; each image draws from its own key."""

    def __init__(self, words: str, mean: tuple[float, ...]) -> None:
        """words: as timm's `rand-m9-mstd0.5-inc1`. mean: of each channel, which fills what a rotation leaves empty."""
        if len(mean) not in (1, 3):
            raise UserError(
                f"randaugment={words} is for images of 1 or 3 channels, and these have {len(mean)}: use "
                "randaugment=none."
            )
        fill = tuple(min(255, round(255 * value)) for value in mean)
        options = {"interpolation": Image.Resampling.BICUBIC, "img_mean": fill if len(fill) == 3 else fill[0]}
        try:
            self.transform = rand_augment_transform(words, options)
        except (AssertionError, ValueError, KeyError, NotImplementedError) as error:
            raise UserError(
                f"randaugment={words} is not of timm's form, such as rand-m9-mstd0.5-inc1, or none."
            ) from error
        for op in self.transform.ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = posterize

    def __call__(self, batch: dict) -> dict:
        images = batch["image"][0]
        for b, key in enumerate(rng.fold_in(batch["key"], "randaugment").tolist()):
            with seeded(key):
                images[b] = self.one(images[b])
        return batch

    def one(self, image: Tensor) -> Tensor:
        """[1 or 3, H, W] uint8 -> the same."""
        pixels = image.permute(1, 2, 0).numpy()
        changed = np.asarray(self.transform(Image.fromarray(pixels if len(image) == 3 else pixels[:, :, 0])))
        return torch.from_numpy(changed.copy()).view(*image.shape[1:], len(image)).permute(2, 0, 1)


def posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, which asks Pillow for 0 bits at the greatest magnitude: black, where newer Pillow refuses."""
    return timm_posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Python's and NumPy's global generators at a place of their own; afterwards they are as before."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 -- what timm draws from
    random.seed(key)
    np.random.seed(key % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def erase(x: Tensor, key: Tensor, probability: float) -> Tensor:
    """[B, C, H, W] normalised, [B] keys on the CPU -> the same with normal noise in a box of some images, in place."""
    if not probability:
        return x
    key = rng.fold_in(key, "erase")
    h, w = x.shape[-2:]
    rows = (rng.uniform(rng.fold_in(key, "whether"), 1)[:, 0] < probability).nonzero()[:, 0]
    if not len(rows):
        return x
    side = torch.ones(len(rows), dtype=torch.long)
    boxes = draw_boxes(Crop((h, w), **ERASED), key[rows], h * side, w * side)
    noise = normal(rng.fold_in(key[rows], "noise").to(x.device), x[0].numel()).view(len(rows), *x.shape[1:])
    rows = rows.to(x.device)
    x[rows] = torch.where(inside(boxes, h, w).unsqueeze(1).to(x.device), noise.to(x.dtype), x[rows])
    return x


def normal(key: Tensor, n: int) -> Tensor:
    """[R] keys -> [R, n] float32 of the normal distribution (Box and Muller, 1958)."""
    u = rng.uniform(key, 2 * n)
    return (-2 * (1 - u[:, :n]).log()).sqrt() * (2 * math.pi * u[:, n:]).cos()


def inside(boxes: Tensor, h: int, w: int) -> Tensor:
    """[R, 4] top, left, height, width -> [R, h, w] bool."""
    top, left, height, width = boxes.view(-1, 4, 1).unbind(dim=1)
    row, column = torch.arange(h), torch.arange(w)
    rows = (row >= top) & (row < top + height)
    columns = (column >= left) & (column < left + width)
    return rows.unsqueeze(2) & columns.unsqueeze(1)


def draw_pairs(key: Tensor, size: tuple[int, int], mixup: float, cutmix: float) -> tuple[Tensor, Tensor, Tensor]:
    """[P] keys of pairs -> ([P] bool: pasted instead of blended, [P] share that an image keeps, [P, 4] boxes).

    mixup, cutmix: the parameter of the symmetric beta distribution, 0 for none (Zhang et al., 2018; Yun et al., 2019).
    The box is centred anywhere and cut at the image's edge, and what is kept is counted in pixels, as in timm.
    """
    key = rng.fold_in(key, "mix")
    u = rng.uniform(key, 3)
    pasted = u[:, 0] < (SWITCH if mixup and cutmix else float(bool(cutmix)))
    alphas = [cutmix if paste else mixup for paste in pasted.tolist()]
    seeds = rng.fold_in(key, "beta").tolist()
    draws = [np.random.default_rng(s % 2**64).beta(a, a) for s, a in zip(seeds, alphas, strict=True)]
    kept = torch.tensor(draws, dtype=torch.float64)
    sides, bounds = torch.tensor(size), []
    for i in (0, 1):
        half = (sides[i] * (1 - kept).sqrt()).long() // 2
        middle = (u[:, 1 + i].double() * sides[i]).long()
        bounds.append(((middle - half).clamp(min=0), (middle + half).clamp(max=size[i])))
    (top, bottom), (left, right) = bounds
    boxes = torch.stack([top, left, bottom - top, right - left], dim=1)
    area = (boxes[:, 2] * boxes[:, 3]).double() / (size[0] * size[1])
    return pasted, torch.where(pasted, 1 - area, kept).float(), boxes


def mix(x: Tensor, targets: Tensor, key: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """[B, C, H, W], [B, K] float targets, [B] keys on the CPU -> both mixed, images 2i and 2i + 1 with one another."""
    if not (mixup or cutmix):
        return x, targets
    pasted, kept, boxes = draw_pairs(key[::2], tuple(x.shape[-2:]), mixup, cutmix)
    mask = inside(boxes, *x.shape[-2:])[:, None, None].to(x.device)
    pasted, kept = pasted.to(x.device), kept.to(x.device)
    pairs, labels = x.unflatten(0, (-1, 2)), targets.unflatten(0, (-1, 2))
    share = kept.view(-1, 1, 1, 1, 1)
    blended = share * pairs + (1 - share) * pairs.flip(1)
    x = torch.where(pasted.view(-1, 1, 1, 1, 1), torch.where(mask, pairs.flip(1), pairs), blended)
    share = kept.view(-1, 1, 1)
    return x.flatten(0, 1), (share * labels + (1 - share) * labels.flip(1)).flatten(0, 1)


def smooth_labels(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """[B] int64 -> [B, num_classes]: 1 - smoothing on the label and the rest spread over all classes."""
    return (1 - smoothing) * F.one_hot(labels, num_classes).float() + smoothing / num_classes
