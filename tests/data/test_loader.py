import multiprocessing
import os
import signal
import socket
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sslvit import rng
from sslvit.data import BadImage, Config, Source, cache, loader, open_source
from sslvit.data.cache import Cached, CachedMixed, MemoryBudget, SharedBuffer, cached, on_device
from sslvit.data.crops import Crop
from sslvit.data.loader import Layout, Order, make_loader
from sslvit.errors import UserError

VIEWS = {"image": [Crop((16, 16), (0.2, 1.0))]}
CPU = torch.device("cpu")


class Broken(Source):
    """A source of 37 images, some of which cannot be read."""

    classes, labels = [], None

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad
        self.reads = 0

    def __len__(self) -> int:
        return 37

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> torch.Tensor:
        self.reads += 1
        if index in self.bad:
            raise BadImage("broken on purpose")
        return torch.full((3, 20, 20), index, dtype=torch.uint8)


class Textured(Broken):
    def read(self, index: int) -> torch.Tensor:
        super().read(index)
        return torch.randint(0, 256, (3, 20, 20), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)


def texture(index: int) -> torch.Tensor:
    """An image of one of three sizes. It is uint8, stored pixel by pixel or channel by channel, or float32."""
    generator = torch.Generator().manual_seed(index)
    pixels = torch.randint(0, 256, (20, 20 + index % 3, 3), generator=generator, dtype=torch.uint8).permute(2, 0, 1)
    if index % 4 == 1:
        return pixels.contiguous()
    return pixels.float() / 3 if index % 4 == 2 else pixels


class Mixed(Broken):
    def read(self, index: int) -> torch.Tensor:
        super().read(index)
        return texture(index)


def order(layout: Layout, first: int = 0, last: int = 9, n: int = 37) -> list[tuple[int, list[int]]]:
    return [(epoch, index.tolist()) for epoch, index in Order(0, n, layout, first, last)]


@pytest.fixture(params=[False, True], ids=["listed", "computed"])
def listed_or_computed(request, monkeypatch):
    """The order of an epoch as a list, and as it is for sets too large for one."""
    if request.param:
        monkeypatch.setattr(loader, "MAX_LISTED", 0)


@pytest.mark.usefixtures("listed_or_computed")
def test_an_epoch_sees_each_image_at_most_once_and_epochs_differ():
    batches = order(Layout(8))
    epochs = [[i for epoch, index in batches if epoch == e for i in index] for e in range(3)]
    assert [len(seen) for seen in epochs] == [32, 32, 8]
    assert all(len(set(seen)) == len(seen) for seen in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.usefixtures("listed_or_computed")
def test_the_stream_is_the_same_for_every_layout_and_start():
    whole = order(Layout(8))
    by_micro = order(Layout(2, accumulate=4))
    assert [i for _, index in whole for i in index] == [i for _, index in by_micro for i in index]
    ranks = [order(Layout(2, accumulate=2, world_size=2, rank=r)) for r in range(2)]
    for step in range(9):
        together = [i for micro in range(2) for r in range(2) for i in ranks[r][2 * step + micro][1]]
        assert together == whole[step][1]
    assert order(Layout(8), first=5) == whole[5:]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_the_number_of_workers_or_the_start(images, workers):
    source = open_source(str(images), Config())
    plain = list(make_loader(source, VIEWS, Layout(8), 0, (0, 6), 0, CPU))
    other = list(make_loader(source, VIEWS, Layout(8), 0, (0, 6), workers, CPU))
    resumed = list(make_loader(source, VIEWS, Layout(8), 0, (3, 6), workers, CPU))
    for a, b in zip(plain + plain[3:], other + resumed, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["key"], b["key"])
    assert len(plain) == 6


def test_a_batch_of_large_images_is_cut_in_parts_to_the_same_crops(images, monkeypatch):
    """Else a batch of scans, or of small files that become large images, would fill the memory."""
    source = open_source(str(images), Config())
    views = {"image": [Crop((16, 16), (0.2, 1.0))] * 2, "local": [Crop((8, 8), (0.1, 0.3))] * 3}
    whole = loader.Cropped(source, views, 0)[0, torch.arange(7)]
    monkeypatch.setattr(loader, "MOST_DECODED", 2 * source.read(0).nbytes - 1)
    parts = loader.Cropped(source, views, 0)[0, torch.arange(7)]
    for name in ("key", "index", *views):
        assert torch.equal(whole[name], parts[name])
        assert whole[name].stride() == parts[name].stride()


def test_an_image_is_cropped_anew_in_every_epoch():
    source = Broken(set())
    keys = torch.cat([batch["key"] for batch in make_loader(source, VIEWS, Layout(8), 0, (0, 12), 0, CPU)])
    assert len(keys.unique()) == 96


def test_images_that_cannot_be_read_are_replaced_by_others_and_reported():
    batches = list(make_loader(Broken({3, 5, 30}), VIEWS, Layout(8), 0, (0, 12), 0, CPU))
    again = list(make_loader(Broken({3, 5, 30}), VIEWS, Layout(8), 0, (0, 12), 2, CPU))
    seen = torch.cat([batch["image"][0, :, 0, 0, 0] for batch in batches])
    assert len(seen) == 96
    assert not {3, 5, 30} & set(seen.tolist())
    assert {index for batch in batches for index, _ in batch["bad"]} == {3, 5, 30}
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batches, again, strict=True))


def test_a_source_without_a_readable_image_fails_instead_of_looping():
    batch = next(iter(make_loader(Broken(set(range(37))), VIEWS, Layout(8), 0, (0, 1), 0, CPU)))
    assert batch["failed"]
    assert len(batch["bad"]) >= 50


def test_the_cache_reads_each_image_once_and_workers_share_it():
    source = Broken({4})
    kept = Cached(source, (3, 20, 20), SharedBuffer(cache.bytes_needed(source, (3, 20, 20))))
    for _ in make_loader(kept, VIEWS, Layout(8), 0, (0, 12), 2, CPU):
        pass
    assert kept.filled.sum() >= 30  # filled by the workers, seen here
    source.reads = 0
    for index in kept.filled.nonzero().squeeze(1).tolist():
        assert torch.equal(kept.read(index), torch.full((3, 20, 20), index, dtype=torch.uint8))
    assert source.reads == 0
    with pytest.raises(BadImage):
        kept.read(4)


def test_the_cache_is_chosen_by_the_kinds_of_images_and_can_be_refused(images, capsys, monkeypatch):
    source = open_source(str(images), Config())
    assert isinstance(cached(source, None, 0, MemoryBudget()), Cached)
    mixed = Mixed(set())
    assert isinstance(cached(mixed, None, 0, MemoryBudget()), CachedMixed)
    for one in (source, mixed):
        assert cached(one, False, 0, MemoryBudget()) is one
    assert capsys.readouterr().out == ""
    assert isinstance(cached(mixed, "device", 0, MemoryBudget()), CachedMixed)
    assert "data.cache=device has no effect: it needs 8-bit images of one size" in capsys.readouterr().out
    monkeypatch.setattr(cache, "MIN_SCALED", 20 * 21)  # most are larger
    assert cached(mixed, None, 0, MemoryBudget()) is mixed
    assert cached(mixed, True, 0, MemoryBudget()) is mixed
    assert "data.cache=true has no effect: images can be kept if" in capsys.readouterr().out
    monkeypatch.undo()

    def refused(name: str) -> int:
        raise OSError("not here")

    monkeypatch.setattr(os, "memfd_create", refused, raising=False)
    assert cached(mixed, True, 0, MemoryBudget()) is mixed


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_the_cache_of_mixed_images_are_those_of_the_source(workers):
    source, views = Mixed({4}), {"image": [Crop((16, 16), (0.2, 1.0))] * 2}
    plain = list(make_loader(source, views, Layout(8), 0, (0, 12), 0, CPU))
    kept = cached(source, None, 0, MemoryBudget())
    for a, b in zip(plain, make_loader(kept, views, Layout(8), 0, (0, 12), workers, CPU), strict=True):
        assert torch.equal(a["image"], b["image"])
        assert a["bad"] == b["bad"]
    assert isinstance(kept, CachedMixed)
    there = kept.rows[:, 0].nonzero().squeeze(1).tolist()
    assert len(there) >= 34
    source.reads = 0
    for index in there:
        again, whole = kept.read_smaller(index, lambda h, w: 8)
        assert whole == again.shape[-2:]
        for image in (again, kept.read(index)):
            assert torch.equal(image, texture(index))
            assert (image.dtype, image.stride()) == (texture(index).dtype, texture(index).stride())
    assert source.reads == 0
    with pytest.raises(BadImage):
        kept.read(4)


def test_a_full_cache_of_mixed_images_and_large_images_are_read_each_time(monkeypatch):
    source = Mixed(set())
    room = sum(8 * -(-texture(index).nbytes // 8) for index in (7, 8, 9))
    kept = CachedMixed(source, SharedBuffer(cache._table_bytes(source) + room))
    for _ in range(2):
        assert all(torch.equal(kept.read(index), texture(index)) for index in (7, 8, 9, 10, 11))
    assert source.reads == 7
    monkeypatch.setattr(cache, "MIN_SCALED", 20 * 21)
    kept = CachedMixed(source, SharedBuffer(10**6))
    for index in range(37):
        kept.read(index)
    assert [bool(start) for start in kept.rows[:, 0]] == [index % 3 == 0 for index in range(37)]

    class Half(Mixed):  # as a JPEG of many pixels
        def read_smaller(self, index, reduction):
            return texture(index)[:, ::2, ::2], tuple(texture(index).shape[-2:])

    kept = CachedMixed(Half(set()), SharedBuffer(10**6))
    assert kept.read_smaller(3, lambda h, w: 2)[0].shape == (3, 10, 10)
    assert not kept.rows.any()


def test_all_caches_of_a_machine_share_one_memory(images, monkeypatch):
    source = open_source(str(images), Config())
    size = 37 * (3 * 40 * 36 + 1)
    monkeypatch.setattr(cache, "free_memory", lambda: int(2.5 * size / cache.CACHE_SHARE))
    memory = MemoryBudget()
    assert [isinstance(cached(source, None, 0, memory), Cached) for _ in range(3)] == [True, True, False]
    assert isinstance(cached(source, True, 0, memory), Cached)  # who asks for it gets it
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert isinstance(cached(source, None, 0, MemoryBudget()), Cached)  # its processes share it
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert cached(source, None, 0, MemoryBudget()) is source  # where they cannot


def _one_of_two(rank: int, port: int, say: Connection, dead: Event) -> None:
    """Reads its half of the images, and says how many it finds in memory after the other has read its own."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    source = Broken(set())
    kept = cached(source, "ram", 0, MemoryBudget())
    for index in range(rank, len(source), 2):
        kept.read(index)
    dist.barrier()
    source.reads = 0
    right = all(torch.equal(kept.read(i), torch.full((3, 20, 20), i, dtype=torch.uint8)) for i in range(len(source)))
    say.send(right and source.reads == 0)
    if rank == 0:  # whose memory it is
        signal.pause()
    dead.wait(60)
    say.send(all(kept.read(i)[0, 0, 0] == i for i in range(len(source))) and source.reads == 0)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")
def test_processes_of_a_machine_share_one_cache_and_one_that_is_killed_takes_nothing_away():
    before = set(os.listdir("/dev/shm"))
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, dead = [context.Pipe(duplex=False) for _ in range(2)], context.Event()
    both = [context.Process(target=_one_of_two, args=(rank, port, pipes[rank][1], dead)) for rank in range(2)]
    for process in both:
        process.start()
    for heard, _ in pipes:
        assert heard.poll(60)
        assert heard.recv()
    both[0].kill()
    both[0].join(30)
    dead.set()
    assert pipes[1][0].poll(60)
    assert pipes[1][0].recv()
    both[1].join(30)
    assert [process.exitcode for process in both] == [-signal.SIGKILL, 0]
    assert {name for name in set(os.listdir("/dev/shm")) - before if "sslvit" in name} == set()


def test_a_cache_without_memory_that_has_a_number_is_that_of_forked_processes(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    kept = cached(Broken(set()), "ram", 0, MemoryBudget())
    for _ in make_loader(kept, VIEWS, Layout(8), 0, (0, 12), 2, CPU):
        pass
    assert kept.filled.sum() >= 30


def test_keys_are_those_of_seed_epoch_and_image():
    batch = next(iter(make_loader(Broken(set()), VIEWS, Layout(8), 5, (4, 5), 0, CPU)))
    expected = [int(rng.fold_in(5, "image", 1, int(i))) for i in batch["index"]]
    assert batch["key"].tolist() == expected
    assert np.all(batch["index"].numpy() < 37)


def on_the_device(source: Broken, workers: int = 2) -> cache.OnDevice:
    """On the CPU here, where it has to be asked for."""
    found = on_device(cached(source, "device", 0, MemoryBudget()), "device", CPU, workers)
    assert isinstance(found, cache.OnDevice)
    return found


@pytest.mark.parametrize("bad", [set(), {3, 5, 30}])
def test_batches_cut_on_the_device_are_those_of_loader_processes(bad):
    source = Textured(bad)
    views = {"image": [Crop((16, 16), (0.2, 1.0))] * 2}
    plain = list(make_loader(source, views, Layout(4, 2), 0, (0, 9), 0, CPU))
    resident = list(make_loader(on_the_device(source), views, Layout(4, 2), 0, (0, 9), 0, CPU))
    resumed = list(make_loader(on_the_device(source), views, Layout(4, 2), 0, (5, 9), 0, CPU))
    assert len(resident) == 18
    for a, b in zip(plain + plain[10:], resident + resumed, strict=True):
        assert torch.equal(a["key"], b["key"])
        assert torch.equal(a["index"], b["index"])
        assert [tuple(found) for found in a["bad"]] == b["bad"]
        assert a["image"].shape == b["image"].shape
        assert (a["image"].int() - b["image"].int()).abs().max() <= 2


def test_a_source_of_broken_images_fails_on_the_device_too():
    batch = next(iter(make_loader(on_the_device(Broken(set(range(1, 37)))), VIEWS, Layout(8), 0, (0, 1), 0, CPU)))
    assert batch.get("failed") or set(batch["index"].tolist()) == {0}


def test_the_device_keeps_images_only_if_it_has_room_and_they_are_alike(monkeypatch, capsys):
    class Mixed(Broken):
        def read(self, index: int) -> torch.Tensor:
            return torch.zeros(3, 20, 21 if index == odd else 20, dtype=torch.uint8)

    sampled = set(rng.permutation(rng.fold_in(0, "sample"), 37)[:16].tolist())
    odd = min(set(range(37)) - sampled)
    kept = cached(Mixed(set()), "device", 0, MemoryBudget())
    assert on_device(kept, "device", CPU, 0) is kept
    assert "1 of 37 images are not of 3x20x20" in capsys.readouterr().out
    kept = cached(Broken(set()), "device", 0, MemoryBudget())
    assert on_device(kept, None, CPU, 0) is kept  # on a CPU only who asks for it
    assert on_device(kept, "ram", CPU, 0) is kept
    monkeypatch.setattr(cache, "free_memory", lambda: 37 * 20 * 20 * 3 - 1)
    with pytest.raises(UserError, match=r"cache=device: the 37 images take .* use data\.cache=ram"):
        on_device(kept, "device", CPU, 0)


def _device_of_two(rank: int, port: int, say: Connection) -> None:
    """Reads its share of the images, and says how many it read and whether it has them all."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    source = Broken({4})
    kept = cached(source, "device", 0, MemoryBudget())
    source.reads = 0
    resident = on_device(kept, "device", CPU, 0)
    right = all(int(resident.read(i)[0, 0, 0]) == i for i in range(37) if i != 4)
    say.send((right, resident.broken, source.reads))


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")
def test_processes_of_a_machine_read_each_image_once_for_the_device():
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    both = [context.Process(target=_device_of_two, args=(rank, port, pipes[rank][1])) for rank in range(2)]
    for process in both:
        process.start()
    told = [heard.recv() if heard.poll(60) else None for heard, _ in pipes]
    for process in both:
        process.join(30)
    assert [(right, broken) for right, broken, _ in told] == [(True, {4: "broken on purpose"})] * 2
    assert sum(reads for _, _, reads in told) <= 37
