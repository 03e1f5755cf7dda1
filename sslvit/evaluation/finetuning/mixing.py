"""The strong augmentation of published fine-tuning: RandAugment, random erasing, mixup, CutMix, label smoothing.

RandAugment is timm's. It draws from global generators: they are seeded by the image's key before, and restored after.
Erasing, mixup and CutMix are not timm's. timm draws them once for each batch on a device, so the result would depend on
the number of processes and micro-batches and on a stop in between. Here two neighbours in the global order of the epoch
are a pair, and their random numbers are a function of their keys.
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

ERASED_SCALE, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's defaults (Zhong et al., 2020)
CUTMIX_PROB = 0.5  # of a pair, if both mixup and CutMix are on; else the pair has mixup


class RandAugment:
    """timm's RandAugment for the crops of a micro-batch, in the workers; each image draws from its own key."""

    def __init__(self, spec: str, mean: tuple[float, ...]) -> None:
        """spec: in timm's notation, `rand-m9-mstd0.5-inc1`. mean: of each channel; fills what a rotation leaves empty.
        Raises UserError."""
        if len(mean) not in (1, 3):
            raise UserError(
                f"randaugment={spec} is for images of 1 or 3 channels, and these have {len(mean)}: use "
                "randaugment=none."
            )
        fill = tuple(min(255, round(255 * value)) for value in mean)
        options = {"interpolation": Image.Resampling.BICUBIC, "img_mean": fill if len(fill) == 3 else fill[0]}
        try:
            self.transform = rand_augment_transform(spec, options)
        except (AssertionError, ValueError, KeyError, NotImplementedError) as error:
            raise UserError(
                f"randaugment={spec} is not of timm's form, such as rand-m9-mstd0.5-inc1, or none."
            ) from error
        for op in self.transform.ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = posterize

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = batch["image"][0]
        for b, key in enumerate(rng.fold_in(batch["key"], "randaugment").tolist()):
            with seeded(key):
                images[b] = self.augment(images[b])
        return batch

    def augment(self, image: Tensor) -> Tensor:
        """[1 or 3, H, W] uint8 -> the same."""
        pixels = image.permute(1, 2, 0).numpy()
        changed = np.asarray(self.transform(Image.fromarray(pixels if len(image) == 3 else pixels[:, :, 0])))
        return torch.from_numpy(changed.copy()).view(*image.shape[1:], len(image)).permute(2, 0, 1)


def posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's. At the largest magnitude it asks for 0 bits, which newer versions of Pillow refuse: that is black."""
    return timm_posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Seed Python's and NumPy's global generators, from which timm draws; afterwards they are as before."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(key)
    np.random.seed(key % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def erase(x: Tensor, key: Tensor, probability: float) -> Tensor:
    """[B, C, H, W] normalised, [B] keys on the CPU -> some images have normal noise in a box, in place."""
    if not probability:
        return x
    key, (h, w) = rng.fold_in(key, "erase"), x.shape[-2:]
    rows = (rng.uniform(rng.fold_in(key, "whether"), 1)[:, 0] < probability).nonzero()[:, 0]
    if not len(rows):
        return x
    side = torch.ones(len(rows), dtype=torch.long)
    boxes = draw_boxes(Crop((h, w), ERASED_SCALE, ERASED_RATIO), key[rows], h * side, w * side)
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
    """[P] keys of pairs -> ([P] bool: CutMix instead of mixup, [P] share of its own pixels
    that each image keeps, [P, 4] boxes).

    mixup, cutmix: the parameter of the symmetric beta distribution, 0 for none (Zhang et al., 2018; Yun et al., 2019).
    The box is centred anywhere and clipped at the image's edge, and the share is counted in pixels, as in timm.
    """
    key = rng.fold_in(key, "mix")
    u = rng.uniform(key, 3)
    pasted = u[:, 0] < (CUTMIX_PROB if mixup and cutmix else float(bool(cutmix)))
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
    """[B, C, H, W], [B, K] float targets, [B] keys on the CPU -> both, with images 2i and 2i + 1 mixed."""
    if not (mixup or cutmix):
        return x, targets
    pasted, kept, boxes = draw_pairs(key[::2], (x.shape[-2], x.shape[-1]), mixup, cutmix)
    mask = inside(boxes, x.shape[-2], x.shape[-1])[:, None, None].to(x.device)
    pasted, kept = pasted.to(x.device), kept.to(x.device)
    pairs, labels = x.unflatten(0, (-1, 2)), targets.unflatten(0, (-1, 2))
    share = kept.view(-1, 1, 1, 1, 1)
    blended = share * pairs + (1 - share) * pairs.flip(1)
    x = torch.where(pasted.view(-1, 1, 1, 1, 1), torch.where(mask, pairs.flip(1), pairs), blended)
    share = kept.view(-1, 1, 1)
    return x.flatten(0, 1), (share * labels + (1 - share) * labels.flip(1)).flatten(0, 1)


def smooth_labels(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """[B] int64 -> [B, num_classes]: 1 - smoothing for the label, and the rest in equal parts for all classes."""
    return (1 - smoothing) * F.one_hot(labels, num_classes).float() + smoothing / num_classes
