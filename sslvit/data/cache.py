"""Decoded images that stay in memory: the machine's, which all its processes share, or the training device's."""

import contextlib
import math
import mmap
import os
import platform
from functools import partial
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .. import rng
from ..arguments import format_value
from ..distributed import any_process, gather_objects, rank, say, world_size
from ..errors import UserError
from ..hardware import free_memory
from ..metrics import format_bytes
from ..progress import counting
from .config import Cache
from .sources import BadImage, Source, WrappedSource
from .sources.decode import MIN_SCALED
from .sources.source import Reduction
from .workers import compute

CACHE_SHARE = 0.25  # of the free memory, up to which images are kept by default
SAMPLE = 16  # images from whose sizes the memory for all images is estimated
ROOM = 1.2  # the buffer for images of several sizes is so many times larger than the estimate


class Cached(WrappedSource):
    """A source with images of one size and 8 bits, which stay in a shared buffer once they are read.

    An image of another size or depth is read each time.
    """

    def __init__(self, source: Source, shape: tuple[int, int, int], buffer: "SharedBuffer") -> None:
        """shape: [C, H, W] of the images. buffer: of `bytes_needed`."""
        super().__init__(source)
        self.shape, self.buffer = shape, buffer  # which must live as long as another process may open it
        size, (c, h, w) = len(source) * math.prod(shape), shape
        # Pixel by pixel, as decoders give colours and as crops are cut from them.
        self.pixels = buffer.bytes[:size].view(len(source), h, w, c).permute(0, 3, 1, 2)
        self.filled = buffer.bytes[size:]  # 1 for each image that is there

    def read(self, index: int) -> Tensor:
        if self.filled[index]:
            return self.pixels[index]
        image = self.source.read(index)
        if image.dtype == torch.uint8 and image.shape == self.shape:
            self.pixels[index] = image
            self.filled[index] = 1  # after the pixels, because another process may read them
        return image


class CachedMixed(WrappedSource):
    """A source with images of several sizes, or of more than 8 bits, which stay in a shared buffer once they are read,
    as long as there is room. Reading a scan or a photo takes ten times as long as cutting a small crop from it.

    Images so large that they may be read at a smaller scale are read each time: their pixels depend on the crop.
    """

    def __init__(self, source: Source, buffer: "SharedBuffer") -> None:
        super().__init__(source)
        self.buffer = buffer
        table = buffer.bytes[: _table_bytes(source)].view(torch.int64)
        self.used, self.rows = table[:1], table[1:].view(len(source), 5)  # of an image: start (0: none), kind, shape
        self.first = _table_bytes(source)

    def read(self, index: int) -> Tensor:
        kept = self._kept(index)
        return self._keep(index, self.source.read(index)) if kept is None else kept

    def read_smaller(self, index: int, reduction: Reduction) -> tuple[Tensor, tuple[int, int]]:
        image = self._kept(index)
        if image is None:
            image, size = self.source.read_smaller(index, reduction)
            return (self._keep(index, image) if image.shape[-2:] == size else image), size
        return image, (image.shape[-2], image.shape[-1])

    def _kept(self, index: int) -> Tensor | None:
        start, kind, c, h, w = self.rows[index].tolist()
        if not start:
            return None
        dtype = torch.float32 if kind % 2 else torch.uint8
        pixels = self.buffer.bytes[start : start + c * h * w * dtype.itemsize].view(dtype)
        return pixels.view(h, w, c).permute(2, 0, 1) if kind >= 2 else pixels.view(c, h, w)

    def _keep(self, index: int, image: Tensor) -> Tensor:
        """The same image, kept if there is room."""
        if not _stays(image):
            return image
        by_pixel = image.permute(1, 2, 0)
        last = by_pixel.is_contiguous()  # it is kept so, because torch rounds crops of the two orders differently
        content = (by_pixel if last else image).contiguous().flatten().view(torch.uint8)
        start = self._reserve(8 * -(-len(content) // 8))
        if start:
            self.buffer.bytes[start : start + len(content)] = content
            self.rows[index, 1:] = torch.tensor([2 * last + image.is_floating_point(), *image.shape])
            self.rows[index, 0] = start  # last, because another process may read it
        return image

    def _reserve(self, size: int) -> int:
        """Where this process may write so many bytes; 0 if there is no room."""
        import fcntl  # not on Windows, where no such source is made

        assert self.buffer.file is not None
        fcntl.lockf(self.buffer.file, fcntl.LOCK_EX)
        try:
            start = self.first + int(self.used)
            fits = start + size <= len(self.buffer.bytes)
            self.used += size if fits else 0
            return start if fits else 0
        finally:
            fcntl.lockf(self.buffer.file, fcntl.LOCK_UN)


def _table_bytes(source: Source) -> int:
    """Of the table of a CachedMixed."""
    return 8 * (1 + 5 * len(source))


def _stays(image: Tensor) -> bool:
    return image.shape[-2] * image.shape[-1] < MIN_SCALED


def bytes_needed(source: Source, shape: tuple[int, ...]) -> int:
    """The pixels of all images, and a byte for each that says whether it is there."""
    return len(source) * (math.prod(shape) + 1)


class SharedBuffer:
    """Bytes, zero at first, that processes of one machine share: forked ones, and those that open its `address`.

    On Linux it is memory without a name (memfd). It is gone with the last process that uses it, however that ends, and
    does not count against /dev/shm, which is small in containers. Other systems share it with forked processes only.
    Memory is taken page by page, as it is written.
    """

    def __init__(self, size: int, address: str | None = None) -> None:
        """address: of another process's buffer of this size. Raises OSError if it cannot be opened."""
        self.file: IO[bytes] | None = None
        if address:
            self.file = open(address, "r+b")  # noqa: SIM115
        else:
            with contextlib.suppress(AttributeError, OSError):  # a system that has no such memory
                self.file = os.fdopen(os.memfd_create("sslvit"), "r+b")
                self.file.truncate(max(1, size))
        descriptor = self.file.fileno() if self.file else -1
        self.bytes = torch.frombuffer(mmap.mmap(descriptor, max(1, size)), dtype=torch.uint8)[:size]

    def address(self) -> str | None:
        """What another process of this machine can open while this buffer lives; None if it cannot."""
        return f"/proc/{os.getpid()}/fd/{self.file.fileno()}" if self.file else None


def machine() -> str:
    """The same text for processes that can open one another's buffers: same machine, same start, same namespace."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{platform.node()} {started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()} {os.getpid()}"


class MemoryBudget:
    """How much the caches of this process may fill together.

    It is a share of the free memory, divided by the processes of the machine where they cannot share a buffer. A cache
    fills only as images are read, so each reserves its size when it is made.
    """

    def __init__(self) -> None:
        processes = 1 if hasattr(os, "memfd_create") else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.left = CACHE_SHARE * free_memory() / processes

    def reserve(self, size: int) -> bool:
        """Take this many bytes from the budget. False, and nothing is taken, if fewer are left."""
        fits = size <= self.left
        self.left -= size if fits else 0
        return fits


def cached(source: Source, cache: Cache, seed: int, budget: MemoryBudget) -> Source:
    """The source with its images in memory if `ram` or `device` asks for it, or, for None, if they fit the budget.

    All processes call it together.
    """
    if cache is False:
        return source
    shape, size = _shape_and_bytes(source, seed)
    buffer = SharedBuffer(size) if size and (budget.reserve(size) or cache is not None) else None
    if cache and not any_process(buffer is not None):
        say(
            f"data.cache={format_value(cache)} has no effect: images can be kept if all are of one size and 8 bits, or "
            f"on Linux if most have less than {MIN_SCALED:,} pixels."
        )
    elif cache == "device" and not shape:
        say("data.cache=device has no effect: it needs 8-bit images of one size. They stay in the machine's memory.")
    if world_size() > 1:
        buffer = _buffer_of_machine(buffer, size, cache)
    if not buffer or not (shape or buffer.file):  # without a file there is no lock
        return source
    return Cached(source, shape, buffer) if shape else CachedMixed(source, buffer)


def _buffer_of_machine(own: SharedBuffer | None, size: int, cache: Cache) -> SharedBuffer | None:
    """Of several processes, those of a machine share the buffer of the first of them, which decides."""
    offers = gather_objects((machine(), own is not None, own.address() if own else None, size))
    _, decided, address, size_of_first = next(offer for offer in offers if offer[0] == machine())
    if not decided or not size:
        return None
    if address and size_of_first == size and not (own and address == own.address()):
        try:
            return SharedBuffer(size, address)
        except OSError:  # a system that hides processes from one another: each has its own, if it was asked for
            if cache is None:
                return None
    return own or SharedBuffer(size)


def _shape_and_bytes(source: Source, seed: int) -> tuple[tuple[int, int, int] | None, int]:
    """[C, H, W] if a sample of the images has it in common and is of 8 bits, and the size of a buffer for all images;
    0 if there can be none."""
    shapes, sizes = set(), []
    for index in rng.permutation(rng.fold_in(seed, "sample"), len(source))[:SAMPLE].tolist():
        with contextlib.suppress(BadImage):
            image = source.read(index)
            shapes.add((*image.shape, image.dtype))
            sizes.append(image.nbytes if _stays(image) else 0)
    c, h, w, dtype = shapes.pop() if len(shapes) == 1 else (0, 0, 0, None)
    if dtype == torch.uint8:
        return (c, h, w), bytes_needed(source, (c, h, w))
    if 2 * sum(size > 0 for size in sizes) <= len(sizes) or not hasattr(os, "memfd_create"):
        return None, 0
    return None, _table_bytes(source) + int(ROOM * len(source) * sum(sizes) / len(sizes))


class OnDevice(WrappedSource):
    """Images of one size and 8 bits, all of them on the training device; `loader.make_loader` cuts them there."""

    def __init__(self, source: Source, pixels: Tensor, broken: dict[int, str]) -> None:
        """pixels: [N, H, W, C] uint8, on the device. broken: {index: why the image cannot be read}."""
        super().__init__(source)
        self.pixels, self.broken = pixels, broken

    def take(self, indices: Tensor) -> Tensor:
        """[B] int64 -> [B, C, H, W] uint8 on the device."""
        indices = indices.to(self.pixels.device, non_blocking=True)
        return self.pixels.index_select(0, indices).permute(0, 3, 1, 2)

    def read(self, index: int) -> Tensor:
        if index in self.broken:
            raise BadImage(self.broken[index])
        return self.pixels[index].permute(2, 0, 1)


def on_device(source: Source, cache: Cache, device: torch.device, workers: int) -> Source:
    """The source of `cached`, whole on the training device if `device` asks for it, or, for None, on a GPU if it takes
    no more than CACHE_SHARE of the free memory. Raises UserError if it is asked for and does not fit.

    All processes call it together. Each reads its share of the images with `workers` loader processes.
    """
    if cache not in ("device", None) or not isinstance(source, Cached) or (cache is None and device.type == "cpu"):
        return source
    return _on_device_if_it_fits(source, cache, device, workers)


def _on_device_if_it_fits(source: Cached, cache: Cache, device: torch.device, workers: int) -> Source:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    free, size = min(gather_objects(free)), source.pixels.numel()
    if cache == "device" and size > free:
        raise UserError(
            f"data.cache=device: the {len(source)} images take {format_bytes(size)}, and {format_bytes(free)} of the "
            "device are free: use data.cache=ram."
        )
    if cache is None and size > CACHE_SHARE * free:
        return source
    broken = _read_all(source, workers)
    others = int((source.filled == 0).sum()) - len(broken)
    if others:
        say(
            f"data.cache={format_value(cache)}: {others} of {len(source)} images are not of "
            f"{'x'.join(map(str, source.shape))} as the others are, so images stay in the machine's memory instead of "
            "the device's."
        )
        return source
    return OnDevice(source.source, source.pixels.permute(0, 2, 3, 1).to(device), broken)


def _read_all(source: Cached, workers: int) -> dict[int, str]:
    """Read every image into the cache. Returns {index: why the image cannot be read}.

    Each process reads its share, and then what is still missing: nothing, where the processes share the buffer.
    """
    share = torch.arange(rank(), len(source), world_size())
    broken = {i: reason for part in gather_objects(_read(source, share, workers)) for i, reason in part.items()}
    missing = [i for i in (source.filled == 0).nonzero().flatten().tolist() if i not in broken]
    _read(source, torch.tensor(missing, dtype=torch.int64), workers)
    return broken


def _read(source: Cached, indices: Tensor, workers: int) -> dict[int, str]:
    broken: dict[int, str] = {}
    with counting("reading into memory", len(indices)) as show:
        for n, part in enumerate(compute(partial(_read_some, source), indices.split(64), workers), 1):
            broken |= part
            show(min(64 * n, len(indices)))
    return broken


def _read_some(source: Cached, indices: Tensor) -> dict[int, str]:
    """{index: why the image cannot be read}. The images themselves stay in the cache."""
    broken = {}
    for index in indices.tolist():
        try:
            source.read(index)
        except BadImage as error:
            broken[index] = str(error)
    return broken
