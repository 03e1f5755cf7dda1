"""From a source to an endless stream of batches of crops, the same whatever the number of workers and processes.

The order of an epoch is a permutation that is a function of (seed, epoch). Step s of it takes the next
`global_batch_size` images, dealt to micro-batches and processes; what is left at the end of an epoch and does not
fill a step is not seen in that epoch. So a run continues at step s by starting the stream at step s.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .. import rng
from ..errors import UserError
from ..stopping import ignore_in_worker
from .cache import OnDevice
from .crops import Views, cut, cut_at_once, reduction
from .sources import BadImage, Source, read_smaller

SUBSTITUTES = 50  # images tried in place of one that cannot be read, before the run gives up
WRITTEN_DOWN = 2**22  # images up to which the order of an epoch is kept as a list: 0.4 s to make, 170 MB while it is


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
    """How global batches of `total` images are dealt out. Raises UserError for what cannot be.

    batch_size: null: each process's share of the global batch. where: what the images are called.
    """
    if total < 1 or total % world_size:
        raise UserError(f"global_batch_size={total} must be a multiple of the number of processes, {world_size}.")
    batch_size = batch_size or total // world_size
    if batch_size < 1 or total % (batch_size * world_size):
        raise UserError(
            f"global_batch_size={total} is not a multiple of batch_size={batch_size} on {world_size} processes: "
            f"choose a batch_size that divides {total // world_size}."
        )
    if total > num_images:
        raise UserError(
            f"global_batch_size={total} is larger than the {num_images} images of {where}: use at most {num_images}."
        )
    return Layout(batch_size, total // (batch_size * world_size), world_size, rank)


class Order(Sampler[tuple[int, Tensor]]):
    """Yields (epoch, [batch_size] int64 image numbers) for each micro-batch of this process, from one step to
    another."""

    def __init__(self, seed: int, num_images: int, layout: Layout, first_step: int, last_step: int) -> None:
        self.seed, self.num_images, self.layout = seed, num_images, layout
        self.first_step, self.last_step = first_step, last_step

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.layout.accumulate

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        layout, current = self.layout, -1
        steps_per_epoch = self.num_images // layout.global_batch_size
        for step in range(self.first_step, self.last_step):
            epoch, place = divmod(step, steps_per_epoch)
            if epoch != current:
                key, current = rng.fold_in(self.seed, "order", epoch), epoch
                order = rng.permutation(key, self.num_images) if self.num_images <= WRITTEN_DOWN else None
            for micro in range(layout.accumulate):
                start = place * layout.global_batch_size + (micro * layout.world_size + layout.rank) * layout.batch_size
                places = torch.arange(start, start + layout.batch_size)
                yield epoch, rng.shuffled(key, self.num_images, places) if order is None else order[places]


Whole = tuple[Tensor, tuple[int, int]]  # an image, perhaps at a smaller scale, and its height and width as a whole


class Cropped(Dataset):
    """Images read and cut: one item is one micro-batch, {"key", "index", name: uint8 crops, "bad": ...}.

    "index" is that of the images shown: of the substitute where one could not be read.
    """

    def __init__(
        self, source: Source, views: Views, seed: int, finish: Callable[[dict], dict] | None = None,
        scaling: bool = False,
    ) -> None:  # fmt: skip
        """finish: what the worker does last with each micro-batch. scaling: read images no larger than the crops need,
        see `views.reduction`."""
        self.source, self.views, self.seed, self.finish, self.scaling = source, views, seed, finish, scaling

    def __getitem__(self, place: tuple[int, Tensor]) -> dict:
        epoch, index = place
        key = rng.fold_in(rng.fold_in(self.seed, "image", epoch), index)
        bad: list[tuple[int, str]] = []
        images = [self._read(i, k, bad) for i, k in zip(index.tolist(), key, strict=True)]
        for b in [b for b, image in enumerate(images) if image is None]:
            index = index.clone()
            images[b], index[b] = self._substitute(key[b], bad)
        if None in images:
            return {"bad": bad, "failed": True}
        batch = {"key": key, "index": index, "bad": bad, **self._cut(images, index, key)}
        return self.finish(batch) if self.finish else batch

    def _cut(self, images: list[Whole], index: Tensor, key: Tensor) -> dict[str, Tensor]:
        pixels, sizes = zip(*images, strict=True)
        return cut(pixels, key, self.views, sizes)

    def _read(self, index: int, key: Tensor, bad: list[tuple[int, str]]) -> Whole | None:
        try:
            if self.scaling:
                return read_smaller(self.source, index, partial(reduction, self.views, key.view(1)))
            image = self.source.read(index)
            return image, (image.shape[-2], image.shape[-1])
        except BadImage as error:
            bad.append((index, str(error)))
            return None

    def _substitute(self, key: Tensor, bad: list[tuple[int, str]]) -> tuple[Whole | None, int]:
        """Another image and its number in place of one that cannot be read, chosen by the key."""
        for draw in rng.bits(rng.fold_in(key, "substitute"), SUBSTITUTES).tolist():
            image = self._read(draw % len(self.source), key, bad)
            if image is not None:
                return image, draw % len(self.source)
        return None, -1


class CroppedOnDevice(Cropped):
    """The same batches from images that lie on the training device: what `index` says, all at once."""

    source: OnDevice

    def _read(self, index: int, key: Tensor, bad: list[tuple[int, str]]) -> Whole | None:
        reason = self.source.broken.get(index)
        if reason is None:
            return HERE
        bad.append((index, reason))
        return None

    def _cut(self, images: list[Whole], index: Tensor, key: Tensor) -> dict[str, Tensor]:
        return cut_at_once(self.source.take(index), key, self.views)


HERE = (torch.empty(0), (0, 0))  # in place of an image that need not be read


def make_loader(
    source: Source, views: Views, layout: Layout, seed: int, steps: tuple[int, int], workers: int, device: torch.device,
    finish: Callable[[dict], dict] | None = None, scaling: bool = False,
) -> Iterable[dict]:  # fmt: skip
    """Batches of the steps from `steps[0]` to before `steps[1]`, one item for each micro-batch.

    finish, scaling: see `Cropped`.
    """
    order = Order(seed, len(source), layout, *steps)
    if isinstance(source, OnDevice):
        return map(CroppedOnDevice(source, views, seed, finish).__getitem__, order)
    return DataLoader(
        Cropped(source, views, seed, finish, scaling),
        sampler=order,
        batch_size=None,  # an item is a whole micro-batch already
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_in_worker,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="fork"
        if workers
        else None,  # workers share the index and the cache, and never touch CUDA
    )
