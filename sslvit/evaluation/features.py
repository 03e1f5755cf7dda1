"""Frozen features: each image passes through the encoder once, on any number of processes."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from ..data import BadImage, Source, none_readable
from ..data.augment import Normalize
from ..data.crops import centre
from ..data.workers import in_batches
from ..distributed import gather_objects, rank, world_size
from ..errors import UserError
from ..hardware import default_workers, keep_memory
from ..model.encoder import Encoder, Pool
from ..pretrained import Pixels
from ..progress import counting
from .classes import labels_of

CROP_RATIO = 224 / 256  # the published evaluation resizes to 256 and cuts the central 224
BLOCK = 2**14  # features that a process passes to the others at once


@dataclass
class Features:
    """Features of the readable images of a source, or one process's share of them, in the source's order."""

    values: Tensor  # [N, D] float32 on the CPU
    labels: Tensor  # [N] int64, -1 where an image has none
    classes: list[str]
    index: Tensor  # [N] int64, numbers of the images in the source
    unreadable: int = 0  # of the whole source

    def __len__(self) -> int:
        return len(self.values)

    def normalized(self) -> Tensor:
        """[N, D] of unit length."""
        return F.normalize(self.values, dim=1)

    def normalize(self) -> "Features":
        """Bring the values to unit length in place, so that a million of them need no second copy."""
        for rows in self.values.split(65536):
            F.normalize(rows, dim=1, out=rows)
        return self


class CentreCropped:
    """Images as an evaluation sees them: resized and centred, or as they are if they have the encoder's size."""

    def __init__(self, source: Source, index: Tensor, size: tuple[int, int]) -> None:
        self.source, self.index, self.size = source, index, size

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> tuple[int, Tensor | None]:
        number = int(self.index[place])
        try:
            image = self.source.read(number)
        except BadImage:
            return number, None
        if tuple(image.shape[-2:]) != self.size:
            image = centre(image, self.size, CROP_RATIO)
        return number, image


def share(source: Source) -> Tensor:
    """[n] numbers of the images that this process computes."""
    return torch.arange(rank(), len(source), world_size())


def batches(
    encoder: Encoder | Pixels, source: Source, normalize: Normalize, accelerator: Accelerator, batch_size: int,
    workers: int | None, numbers: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """(numbers [B], normalised images [B, C, H, W] on the device) of this process's readable images. The encoder is in
    evaluation mode until the last batch. Shows progress. numbers: [n], of other images than its share."""
    device = accelerator.device
    images_here = CentreCropped(source, share(source) if numbers is None else numbers, encoder.image_size)
    workers = default_workers(device) if workers is None else workers
    was_training = encoder.training
    encoder.eval()
    seen = 0
    try:
        running = in_batches(images_here, batch_size, _collate, workers)
        keep_memory(device)  # now that the loader processes have been started
        with counting("features", len(images_here) * world_size()) as show:
            for index, images, failed in running:
                seen += len(index) + failed
                if images is not None:
                    yield index, normalize(images.to(device, non_blocking=True).float() / 255)
                show(seen * world_size())
    finally:
        encoder.train(was_training)


def pooled_batches(
    encoder: Encoder | Pixels, source: Source, normalize: Normalize, accelerator: Accelerator, pools: Sequence[Pool],
    batch_size: int, workers: int | None, numbers: Tensor | None = None,
) -> Iterator[tuple[Tensor, dict[Pool, Tensor]]]:  # fmt: skip
    """Like `batches`, with the features [B, D] by each way of pooling, on the device, in place of the images."""
    for index, x in batches(encoder, source, normalize, accelerator, batch_size, workers, numbers):
        # force_eager: blocks that were compiled for training are not compiled again for these shapes.
        with torch.inference_mode(), accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            pooled = encoder.pooled(x, pools)
        yield index, pooled


def extract(
    encoder: Encoder | Pixels, source: Source, normalize: Normalize, accelerator: Accelerator, pools: Sequence[Pool],
    batch_size: int = 256, workers: int | None = None, whole: bool = True, scratch: Path | None = None,
) -> dict[Pool, Features]:  # fmt: skip
    """Features of all images of a source, by each way of pooling, from one pass. Raises UserError.

    Every process computes its share: images rank, rank + world size, ... It gets the whole, or with `whole=False` its
    share. scratch: a folder for files that hold the features meanwhile; None: they are in memory.
    """
    numbers, done = torch.empty_like(share(source)), 0
    values = {pool: room_for(len(numbers), encoder.feature_dim(pool), scratch) for pool in pools}
    for index, pooled in pooled_batches(encoder, source, normalize, accelerator, pools, batch_size, workers):
        for pool in pools:
            values[pool][done : done + len(index)] = pooled[pool]
        numbers[done : done + len(index)] = index
        done += len(index)
    total = sum(gather_objects(done))
    if not total:
        raise none_readable(source)
    for value in values.values():
        check_finite(value[:done], getattr(encoder, "architecture", "the encoder"))
    found = {
        pool: label_features(value[:done], numbers[:done], source, len(source) - total)
        for pool, value in values.items()
    }
    return {pool: gather_features(part) for pool, part in found.items()} if whole else found


def room_for(rows: int, width: int, folder: Path | None) -> Tensor:
    """[rows, width] float32 to be filled: in a nameless file of the folder, which the system can move out of memory. In
    memory if there is no folder or no room in it."""
    if folder is not None and rows and hasattr(os, "posix_fallocate"):
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, 4 * rows * width)  # or a full disk would kill the process later
                return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(rows, width)))
        except OSError:
            pass  # no room, or the folder cannot be written: in memory
    return torch.empty(rows, width)


def label_features(values: Tensor, index: Tensor, source: Source, unreadable: int) -> Features:
    """[n, D], [n] numbers of images -> the same with their labels."""
    return Features(values, labels_of(source)[index], source.classes, index, unreadable)


def gather_features(part: Features, everywhere: bool = True) -> Features:
    """The whole from each process's share, on every process, or only on the first and empty on the others. All call it.

    The shares are passed in blocks: no process holds much more than the whole once.
    """
    if world_size() == 1:
        return part
    here = everywhere or rank() == 0
    index = torch.cat(gather_objects(part.index)).sort().values
    index = index if here else index[:0]
    values, labels = torch.empty(len(index), part.values.shape[1]), torch.empty_like(index)
    for start in range(0, max(gather_objects(len(part))), BLOCK):
        rows = slice(start, start + BLOCK)
        # clone: a view of a tensor would be sent with the whole tensor.
        parts = gather_objects([tensor[rows].clone() for tensor in (part.index, part.labels, part.values)])
        for numbers, block_labels, block_values in parts if here else ():
            places = torch.searchsorted(index, numbers)
            values[places], labels[places] = block_values, block_labels
    return replace(part, values=values, labels=labels, index=index)


def check_finite(values: Tensor, name: str) -> None:
    """[N, ...]: all processes call it, each with its own. Raises UserError on all of them for NaN or infinity: a
    nearest-neighbour search among such numbers would give a result without any sign of it."""
    broken = sum(gather_objects(int((~torch.isfinite(values.flatten(1)).all(dim=1)).sum())))
    if broken:
        raise UserError(
            f"{name} gives features of {broken} images that are not finite numbers: try precision=float32, or other "
            "weights."
        )


def _collate(items: list[tuple[int, Tensor | None]]) -> tuple[Tensor, Tensor | None, int]:
    good = [(number, image) for number, image in items if image is not None]
    images = torch.stack([image for _, image in good]) if good else None
    return torch.tensor([number for number, _ in good], dtype=torch.long), images, len(items) - len(good)
