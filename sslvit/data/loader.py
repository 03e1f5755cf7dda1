"""From a source to an endless stream of batches of crops, the same whatever the number of workers and processes.

The order of an epoch is a permutation that is a function of (seed, epoch). Step s of it takes the next
`global_batch_size` images, dealt to micro-batches and processes; what is left at the end of an epoch and does not
fill a step is not seen in that epoch. So a run continues at step s by starting the stream at step s.
"""

import math
import mmap
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .. import rng
from ..distributed import gather_objects, say
from ..errors import UserError
from ..hardware import free_memory
from ..stopping import ignore_in_worker
from ..views import Views, cut
from ..words import shown
from . import BadImage, Cache, Source

SUBSTITUTES = 50  # images tried in place of one that cannot be read, before the run gives up
WRITTEN_DOWN = 2**22  # images up to which the order of an epoch is kept as a list: 0.4 s to make, 170 MB while it is
CACHE_SHARE = 0.25  # of the machine's free memory, up to which images are kept by default


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


class Cropped(Dataset):
    """Images read and cut: one item is one micro-batch, {"key", "index", name: uint8 crops, "bad": ...}.

    "index" is that of the images shown: of the substitute where one could not be read.
    """

    def __init__(self, source: Source, views: Views, seed: int, finish: Callable[[dict], dict] | None = None) -> None:
        """finish: what the worker does last with each micro-batch."""
        self.source, self.views, self.seed, self.finish = source, views, seed, finish

    def __getitem__(self, place: tuple[int, Tensor]) -> dict:
        epoch, index = place
        key = rng.fold_in(rng.fold_in(self.seed, "image", epoch), index)
        bad: list[tuple[int, str]] = []
        images = [self._read(i, bad) for i in index.tolist()]
        for b in [b for b, image in enumerate(images) if image is None]:
            index = index.clone()
            images[b], index[b] = self._substitute(key[b], bad)
        if None in images:
            return {"bad": bad, "failed": True}
        batch = {"key": key, "index": index, "bad": bad, **cut(images, key, self.views)}
        return self.finish(batch) if self.finish else batch

    def _read(self, index: int, bad: list[tuple[int, str]]) -> Tensor | None:
        try:
            return self.source.read(index)
        except BadImage as error:
            bad.append((index, str(error)))
            return None

    def _substitute(self, key: Tensor, bad: list[tuple[int, str]]) -> tuple[Tensor | None, int]:
        """Another image and its number in place of one that cannot be read, chosen by the key."""
        for draw in rng.bits(rng.fold_in(key, "substitute"), SUBSTITUTES).tolist():
            image = self._read(draw % len(self.source), bad)
            if image is not None:
                return image, draw % len(self.source)
        return None, -1


class Cached:
    """A source whose decoded images stay in memory that all workers share, filled as they are read.

    Only for images of one size and 8 bits; the others are read each time.
    """

    def __init__(self, source: Source, shape: tuple[int, int, int], room: "Room | None" = None) -> None:
        """room: of `room_for` these images; None: one of this process and its workers."""
        self.source, self.labels, self.classes = source, source.labels, source.classes
        self.room = room or Room(room_for(source, shape))
        size = len(source) * math.prod(shape)
        # Pixel by pixel, as decoders give colours and as crops are cut from them.
        c, h, w = shape
        self.pixels = self.room.bytes[:size].view(len(source), h, w, c).permute(0, 3, 1, 2)
        self.filled = self.room.bytes[size:]

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def identity(self) -> str:
        return self.source.identity()

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def read(self, index: int) -> Tensor:
        if self.filled[index]:
            return self.pixels[index]
        image = self.source.read(index)
        if image.dtype == torch.uint8 and image.shape == self.pixels.shape[1:]:
            self.pixels[index] = image
            self.filled[index] = 1  # after the pixels: another worker may be looking
        return image


def room_for(source: Source, shape: tuple[int, ...]) -> int:
    """Bytes of all images and a mark for each."""
    return len(source) * (math.prod(shape) + 1)


class Room:
    """Zeros that processes of one machine share: those forked from this one, and those that open its `address`.

    Memory without a name (memfd of Linux) and not a file, so that it is gone with the last process that uses it,
    however that ends, and has nothing to do with the size of /dev/shm, which is small in containers. Elsewhere only
    forked processes share it. Pages are taken as they are written.
    """

    def __init__(self, size: int, address: str | None = None) -> None:
        """address: of the room of another process, of the same size. Raises OSError if it cannot be opened."""
        self.file = open(address, "r+b") if address else _nameless(max(1, size))  # noqa: SIM115
        number = self.file.fileno() if self.file else -1
        self.bytes = torch.frombuffer(mmap.mmap(number, max(1, size)), dtype=torch.uint8)[:size]

    def address(self) -> str | None:
        """What `open` takes in another process of this machine while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.file.fileno()}" if self.file else None


def _nameless(size: int) -> IO[bytes] | None:
    """Memory that has a file number, if the system has such."""
    try:
        file = os.fdopen(os.memfd_create("sslvit"), "r+b")
        os.ftruncate(file.fileno(), size)
        return file
    except (AttributeError, OSError):
        return None


def machine() -> str:
    """The same for processes that can open one another's rooms: of one kernel, started once, that see one another."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{platform.node()} {started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()} {os.getpid()}"


class Memory:
    """What the caches of this process may fill together: a share of the free memory, divided by the processes of the
    machine where they cannot share. Pages are filled only as images are read, so each cache has to be counted when it
    is made."""

    def __init__(self) -> None:
        alone = not hasattr(os, "memfd_create")
        self.left = CACHE_SHARE * free_memory() / (int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if alone else 1)

    def take(self, size: int) -> bool:
        fits = size <= self.left
        self.left -= size if fits else 0
        return fits


def cached(source: Source, cache: Cache, seed: int, memory: Memory) -> Source:
    """The source, in memory if asked (`ram`), or if left open (None) and it will probably fit and help.

    All processes call it together: those of a machine share one memory, that of the first of them, which decides.
    """
    if cache is False:
        return source
    shape = _shape_of_all(source, seed)
    size = room_for(source, shape) if shape else 0
    wanted = bool(shape) and (memory.take(size) or cache is not None)
    room = Room(size) if wanted else None
    offers = gather_objects((machine(), wanted, room.address() if room else None, size))
    if cache and not any(offer[1] for offer in offers):
        say(f"data.cache={shown(cache)} has no effect: it is for images of one size and 8 bits, and these are not.")
    _, decided, address, its_size = next(offer for offer in offers if offer[0] == machine())
    if not (decided and shape):
        return source
    if address and its_size == size and not (room and address == room.address()):
        try:
            room = Room(size, address)
        except OSError:  # a system that hides processes from one another: then each has its own, if it was asked for
            if cache is None:
                return source
    return Cached(source, shape, room)


def _shape_of_all(source: Source, seed: int) -> tuple[int, int, int] | None:
    """[C, H, W], if some images have it in common and are of 8 bits."""
    shapes = set()
    for index in rng.permutation(rng.fold_in(seed, "sample"), len(source))[:16].tolist():
        try:
            image = source.read(index)
        except BadImage:
            continue
        shapes.add((*image.shape, image.dtype))
    *shape, dtype = shapes.pop() if len(shapes) == 1 else (None,)
    return tuple(shape) if dtype == torch.uint8 else None


def make_loader(
    source: Source, views: Views, layout: Layout, seed: int, steps: tuple[int, int], workers: int, device: torch.device,
    finish: Callable[[dict], dict] | None = None,
) -> DataLoader:  # fmt: skip
    """Batches of the steps from `steps[0]` to before `steps[1]`, one item for each micro-batch.

    finish: what a worker does last with each of them.
    """
    return DataLoader(
        Cropped(source, views, seed, finish),
        sampler=Order(seed, len(source), layout, *steps),
        batch_size=None,  # an item is a whole micro-batch already
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_in_worker,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="fork"
        if workers
        else None,  # workers share the index and the cache, and never touch CUDA
    )
