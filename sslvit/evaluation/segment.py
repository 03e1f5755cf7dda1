"""Semantic segmentation by a linear classifier of frozen patch tokens: mean IoU, pixel accuracy, IoU of each class.

data.train and data.test are folders with images/ and masks/. The mask of an image is a PNG of one channel with the same
name: the class of each pixel, 0 .. 254, and 255 where it is unknown. A PNG with a palette is read as the numbers in it,
not as colours.

Each whole image is resized to one size (`size`, any multiple of the patch; the encoder resamples its position
embedding) without keeping its aspect ratio, and passes the encoder once. The target of a patch is the share of each
class among its known pixels. Its weight in the loss is the share of its pixels that are known. So the cross-entropy is
that of all pixels if each had the logits of its patch. To predict, the logits of the patches are enlarged to the mask's
size, bilinearly, and each pixel takes the largest. This is the linear protocol of DINOv2 (arXiv 2304.07193, section
7.4), except that DINOv2 trains on enlarged logits, which costs as many times more as a patch has pixels in the mask.

Tokens are standardised, and the heads of all learning rates are trained at once, as in `sslvit linear`. The rate is
chosen by mean IoU on a held-out part of the training images. Then one head is trained on all of them and tested once.

IoU of a class: pixels that are of the class and were predicted so, divided by pixels that are of it or were predicted
so, over all images together. The mean is over the classes that occur in the masks or the predictions (PASCAL VOC,
Everingham et al., IJCV 2010, where it is called accuracy).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rng
from ..data import BadImage, Source
from ..data.crops import resize
from ..data.workers import in_batches
from ..distributed import on_first_process, say
from ..errors import UserError, check_range
from ..hardware import default_workers, free_memory
from . import Command, linear, pictures, protocol, records
from .config import Segment as Config
from .confusion import confusion
from .frozen import EncoderConfig, Frozen, load_frozen
from .masked import UNKNOWN, Masked, check_classes, check_shape, colours, count_classes, patch_targets
from .probes import mean_and_std, warn_at_edge
from .strata import check_holdout

COMMAND = Command(
    "run=... data.train=... data.test=...",
    "segmentation by a linear classifier of patch tokens: mean IoU",
)

MAX_ROWS = 6  # test images in the picture
CELL_SIDE = 160  # pixels of a cell in the picture, or a little less

Row = tuple[int, Tensor, Tensor]  # of the picture: number of a test image, its mask, the prediction


def run(config: Config) -> dict[str, Any]:
    """Tokens, sweep, choice, test; prints tables and writes <run>/eval/segment.json. Raises UserError."""
    specs = (config.data.train, config.data.test)
    if not all(specs):
        raise UserError(
            f"data.{'test' if specs[0] else 'train'} is missing: segment needs folders with images/ and masks/, "
            "data.train=... data.test=..."
        )
    check_holdout(config.holdout)
    if not config.lr or min(config.lr) <= 0:
        raise UserError(f"lr={list(config.lr)} must be a list of numbers above 0.")
    check_range("", config, 1, None, "epochs", "probe_batch_size", "images", "size")
    pictures.check(config.picture)
    frozen = load_frozen(config)
    size = image_size(frozen, config.size)
    train, test = (Masked(spec, frozen.subject.data_config) for spec in specs)
    protocol.refuse_same_images(train.images, test.images, specs)
    results, rows = on_first_process(lambda: probe(config, frozen, train, test, size))
    frozen.save(
        "segment", results, train=records.describe_set(specs[0], results.pop("train_images")),
        test=records.describe_set(specs[1], results.pop("test_images")), features="patch tokens", size=list(size),
        patches=list(frozen.vit().grid(size)), width=frozen.vit().width,
    )  # fmt: skip
    if config.picture:
        on_first_process(lambda: draw(config, test, rows, size))
    return results


def image_size(frozen: Frozen, wanted: int | tuple[int, int] | None) -> tuple[int, int]:
    """(h, w) at which a ViT sees images; None: its own size. Raises UserError if it cannot take this size."""
    encoder = frozen.vit()
    h, w = (wanted, wanted) if isinstance(wanted, int) else wanted or encoder.image_size
    size = h, w
    for side, patch in zip(size, encoder.patch_size, strict=True):
        if side % patch:
            near = sorted({max(1, side // patch) * patch, (side // patch + 1) * patch})
            raise UserError(
                f"size={side} is not divisible by the patch size {patch}: use {' or '.join(map(str, near))}."
            )
    if size != tuple(encoder.image_size) and not getattr(encoder.model, "dynamic_img_size", False):
        raise UserError(f"run={frozen.subject.name} takes images of {encoder.image_size} only: leave size out.")
    return size


@dataclass
class Head:
    """A linear classifier of standardised patch tokens."""

    mean: Tensor  # [D]
    std: Tensor  # [D]
    weights: Tensor  # [D + 1, C], the last row is the bias

    def predict(self, patches: Tensor, grid: tuple[int, int], size: Sequence[int]) -> Tensor:
        """[P, D] -> [H, W] int64 classes, by the logits enlarged bilinearly."""
        logits = F.pad((patches - self.mean) / self.std, (0, 1), value=1.0) @ self.weights
        maps = logits.t().unflatten(1, grid).unsqueeze(0)
        return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)[0].argmax(dim=0)


def probe(
    config: Config, frozen: Frozen, train: Masked, test: Masked, size: tuple[int, int]
) -> tuple[dict[str, Any], list[Row]]:
    """Everything between the images and the results, and the rows of the picture. Raises UserError."""
    index = rng.permutation(rng.fold_in(config.seed, "segment"), len(train))[: config.images]
    num_classes = count_classes(train, index)
    for number in range(len(test)):
        check_classes(test.mask(number), num_classes, test.paths[number], config.data.train)
    grid, width = frozen.vit().grid(size), frozen.vit().width
    needed = len(index) * grid[0] * grid[1] * (width + num_classes) * 4 * 4
    if needed > free_memory():
        raise UserError(
            f"{len(index)} images of {grid[0]} x {grid[1]} patches need {needed / 2**30:.0f} GB of memory, and "
            f"{free_memory() / 2**30:.0f} are free: take fewer with images=, or a smaller size."
        )
    read = list(tokens(frozen, train, index, size, config))
    if len(read) < 2:
        raise UserError(f"{len(read)} images of {config.data.train} can be read: segment needs two or more.")
    numbers, x = [number for number, _ in read], torch.stack([patches for _, patches in read])  # [I, P, D]
    del read  # a second copy of x
    of_images = [patch_targets(train.mask(number), grid, num_classes) for number in numbers]
    targets, weights = (torch.stack(part) for part in zip(*of_images, strict=True))
    held_out = rng.permutation(rng.fold_in(config.seed, "holdout"), len(x)) < round(config.holdout * len(x))
    if not 0 < held_out.sum() < len(x):
        raise UserError(f"holdout={config.holdout} of {len(x)} training images leaves none on one side: use more.")
    say(
        f"segment of {config.run}: patch tokens, {width} wide, {frozen.precision}; {len(x)} training images at "
        f"{size[0]} x {size[1]} pixels, {grid[0]} x {grid[1]} patches, {num_classes} classes"
    )

    def fit(rows: Tensor, lrs: Sequence[float]) -> list[Head]:
        """One head for each learning rate, trained on these images."""
        seen = weights[rows] > 0
        if not seen.any():
            raise UserError(f"The masks of {config.data.train} have no known pixel in the images to learn from.")
        features = x[rows][seen]
        mean, std = mean_and_std(features)
        heads = linear.train_heads(
            (features - mean) / std, targets[rows][seen], num_classes, lrs, config.epochs, config.weight_decay,
            config.probe_batch_size, config.seed, weights[rows][seen],
        )  # fmt: skip
        return [Head(mean, std, head) for head in heads]

    def held_out_miou(head: Head) -> float:
        counts = torch.zeros(num_classes, num_classes, dtype=torch.long)
        for i in held_out.nonzero()[:, 0].tolist():
            mask = train.mask(numbers[i])
            counts += compare(head.predict(x[i], grid, mask.shape), mask, num_classes)
        return mean_iou(counts)

    valid = [held_out_miou(head) for head in fit(~held_out, config.lr)]
    best = max(range(len(config.lr)), key=lambda i: valid[i])
    (head,) = fit(torch.ones(len(x), dtype=torch.bool), config.lr[best : best + 1])
    counts, test_images = torch.zeros(num_classes, num_classes, dtype=torch.long), 0
    rows: list[Row] = []
    for number, patches in tokens(frozen, test, torch.arange(len(test)), size, config):
        mask = test.mask(number)
        prediction = head.predict(patches, grid, mask.shape)
        counts += compare(prediction, mask, num_classes)
        test_images += 1
        if config.picture and len(rows) < MAX_ROWS:
            rows.append((number, mask, prediction))
    if not counts.sum():
        raise UserError(f"{config.data.test} has no readable image with a known pixel.")
    results = {
        "miou": round(mean_iou(counts), 4),
        "pixel_accuracy": round(100 * (counts.diagonal().sum() / counts.sum()).item(), 4),
        "iou": [None if math.isnan(value) else round(value, 4) for value in iou(counts).tolist()],
        "pixels": counts.sum(dim=1).tolist(),
        "lr": config.lr[best],
        "holdout_miou": round(valid[best], 4),
        "sweep": [{"lr": lr, "holdout_miou": round(v, 4)} for lr, v in zip(config.lr, valid, strict=True)],
        "train_images": len(x),
        "test_images": test_images,
    }
    report(config, results)
    return results, rows


class Resized:
    """Whole images at one size, each with its number and the size that it had."""

    def __init__(self, source: Source, index: Tensor, size: tuple[int, int]) -> None:
        self.source, self.index, self.size = source, index.tolist(), size

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> tuple[int, tuple[int, int], Tensor | None]:
        number = self.index[place]
        try:
            image = self.source.read(number)
        except BadImage:
            return number, (0, 0), None
        return number, (image.shape[-2], image.shape[-1]), resize(image, self.size).float()


def tokens(
    frozen: Frozen, masked: Masked, index: Tensor, size: tuple[int, int], config: EncoderConfig
) -> Iterator[tuple[int, Tensor]]:
    """(number of the image, [P, D] float32 patch tokens on the CPU) for each image that can be read.

    Raises UserError for an image whose mask has another shape.
    """
    device, encoder = frozen.accelerator.device, frozen.vit().eval()
    workers = default_workers(device) if config.workers is None else config.workers
    per_patch = encoder.grid(size)[0] * encoder.grid(size)[1] / (encoder.grid()[0] * encoder.grid()[1])
    batch_size = max(1, int(config.batch_size / max(1, per_patch)))  # as many patches at once as at its own size
    for batch in in_batches(Resized(masked.images, index, size), batch_size, list, workers):
        for number, shape, image in batch:
            if image is None:
                say(f"{masked.images.name(number)} cannot be read and is left out.")
            else:
                check_shape(masked, number, shape)
        good = [(number, image) for number, _, image in batch if image is not None]
        if good:
            x = frozen.normalize(torch.stack([image for _, image in good]).to(device) / 255)
            with torch.inference_mode(), frozen.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                patches = encoder(x).patches.float().cpu()
            yield from zip([number for number, _ in good], patches.clone(), strict=True)


def compare(prediction: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """[H, W], [H, W] -> [C, C] pixels by class (row) and predicted class (column)."""
    return confusion(prediction.flatten(), torch.where(mask == UNKNOWN, -1, mask).flatten(), num_classes)


def iou(counts: Tensor) -> Tensor:
    """[C, C] -> [C] in percent, nan for classes that neither occur nor were predicted."""
    both = counts.diagonal().double()
    return 100 * both / (counts.sum(dim=0) + counts.sum(dim=1) - counts.diagonal())


def mean_iou(counts: Tensor) -> float:
    return iou(counts).nanmean().nan_to_num(0.0).item()


def report(config: Config, results: dict[str, Any]) -> None:
    rows = [[f"{one['lr']:g}", f"{one['holdout_miou']:.2f}"] for one in results["sweep"]]
    say(*records.table(["lr", "held-out mean IoU %"], rows))
    total = sum(results["pixels"])
    rows = [
        [str(c), f"{100 * pixels / total:.1f}", "-" if value is None else f"{value:.2f}"]
        for c, (pixels, value) in enumerate(zip(results["pixels"], results["iou"], strict=True))
    ]
    say(*records.table(["class", "% of pixels", "IoU %"], rows))
    say(
        f"test mean IoU {results['miou']:.2f} %, pixel accuracy {results['pixel_accuracy']:.2f} % on "
        f"{results['test_images']} images, with lr {results['lr']:g}, chosen on the held-out part"
    )
    warn_at_edge({"setting": {"lr": results["lr"]}}, "lr", config.lr, "learning rate")


def draw(config: Config, test: Masked, rows: list[Row], size: tuple[int, int]) -> None:
    """Some test images: image, mask and prediction."""
    cell = pictures.cell_size(size, CELL_SIDE)
    drawn = [
        [pictures.image_of(pixels, cell) for pixels in (resize(test.images.read(number), cell), *map(colours, pair))]
        for number, *pair in rows
    ]
    pictures.save(pictures.montage(drawn, column_names=["image", "mask", "predicted"]), config.picture)
