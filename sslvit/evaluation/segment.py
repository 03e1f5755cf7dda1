"""Semantic segmentation by a linear classifier of frozen patch tokens: mean IoU, pixel accuracy, IoU of each class.

data.train and data.test are folders with images/ and masks/: for each image a PNG of one channel with the class of each
pixel, 0 .. 254, and 255 where nobody knows, under the image's name but for the ending. A PNG with a palette is read as
the numbers in it, not as colours.

Each whole image is resized to one size (`size`, any multiple of the patch; the encoder resamples its position
embedding), without keeping its aspect, and passes the encoder once. A patch's target is the share of each class among
its known pixels, and its weight in the loss the share of its pixels that are known: the cross-entropy is that of all
pixels if each had the logits of its patch. To predict, the logits of the patches are enlarged to the mask's size,
bilinearly, and each pixel takes the largest (the linear protocol of DINOv2, arXiv 2304.07193, section 7.4, without its
training on enlarged logits, which costs as much as the mask has pixels for each patch).

Tokens are standardised, and one classifier for each learning rate is trained at once, as in `sslvit linear`. The rate
is chosen by mean IoU on a held-out part of the training images; then one classifier is trained on all of them, and the
test images are looked at once.

IoU of a class: pixels that are and were called it, by pixels that are or were called it, over all images together; the
mean is over the classes that occur in the masks or the predictions (PASCAL VOC, Everingham et al., IJCV 2010, where it
is called accuracy).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import rng, schedules
from ..data import BadImage, Source
from ..data.crops import resize
from ..distributed import on_first_process, say
from ..errors import UserError, check_range
from ..hardware import default_workers, free_memory
from ..stopping import ignore_in_worker
from . import Command, linear, pictures, protocol, records
from .confusion import confusion
from .frozen import EncoderConfig, Frozen, load_frozen
from .masked import UNKNOWN, Masked, check_classes, check_shape, colours, count_classes, patch_targets
from .probes import mean_and_std, warn_at_edge
from .strata import check_holdout

COMMAND = Command(
    "run=... data.train=... data.test=...",
    "segmentation by a linear classifier of patch tokens: mean IoU",
)

SHOWN = 6  # test images in the picture

Shown = tuple[int, Tensor, Tensor]  # number of an image, its mask, what was predicted


@dataclass
class Sets:
    train: str = ""  # a folder with images/ and masks/ to learn from
    test: str = ""  # likewise, to be judged on


@dataclass
class Config(EncoderConfig):
    data: Sets = field(default_factory=Sets)
    size: int | tuple[int, int] | None = None  # pixels at which the encoder sees the images; null: its own size
    lr: tuple[float, ...] = (*linear.LEARNING_RATES, 3.0)  # of SGD at a batch of 1024 patches; one is chosen
    epochs: int = 20  # of the classifiers, over all patches
    weight_decay: float = 0.0  # of the classifiers
    holdout: float = 0.1  # share of the training images on which the learning rate is chosen
    probe_batch_size: int = 1024  # patches in a step of the classifiers
    images: int | None = None  # training images at most, chosen by the seed; null: all
    picture: str = ""  # PNG with some test images, their masks and what was predicted; empty: none


def run(config: Config) -> dict[str, Any]:
    """Tokens, sweep, choice, test; prints tables and writes <run>/eval/segment.json. Raises UserError."""
    check(config)
    frozen = load_frozen(config)
    size = image_size(frozen, config.size)
    words = (config.data.train, config.data.test)
    train, test = (Masked(word, frozen.subject.encoder.in_chans) for word in words)
    protocol.refuse_same_images(train.images, test.images, words)
    results, shown = on_first_process(lambda: probe(config, frozen, train, test, size))
    frozen.save(
        "segment", results, train=records.describe_set(words[0], results.pop("train_images")),
        test=records.describe_set(words[1], results.pop("test_images")), features="patch tokens", size=list(size),
        patches=list(frozen.subject.encoder.grid(size)), width=frozen.subject.encoder.width,
    )  # fmt: skip
    if config.picture:
        on_first_process(lambda: draw(config, test, shown, size))
    return results


def check(config: Config) -> None:
    """Refuse what cannot be, before the work. Raises UserError."""
    for key in ("train", "test"):
        if not getattr(config.data, key):
            raise UserError(
                f"data.{key} is missing: segment needs folders with images/ and masks/, data.train=... data.test=..."
            )
    check_holdout(config.holdout)
    if not config.lr or min(config.lr) <= 0:
        raise UserError("lr must be a list of numbers above 0.")
    check_range("", config, 1, None, "epochs", "probe_batch_size", "images", "size")
    pictures.check(config.picture)


def image_size(frozen: Frozen, wanted: int | tuple[int, int] | None) -> tuple[int, int]:
    """(h, w) at which a ViT sees images; None: its own size. Raises UserError if it cannot take this size."""
    encoder = frozen.vit()
    size = encoder.image_size if wanted is None else (wanted, wanted) if isinstance(wanted, int) else wanted
    for side, patch in zip(size, encoder.patch_size, strict=True):
        if side % patch:
            near = sorted({max(1, side // patch) * patch, (side // patch + 1) * patch})
            raise UserError(
                f"size={side} is not divisible by the patch size {patch}: use {' or '.join(map(str, near))}."
            )
    if size != tuple(encoder.image_size) and not getattr(encoder.model, "dynamic_img_size", False):
        raise UserError(f"run={frozen.subject.name} takes images of {encoder.image_size} only: leave size out.")
    return size


def probe(
    config: Config, frozen: Frozen, train: Masked, test: Masked, size: tuple[int, int]
) -> tuple[dict[str, Any], list[Shown]]:
    """Everything between the images and the results, and what the picture shows. Raises UserError."""
    order = rng.permutation(rng.fold_in(config.seed, "segment"), len(train))[: config.images]
    num_classes = count_classes(train, order)
    for number in range(len(test)):
        check_classes(test.mask(number), num_classes, test.paths[number], config.data.train)
    grid = frozen.subject.encoder.grid(size)
    needed = len(order) * grid[0] * grid[1] * (frozen.subject.encoder.width + num_classes) * 4 * 4
    if needed > free_memory():
        raise UserError(
            f"{len(order)} images of {grid[0]} x {grid[1]} patches need {needed / 2**30:.0f} GB of memory, and "
            f"{free_memory() / 2**30:.0f} are free: take fewer with images=, or a smaller size."
        )
    parts, numbers = [], []
    for number, patches in tokens(frozen, train, order, size, config):
        parts.append(patches)
        numbers.append(number)
    if len(numbers) < 2:
        raise UserError(f"{len(numbers)} images of {config.data.train} can be read: segment needs two or more.")
    x = torch.stack(parts)  # [I, P, D]
    targets, weights = zip(*(patch_targets(train.mask(i), grid, num_classes) for i in numbers), strict=True)
    targets, weights = torch.stack(targets), torch.stack(weights)
    held_out = rng.permutation(rng.fold_in(config.seed, "holdout"), len(x)) < round(config.holdout * len(x))
    if not 0 < held_out.sum() < len(x):
        raise UserError(f"holdout={config.holdout} of {len(x)} training images leaves none on one side: use more.")
    say(
        f"segment of {config.run}: patch tokens, {x.shape[2]} wide, {frozen.precision}; {len(x)} training images at "
        f"{size[0]} x {size[1]} pixels, {grid[0]} x {grid[1]} patches, {num_classes} classes"
    )

    def fit(rows: Tensor, lrs: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        chosen = weights[rows] > 0
        if not chosen.any():
            raise UserError(f"The masks of {config.data.train} know no pixel of the images to learn from.")
        features = x[rows][chosen]
        mean, std = mean_and_std(features)
        features = (features - mean) / std
        return mean, std, train_heads(features, targets[rows][chosen], weights[rows][chosen], lrs, config)

    mean, std, heads = fit(~held_out, config.lr)
    tables = torch.zeros(len(heads), num_classes, num_classes, dtype=torch.long)
    for place in held_out.nonzero().squeeze(1).tolist():
        mask = train.mask(numbers[place])
        for h, head in enumerate(heads):
            tables[h] += compare(predict((x[place] - mean) / std, head, grid, mask.shape), mask, num_classes)
    valid = [mean_iou(one) for one in tables]
    best = max(range(len(config.lr)), key=lambda head: valid[head])
    mean, std, heads = fit(torch.ones(len(x), dtype=torch.bool), config.lr[best : best + 1])

    counts, shown = torch.zeros(num_classes, num_classes, dtype=torch.long), []
    every, count = torch.arange(len(test)), 0
    for number, patches in tokens(frozen, test, every, size, config):
        mask = test.mask(number)
        prediction = predict((patches - mean) / std, heads[0], grid, mask.shape)
        counts += compare(prediction, mask, num_classes)
        count += 1
        if config.picture and len(shown) < SHOWN:
            shown.append((number, mask, prediction))
    if not counts.sum():
        raise UserError(f"{config.data.test} has no image that can be read with a pixel that is known.")
    results = {
        "miou": round(mean_iou(counts), 4),
        "pixel_accuracy": round(100 * (counts.diagonal().sum() / counts.sum()).item(), 4),
        "iou": [None if value != value else round(value, 4) for value in iou(counts).tolist()],
        "pixels": counts.sum(dim=1).tolist(),
        "lr": config.lr[best],
        "holdout_miou": round(valid[best], 4),
        "sweep": [{"lr": lr, "holdout_miou": round(v, 4)} for lr, v in zip(config.lr, valid, strict=True)],
        "train_images": len(x),
        "test_images": count,
    }
    report(config, results, best)
    return results, shown


class Resized(Dataset):
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
        return number, tuple(image.shape[-2:]), resize(image, self.size).float()


def tokens(
    frozen: Frozen, masked: Masked, index: Tensor, size: tuple[int, int], config: EncoderConfig
) -> Iterator[tuple[int, Tensor]]:
    """(number of the image, [P, D] float32 patch tokens on the CPU) for each image that can be read.

    Raises UserError for an image whose mask has another shape.
    """
    device, encoder = frozen.accelerator.device, frozen.subject.encoder.eval()
    workers = default_workers(device) if config.workers is None else config.workers
    per_patch = encoder.grid(size)[0] * encoder.grid(size)[1] / (encoder.grid()[0] * encoder.grid()[1])
    loader = DataLoader(
        Resized(masked.images, index, size),
        batch_size=max(1, int(config.batch_size / max(1, per_patch))),  # as many patches at once as at its own size
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=ignore_in_worker,
        multiprocessing_context="fork" if workers else None,
    )
    for batch in loader:
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


def train_heads(x: Tensor, targets: Tensor, weights: Tensor, lrs: Sequence[float], config: Config) -> Tensor:
    """[N, D], [N, C] shares, [N] weights -> [H, D + 1, C], one head for each rate; as `linear.train_heads`, with shares
    in place of labels."""
    x = F.pad(x, (0, 1), value=1.0)
    key = rng.fold_in(config.seed, "probe")
    start = 0.01 * (rng.uniform(key, x.shape[1] * targets.shape[1]).view(1, x.shape[1], -1) * 2 - 1) * 3**0.5
    heads = start.repeat(len(lrs), 1, 1)
    heads[:, -1] = 0
    momentum = torch.zeros_like(heads)
    batch_size = min(config.probe_batch_size, len(x))
    rates = torch.tensor(lrs).view(-1, 1, 1) * batch_size / 1024
    steps_per_epoch = len(x) // batch_size
    for step in range(config.epochs * steps_per_epoch):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:
            order = rng.permutation(rng.fold_in(key, epoch), len(x))
        rows = order[place * batch_size : (place + 1) * batch_size]
        batch = x[rows]
        error = ((batch @ heads).softmax(dim=-1) - targets[rows]) * weights[rows].unsqueeze(1)
        gradient = batch.t() @ error / batch_size + config.weight_decay * heads
        momentum = 0.9 * momentum + gradient
        heads = heads - schedules.cosine(1.0, 0.0, step / (config.epochs * steps_per_epoch)) * rates * momentum
    return heads


def predict(x: Tensor, head: Tensor, grid: tuple[int, int], size: Sequence[int]) -> Tensor:
    """[P, D] standardised tokens, [D + 1, C] -> [H, W] int64 classes, by the logits enlarged bilinearly."""
    logits = F.pad(x, (0, 1), value=1.0) @ head
    picture = logits.t().unflatten(1, grid).unsqueeze(0)
    return F.interpolate(picture, tuple(size), mode="bilinear", align_corners=False)[0].argmax(dim=0)


def compare(prediction: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """[H, W] twice -> [C, C] pixels of a class (row) that were called a class (column)."""
    return confusion(prediction.flatten(), torch.where(mask == UNKNOWN, -1, mask).flatten(), num_classes)


def iou(counts: Tensor) -> Tensor:
    """[C, C] -> [C] in percent, nan for classes that neither occur nor were predicted."""
    both = counts.diagonal().double()
    return 100 * both / (counts.sum(dim=0) + counts.sum(dim=1) - counts.diagonal())


def mean_iou(counts: Tensor) -> float:
    return iou(counts).nanmean().nan_to_num(0.0).item()


def report(config: Config, results: dict[str, Any], best: int) -> None:
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
    warn_at_edge({"setting": {"lr": config.lr[best]}}, "lr", config.lr, "learning rate")


def draw(config: Config, test: Masked, shown: list[Shown], size: tuple[int, int]) -> None:
    """A row for each of some test images: the image, its mask and the prediction."""
    factor = min(1.0, 320 / max(size)) if max(size) > 160 else max(1, 160 // max(size))
    cell = (round(size[0] * factor), round(size[1] * factor))
    rows = []
    for number, mask, prediction in shown:
        image = pictures.image_of(resize(test.images.read(number), cell))
        rows.append([image, *(pictures.image_of(colours(part), cell) for part in (mask, prediction))])
    pictures.save(pictures.montage(rows, column_names=["image", "mask", "predicted"]), config.picture)
