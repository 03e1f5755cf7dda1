"""From a source to an endless stream of batches of crops, the same whatever the number of workers and processes.

The order of an epoch depends only on the seed and the epoch. Step s of it takes the next
`global_batch_size` images, dealt to micro-batches and processes; what is left at the end of an epoch and does not
fill a step is not seen in that epoch. So a run continues at step s by starting the stream at step s.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import rng
from ..errors import UserError
from .cache import OnDevice
from .crops import Views, cut, cut_at_once, reduction
from .sources import BadImage, Source
from .workers import compute

MOST_DECODED = 2**28  # bytes of decoded images that a loader process holds before it cuts them
SUBSTITUTES = 50  # images tried in place of one that cannot be read, before the run gives up
# Images up to which the order of an epoch is a list: it takes 0.4 s and 170 MB to make. The order of more images is
# computed batch by batch.
MAX_LISTED = 2**22
Batch = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How a global batch is dealt out: `batch_size` images to each of `world_size` processes, `accumulate` times."""

    batch_size: int
    accumulate: int = 1
    world_size: int = 1
    rank: int = 0

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.accumulate * self.world_size


def make_layout(total: int, batch_size: int | None, num_images: int, world_size: int, rank: int, where: str) -> Layout:
    """How global batches of `total` images are dealt out. Raises UserError for numbers that do not divide.

    batch_size: None means each process's share of the global batch. where: data.train, for messages.
    """
    if total < 1 or total % world_size:
        raise UserError(f"global_batch_size={total} must be a multiple of the number of processes, {world_size}.")
    batch_size = batch_size or total // world_size
    if batch_size < 1 or total % (batch_size * world_size):
        raise UserError(_does_not_divide(total, batch_size, world_size))
    if total > num_images:
        raise UserError(_too_few_images(total, num_images, where))
    return Layout(batch_size, total // (batch_size * world_size), world_size, rank)


def _does_not_divide(total: int, batch_size: int, world_size: int) -> str:
    return (
        f"global_batch_size={total} is not a multiple of batch_size={batch_size} on {world_size} processes: choose a "
        f"batch_size that divides {total // world_size}."
    )


def _too_few_images(total: int, num_images: int, where: str) -> str:
    return f"global_batch_size={total} is larger than the {num_images} images of {where}: use at most {num_images}."


class Order:
    """(epoch, [batch_size] int64 indices of images) for each micro-batch of this process, between two steps."""

    def __init__(self, seed: int, num_images: int, layout: Layout, first_step: int, last_step: int) -> None:
        self.seed, self.num_images, self.layout = seed, num_images, layout
        self.first_step, self.last_step = first_step, last_step

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.layout.accumulate

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        layout, current = self.layout, -1
        steps_per_epoch = self.num_images // layout.global_batch_size
        for step in range(self.first_step, self.last_step):
            epoch, step_of_epoch = divmod(step, steps_per_epoch)
            if epoch != current:
                key, current = rng.fold_in(self.seed, "order", epoch), epoch
                order = rng.permutation(key, self.num_images) if self.num_images <= MAX_LISTED else None
            for micro in range(layout.accumulate):
                start = (step_of_epoch * layout.accumulate + micro) * layout.world_size + layout.rank
                positions = torch.arange(layout.batch_size) + start * layout.batch_size
                yield epoch, rng.shuffled(key, self.num_images, positions) if order is None else order[positions]


SizedImage = tuple[Tensor, tuple[int, int]]  # an image, perhaps at a smaller scale, and its own height and width


class Cropped:
    """Images read and cut. One item is one micro-batch: {"key", "index", "bad", name: uint8 crops}.

    index: [B] int64, the images of the crops: the substitute's index where an image could not be read.
    bad: (index, reason) of the images that could not be read.
    """

    def __init__(
        self, source: Source, views: Views, seed: int, finish: Callable[[Batch], Batch] | None = None,
        scaling: bool = False,
    ) -> None:  # fmt: skip
        """finish: what the worker does last with each micro-batch. scaling: large images may be read at a smaller
        scale, see `crops.reduction`."""
        self.source, self.views, self.seed, self.finish, self.scaling = source, views, seed, finish, scaling

    def __getitem__(self, position: tuple[int, Tensor]) -> Batch:
        epoch, index = position
        key = rng.fold_in(rng.fold_in(self.seed, "image", epoch), index)
        images: list[SizedImage] = []
        bad: list[tuple[int, str]] = []
        parts: list[dict[str, Tensor]] = []
        first = held = 0  # the first image that is not cut yet, and bytes of the images from there on
        for b, k in enumerate(key):
            image = self._read(int(index[b]), k, bad)
            if image is None:
                index = index.clone()
                image, index[b] = self._substitute(k, bad)
            if image is None:
                return {"bad": bad, "failed": True}
            images.append(image)
            held += image[0].nbytes
            if held > MOST_DECODED or b == len(key) - 1:  # a batch of scans would fill the memory
                parts.append(self._cut(images, index[first : b + 1], key[first : b + 1]))
                images, first, held = [], b + 1, 0
        batch = {"key": key, "index": index, "bad": bad, **_joined(parts)}
        return self.finish(batch) if self.finish else batch

    def _cut(self, images: list[SizedImage], index: Tensor, key: Tensor) -> dict[str, Tensor]:
        pixels, sizes = zip(*images, strict=True)
        return cut(pixels, key, self.views, sizes)

    def _read(self, index: int, key: Tensor, bad: list[tuple[int, str]]) -> SizedImage | None:
        try:
            if self.scaling:
                return self.source.read_smaller(index, partial(reduction, self.views, key.view(1)))
            image = self.source.read(index)
            return image, (image.shape[-2], image.shape[-1])
        except BadImage as error:
            bad.append((index, str(error)))
            return None

    def _substitute(self, key: Tensor, bad: list[tuple[int, str]]) -> tuple[SizedImage | None, int]:
        """Another image, chosen by the key, and its index, in place of an image that cannot be read."""
        for draw in rng.bits(rng.fold_in(key, "substitute"), SUBSTITUTES).tolist():
            image = self._read(draw % len(self.source), key, bad)
            if image is not None:
                return image, draw % len(self.source)
        return None, -1


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """[V, b, C, h, w] crops of the first images of a batch, of the next ones ... -> those of all, [V, B, C, h, w]."""
    if len(parts) == 1:
        return parts[0]
    batch = {}
    for name, crops in parts[0].items():
        last = crops[0].is_contiguous(memory_format=torch.channels_last)  # as `cut` leaves them, but cat may not
        joined = torch.cat([part[name][v] for v in range(len(crops)) for part in parts])
        joined = joined.contiguous(memory_format=torch.channels_last) if last else joined
        batch[name] = joined.unflatten(0, (len(crops), -1))
    return batch


class CroppedOnDevice(Cropped):
    """The same batches from images that lie on the training device. All images of a batch are cut there at once."""

    source: OnDevice

    def _read(self, index: int, key: Tensor, bad: list[tuple[int, str]]) -> SizedImage | None:
        if index not in self.source.broken:
            return torch.empty(0), (0, 0)  # nobody uses it
        bad.append((index, self.source.broken[index]))
        return None

    def _cut(self, images: list[SizedImage], index: Tensor, key: Tensor) -> dict[str, Tensor]:
        return cut_at_once(self.source.take(index), key, self.views)


def make_loader(
    source: Source, views: Views, layout: Layout, seed: int, steps: tuple[int, int], workers: int, device: torch.device,
    finish: Callable[[Batch], Batch] | None = None, scaling: bool = False,
) -> Iterator[Batch]:  # fmt: skip
    """Batches from step `steps[0]` to before step `steps[1]`, one item for each micro-batch. Loader processes
    start at once.

    finish, scaling: see `Cropped`.
    """
    order = Order(seed, len(source), layout, *steps)
    if isinstance(source, OnDevice):
        return map(CroppedOnDevice(source, views, seed, finish).__getitem__, order)
    work = Cropped(source, views, seed, finish, scaling).__getitem__
    return compute(work, order, workers, pin=device.type == "cuda") if workers else map(work, order)
