"""Frozen features: each image passes the encoder once, on any number of processes."""

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..augment import Normalize
from ..data import BadImage, Source
from ..distributed import any_process, barrier, gather_objects, rank, say, world_size
from ..encoder import Encoder, Pool
from ..errors import UserError
from ..hardware import default_workers
from ..stopping import ignore_in_worker
from ..views import centre

CROP_RATIO = 224 / 256  # the published evaluation resizes to 256 and cuts the central 224
SAY_EVERY = 20  # seconds between lines of progress
BLOCK = 2**14  # features of a process that are passed to the others at once


@dataclass
class Features:
    """Features of the readable images of a source, or of the share of them that one process holds, in the source's
    order."""

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
        """Bring the values to unit length in place: a bank of a million needs no second copy."""
        for rows in self.values.split(65536):
            F.normalize(rows, dim=1, out=rows)
        return self


class Centred(Dataset):
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
    encoder: Encoder, source: Source, normalize: Normalize, accelerator: Accelerator, batch_size: int,
    workers: int | None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """(numbers [B], normalised images [B, C, H, W] on the device) of this process's readable images, with the encoder
    in evaluation mode while it lasts, and a line of progress now and then."""
    device = accelerator.device
    loader = DataLoader(
        Centred(source, share(source), encoder.image_size),
        batch_size=batch_size,
        num_workers=default_workers(device) if workers is None else workers,
        collate_fn=_collate,
        worker_init_fn=ignore_in_worker,
        multiprocessing_context="fork" if workers != 0 and default_workers(device) else None,
    )
    was_training = encoder.training
    encoder.eval()
    seen, began, said = 0, time.perf_counter(), time.perf_counter()
    try:
        for index, images, failed in loader:
            seen += len(index) + failed
            if len(index):
                yield index, normalize(images.to(device, non_blocking=True).float() / 255)
            if time.perf_counter() - said > SAY_EVERY:
                said = time.perf_counter()
                done = min(seen * world_size(), len(source))
                say(f"features of {done} of {len(source)} images, {done / (said - began):.0f} images/s")
    finally:
        encoder.train(was_training)


def extract(
    encoder: Encoder, source: Source, normalize: Normalize, accelerator: Accelerator, pools: Sequence[Pool],
    batch_size: int = 256, workers: int | None = None, whole: bool = True, scratch: Path | None = None,
) -> dict[Pool, Features]:  # fmt: skip
    """Features of all images of a source, by each way of pooling, from one pass. Every process computes its share and
    gets the whole, or with `whole=False` keeps its share: images rank, rank + world size, ... Raises UserError.

    scratch: a folder for what would else be in memory until it is whole.
    """
    mine = share(source)
    values = {pool: room_for(len(mine), encoder.feature_dim(pool), scratch) for pool in pools}
    numbers, done = torch.empty_like(mine), 0
    for index, x in batches(encoder, source, normalize, accelerator, batch_size, workers):
        # Blocks that were compiled for training are not compiled again for these shapes.
        with torch.inference_mode(), accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            for pool, pooled in encoder.pooled(x, pools).items():
                values[pool][done : done + len(index)] = pooled
        numbers[done : done + len(index)] = index
        done += len(index)
    total = sum(gather_objects(done))
    if not total:
        raise UserError(f"None of the {len(source)} images can be read, the first is {source.name(0)}.")
    for value in values.values():
        check_finite(value[:done], getattr(encoder, "architecture", "the encoder"))
    found = {
        pool: _features(value[:done], numbers[:done], source, len(source) - total) for pool, value in values.items()
    }
    return {pool: gathered(part) for pool, part in found.items()} if whole else found


def room_for(rows: int, width: int, folder: Path | None) -> Tensor:
    """[rows, width] float32 to be filled: in a nameless file of the folder, which the system takes out of memory when
    that is short; or in memory, if there is no folder or no room in it."""
    if folder is not None and rows and hasattr(os, "posix_fallocate"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, 4 * rows * width)  # now: a full disk would kill the process later
                return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(rows, width)))
        except OSError:
            pass
    return torch.empty(rows, width)


def _features(values: Tensor, index: Tensor, source: Source, unreadable: int) -> Features:
    labels = torch.full_like(index, -1) if source.labels is None else torch.from_numpy(source.labels)[index]
    return Features(values, labels, source.classes, index, unreadable)


def gathered(part: Features, everywhere: bool = True) -> Features | None:
    """The whole from each process's share, on every process, or on the first alone and None on the others. All call it,
    and it passes them in blocks, so that nobody holds much more than the whole once."""
    if world_size() == 1:
        return part
    wanted = everywhere or rank() == 0
    index = torch.cat(gather_objects(part.index)).sort().values
    values = torch.empty(len(index), part.values.shape[1]) if wanted else None
    labels = torch.empty_like(index)
    for start in range(0, max(gather_objects(len(part))), BLOCK):
        rows = slice(start, start + BLOCK)
        # Copies, as pickling a part of a tensor takes all of it along.
        parts = gather_objects([of_part[rows].clone() for of_part in (part.index, part.labels, part.values)])
        for numbers, its_labels, its_values in parts if wanted else ():
            places = torch.searchsorted(index, numbers)
            values[places], labels[places] = its_values, its_labels
    return replace(part, values=values, labels=labels, index=index) if wanted else None


def extract_cached(
    folder: Path | None, encoder: Encoder, source: Source, normalize: Normalize, accelerator: Accelerator,
    pools: Sequence[Pool], batch_size: int, workers: int | None, whole: bool = True,
) -> dict[Pool, Features]:  # fmt: skip
    """`extract`, or what it gave before for the same weights, images and protocol, from files in the folder.

    Each process writes its share to a file of its own, `<protocol>.<process>-<number of processes>.safetensors`, so
    that none has to hold the whole; any number of processes can read them. Features of other weights replace them, and
    files that cannot be read are made again.
    """
    if folder is None:
        return extract(encoder, source, normalize, accelerator, pools, batch_size, workers, whole)
    place = place_of(encoder, source, normalize, accelerator)
    common = {"weights": digest(encoder), **{key: json.dumps(value) for key, value in place.items()}}
    keys, found = {}, {}
    for pool in pools:
        keys[pool] = hashlib.sha256(json.dumps(place | {"pool": pool}).encode()).hexdigest()[:16]
        stored = _read(folder, keys[pool], common | {"pool": pool}, source)
        if not any_process(stored is None):
            found[pool] = stored
    missing = [pool for pool in pools if pool not in found]
    if missing:
        fresh = extract(encoder, source, normalize, accelerator, missing, batch_size, workers, False, folder)
    else:
        say(f"features of {source.name(0)} ... as computed before for these weights, {folder}")
    for pool in missing:
        content, part = common | {"pool": pool}, fresh.pop(pool)
        _write(folder, keys[pool], content, part)
        stored = _read(folder, keys[pool], content, source)  # read as they are used, and not in memory until then
        found[pool] = part if any_process(stored is None) else stored
    return {pool: gathered(found[pool]) if whole else found[pool] for pool in pools}


def place_of(encoder: Encoder, source: Source, normalize: Normalize, accelerator: Accelerator) -> dict[str, Any]:
    """What features depend on beside the weights and the pooling."""
    return {
        "images": source.fingerprint(),
        "where": where(source),
        "value_range": getattr(source, "value_range", None),
        "architecture": [getattr(encoder, name, None) for name in ("architecture", "model_args", "in_chans")],
        "image_size": list(encoder.image_size),
        "normalize": [list(normalize.mean), list(normalize.std)],
        "precision": accelerator.mixed_precision,
        "crop_ratio": CROP_RATIO,
    }


def where(source: Source) -> str:
    """The place of the first image: two sets of like files, as training and test images unpacked from one archive, may
    have one fingerprint."""
    name = Path(source.name(0))
    return str(name.resolve()) if name.exists() else str(name)


def same_images(a: Source, b: Source) -> bool:
    return a is b or (len(a) == len(b) and where(a) == where(b) and a.fingerprint() == b.fingerprint())


def check_finite(values: Tensor, name: str) -> None:
    """[N, ...]: all processes call it with theirs. Raises UserError on all of them, as a search among numbers that are
    none finds something all the same."""
    broken = sum(gather_objects(int((~torch.isfinite(values.flatten(1)).all(dim=1)).sum())))
    if broken:
        raise UserError(
            f"{name} gives {broken} images features that are not finite numbers: its weights are broken, or try "
            "precision=float32."
        )


def _parts(folder: Path, key: str) -> dict[int, list[Path]]:
    """{number of processes: files that as many wrote}."""
    parts: dict[int, list[Path]] = {}
    for path in sorted(folder.glob(f"{key}.*-*.safetensors")):
        match = re.fullmatch(rf"{key}\.(\d+)-(\d+)\.safetensors", path.name)
        if match:
            parts.setdefault(int(match[2]), []).append(path)
    return parts


def _read(folder: Path, key: str, content: dict[str, str], source: Source) -> Features | None:
    """This process's share, from whole and matching files of however many processes; None if there are none."""
    for count, paths in _parts(folder, key).items():
        if len(paths) != count:
            continue
        try:
            parts = []
            for path in paths:
                with safe_open(path, "pt") as file:
                    if file.metadata() != content | {"images_read": file.metadata().get("images_read", "")}:
                        return None
                    total, numbers = int(file.metadata()["images_read"]), file.get_tensor("index")
                    mine, stored = numbers % world_size() == rank(), file.get_tensor("values")
                    parts.append((stored, numbers) if mine.all() else (stored[mine], numbers[mine]))
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        return _features(*_joined(parts), source, len(source) - total)
    return None


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """([n, D] values, [n] numbers of images) of several files -> of all, in the order of the numbers; of one file where
    they lie in it, which the system reads as they are used."""
    if len(parts) == 1:
        return parts[0]
    index = torch.cat([numbers for _, numbers in parts]).sort().values
    joined = torch.empty(len(index), parts[0][0].shape[1])
    for values, numbers in parts:
        joined[torch.searchsorted(index, numbers)] = values
    return joined, index


def _write(folder: Path, key: str, content: dict[str, str], features: Features) -> None:
    """This process's share; the files of other runs of the same protocol go, when all processes have written."""
    path = folder / f"{key}.{rank()}-{world_size()}.safetensors"
    part = path.with_suffix(".part")
    total, problem = sum(gather_objects(len(features))), None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        part.touch()
        mode = part.stat().st_mode  # of other files: safetensors' own is for the owner only
        tensors = {"values": features.values.contiguous(), "index": features.index.contiguous()}
        save_file(tensors, part, content | {"images_read": str(total)})
        part.chmod(mode)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        problem = f"The features are not kept for next time: {path}: {error}."
        part.unlink(missing_ok=True)
    problem = next((one for one in gather_objects(problem) if one), None)
    if problem:
        say(problem)
        return
    if rank() == 0:
        for count, paths in _parts(folder, key).items():
            for old in paths if count != world_size() else []:
                old.unlink(missing_ok=True)
    barrier()


def digest(encoder: Encoder) -> str:
    """SHA-256 of the names and values of all weights."""
    digest = hashlib.sha256()
    for name, value in encoder.model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _collate(items: list[tuple[int, Tensor | None]]) -> tuple[Tensor, Tensor | None, int]:
    good = [(number, image) for number, image in items if image is not None]
    images = torch.stack([image for _, image in good]) if good else None
    return torch.tensor([number for number, _ in good], dtype=torch.long), images, len(items) - len(good)


def same_classes(train: Source, test: Source, names: tuple[str, str]) -> Tensor:
    """[classes of test] int64: the training set's number of each, by name. Raises UserError."""
    for source, name in ((train, names[0]), (test, names[1])):
        if source.labels is None or (source.labels < 0).all():
            raise UserError(
                f"{name} has no labels: evaluation needs one folder a class, <folder>/<class>/<image>, "
                "or a labelled set by name."
            )
    if len(np.unique(train.labels[train.labels >= 0])) < 2:
        raise UserError(f"{names[0]} has images of one class only: telling classes apart needs two or more.")
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        raise UserError(
            f"{names[1]} has classes that {names[0]} has not: {', '.join(unknown[:5])}{' ...' * (len(unknown) > 5)}. "
            f"{names[0]} has {', '.join(train.classes[:5])}{' ...' * (len(train.classes) > 5)}."
        )
    number = {name: i for i, name in enumerate(train.classes)}
    return torch.tensor([number[name] for name in test.classes])


def check_read(train: Tensor, test: Tensor, names: tuple[str, str]) -> None:
    """[N], [M] labels of the images that this process has read: all processes call it. Raises UserError on all of them
    if too few are left to learn from or to judge by."""
    classes = set().union(*gather_objects(set(train[train >= 0].tolist())))
    if len(classes) < 2:
        raise UserError(
            f"The labelled images of {names[0]} that can be read are of {len(classes)} classes: two are needed."
        )
    if not sum(gather_objects(int((test >= 0).sum()))):
        raise UserError(f"None of the labelled images of {names[1]} can be read.")


def renumbered(labels: Tensor, numbers: Tensor) -> Tensor:
    """[N] int64 labels, -1 for none -> the same images by other numbers of their classes."""
    return torch.where(labels >= 0, numbers[labels.clamp(min=0)], -1)
