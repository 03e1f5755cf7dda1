"""Images that stay in memory once they are decoded: of the machine, for all processes, or of the training device."""

import math
import mmap
import os
import platform
import time
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import rng
from ..arguments import format_value
from ..distributed import gather_objects, rank, say, world_size
from ..errors import UserError
from ..hardware import free_memory
from ..metrics import format_bytes
from ..stopping import ignore_in_worker
from .config import Cache
from .sources import BadImage, Source

CACHE_SHARE = 0.25  # of the free memory, up to which images are kept by default
SAY_EVERY = 10.0  # seconds


class Kept:
    """What is said of a source whose images are kept is said of the source."""

    def __init__(self, source: Source) -> None:
        self.source, self.labels, self.classes = source, source.labels, source.classes

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def identity(self) -> str:
        return self.source.identity()

    def fingerprint(self) -> str:
        return self.source.fingerprint()


class Cached(Kept):
    """A source whose decoded images stay in memory that all workers share, filled as they are read.

    Only for images of one size and 8 bits; the others are read each time.
    """

    def __init__(self, source: Source, shape: tuple[int, int, int], room: "Room | None" = None) -> None:
        """room: of `room_for` these images; None: one of this process and its workers."""
        super().__init__(source)
        self.room, self.shape = room or Room(room_for(source, shape)), shape
        size = len(source) * math.prod(shape)
        # Pixel by pixel, as decoders give colours and as crops are cut from them.
        c, h, w = shape
        self.pixels = self.room.bytes[:size].view(len(source), h, w, c).permute(0, 3, 1, 2)
        self.filled = self.room.bytes[size:]

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
        say(f"data.cache={format_value(cache)} has no effect: it needs 8-bit images of one size, and these are not.")
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


class OnDevice(Kept):
    """Images of one size and 8 bits, all of them on the training device; `loader.make_loader` cuts them there."""

    def __init__(self, source: Source, pixels: Tensor, broken: dict[int, str]) -> None:
        """pixels: [N, H, W, C] uint8, on the device. broken: why an image could not be read, by number."""
        super().__init__(source)
        self.pixels, self.broken = pixels, broken

    def take(self, index: Tensor) -> Tensor:
        """[B] int64 -> [B, C, H, W] uint8 on the device."""
        index = index.to(self.pixels.device, non_blocking=True)
        return self.pixels.index_select(0, index).permute(0, 3, 1, 2)

    def read(self, index: int) -> Tensor:
        if index in self.broken:
            raise BadImage(self.broken[index])
        return self.pixels[index].permute(2, 0, 1)


def on_device(source: Source, cache: Cache, device: torch.device, workers: int) -> Source:
    """The source of `cached`, whole on the training device if asked (`device`), or if left open (None) on a GPU where
    it takes no more than CACHE_SHARE of the free memory. Raises UserError if it is asked for and does not fit.

    All processes call it together, and each reads its share of the images by so many loader processes.
    """
    if cache not in ("device", None) or not isinstance(source, Cached) or (cache is None and device.type == "cpu"):
        return source
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    free, size = min(gather_objects(free)), source.pixels.numel()
    if size > free:
        if cache is None:
            return source
        raise UserError(
            f"data.cache=device: the {len(source)} images take {format_bytes(size)}, and {format_bytes(free)} of the "
            "device are free: use data.cache=ram."
        )
    if cache is None and size > CACHE_SHARE * free:
        return source
    broken = fill(source, workers)
    others = int((source.filled == 0).sum()) - len(broken)
    if others:
        say(
            f"data.cache={format_value(cache)}: {others} of {len(source)} images are not of "
            f"{'x'.join(map(str, source.shape))} as the others are, so images stay in the machine's memory instead of "
            "the device's."
        )
        return source
    return OnDevice(source.source, source.pixels.permute(0, 2, 3, 1).to(device), broken)


def fill(source: Cached, workers: int) -> dict[int, str]:
    """Read every image into the cache, by so many loader processes of each process. Returns why some could not be
    read, by number.

    Each process reads its share, and then what is not in its memory yet: nothing, where those of a machine share it.
    """
    place, places = rank(), world_size()
    parts = gather_objects(_fill(source, torch.arange(place, len(source), places), workers))
    broken = {number: reason for part in parts for number, reason in part.items()}
    missing = [number for number in (source.filled == 0).nonzero().flatten().tolist() if number not in broken]
    _fill(source, torch.tensor(missing, dtype=torch.int64), workers)
    return broken


def _fill(source: Cached, numbers: Tensor, workers: int) -> dict[int, str]:
    loader = DataLoader(
        _Reading(source, numbers), batch_size=64, num_workers=workers, collate_fn=list,
        worker_init_fn=ignore_in_worker, multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    broken, seen, began, said = {}, 0, time.perf_counter(), time.perf_counter()
    for part in loader:
        broken |= {number: reason for number, reason in part if reason is not None}
        seen += len(part)
        if time.perf_counter() - said > SAY_EVERY:
            said = time.perf_counter()
            say(f"read {seen} of {len(numbers)} images into memory, {seen / (said - began):.0f} images/s")
    return broken


class _Reading(Dataset):
    """(number, None or why it cannot be read); the image itself stays in the cache."""

    def __init__(self, source: Cached, numbers: Tensor) -> None:
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> tuple[int, str | None]:
        number = int(self.numbers[place])
        try:
            self.source.read(number)
        except BadImage as error:
            return number, str(error)
        return number, None
