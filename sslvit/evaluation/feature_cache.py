"""Features kept in files for the next evaluation of the same weights and images."""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints import tensorfile
from ..data import Source
from ..data.augment import Normalize
from ..distributed import any_process, barrier, gather_objects, rank, say, world_size
from ..model.encoder import Encoder, Pool
from ..pretrained import Pixels
from .features import CROP_RATIO, Features, extract, gather_features, label_features


def extract_cached(
    folder: Path | None, encoder: Encoder | Pixels, source: Source, normalize: Normalize, accelerator: Accelerator,
    pools: Sequence[Pool], batch_size: int, workers: int | None, whole: bool = True,
) -> dict[Pool, Features]:  # fmt: skip
    """Like `extract`, but reads features of the same weights, images and protocol from files in the folder, and writes
    those that it computes there. None: computes all and writes nothing.

    Each process writes its share to a file of its own, `<protocol>.<process>-<number of processes>.safetensors`, so no
    process has to hold the whole. Any number of processes can read them. Features of other weights replace them, and
    files that cannot be read are written again.
    """
    if folder is None or isinstance(encoder, Pixels):
        return extract(encoder, source, normalize, accelerator, pools, batch_size, workers, whole)
    place = place_of(encoder, source, normalize, accelerator)
    common = {"weights": digest(encoder), **{key: json.dumps(value) for key, value in place.items()}}
    contents = {pool: common | {"pool": pool, "width": str(encoder.feature_dim(pool))} for pool in pools}
    keys = {pool: hashlib.sha256(json.dumps(place | {"pool": pool}).encode()).hexdigest()[:16] for pool in pools}

    def read(pool: Pool) -> Features | None:
        """The stored features, if all processes have them. They are memory-mapped: read from the disk when used."""
        part = _read(folder, keys[pool], contents[pool], source)
        return None if any_process(part is None) else part

    found = {pool: part for pool in pools if (part := read(pool)) is not None}
    missing = [pool for pool in pools if pool not in found]
    if missing:
        fresh = extract(encoder, source, normalize, accelerator, missing, batch_size, workers, False, folder)
    else:
        say(f"features of {source.name(0)} ... as computed before for these weights, {folder}")
    for pool in missing:
        part = fresh.pop(pool)
        _write(folder, keys[pool], contents[pool], part)
        stored = read(pool)
        found[pool] = part if stored is None else stored
    return {pool: gather_features(found[pool]) if whole else found[pool] for pool in pools}


def place_of(
    encoder: Encoder | Pixels, source: Source, normalize: Normalize, accelerator: Accelerator
) -> dict[str, Any]:
    """What features depend on, except for the weights and the pooling."""
    return {
        "images": source.fingerprint(),
        "where": where(source),
        "value_range": source.value_range,
        "architecture": [getattr(encoder, name, None) for name in ("architecture", "model_args", "in_chans")],
        "image_size": list(encoder.image_size),
        "normalize": [list(normalize.mean), list(normalize.std)],
        "precision": accelerator.mixed_precision,
        "crop_ratio": CROP_RATIO,
    }


def where(source: Source) -> str:
    """The place of the first image. Two sets may have equal fingerprints, such as training and test images of equal
    names, sizes and times that were unpacked from one archive."""
    name = Path(source.name(0))
    return str(name.resolve()) if name.exists() else str(name)


def same_images(a: Source, b: Source) -> bool:
    return a is b or (len(a) == len(b) and where(a) == where(b) and a.fingerprint() == b.fingerprint())


def _parts(folder: Path, key: str) -> dict[int, dict[int, Path]]:
    """{number of processes: {number of a process: its file}}."""
    parts: dict[int, dict[int, Path]] = {}
    for path in folder.glob(f"{key}.*-*.safetensors"):
        match = re.fullmatch(rf"{key}\.(\d+)-(\d+)\.safetensors", path.name)
        if match and path.is_file():
            parts.setdefault(int(match[2]), {})[int(match[1])] = path
    return parts


def _read(folder: Path, key: str, content: dict[str, str], source: Source) -> Features | None:
    """This process's share, from complete and matching files of any number of processes. None if there are none, or if
    one of them is not what was written."""
    for count, paths in _parts(folder, key).items():
        if len(paths) != count or max(paths) >= count:
            continue
        parts, total = [], 0
        for number, path in paths.items():
            try:
                with safe_open(path, "pt") as file:
                    found, values, index = file.metadata(), file.get_tensor("values"), file.get_tensor("index")
            except (OSError, SafetensorError):
                return None
            if not _possible(values, index, int(content["width"]), len(source), number, count):
                return None
            here = index % world_size() == rank()
            # Of files that hold nothing of this process's share, others look at the checksum.
            if here.any() and found != content | {"checksum": _checksum(values, index)}:
                return None
            parts.append((values, index) if here.all() else (values[here], index[here]))
            total += len(index)
        return label_features(*_joined(parts), source, len(source) - total)
    return None


def _possible(values: Tensor, index: Tensor, width: int, images: int, number: int, count: int) -> bool:
    """Whether these can be the features of images number, number + count, ... of a source, or of some of them."""
    return (
        index.dtype == torch.int64 and index.ndim == 1
        and values.dtype == torch.float32 and values.shape == (len(index), width)
        and bool((index % count == number).all())
        and bool((index.diff(prepend=index.new_tensor([-1]), append=index.new_tensor([images])) > 0).all())
    )  # fmt: skip


def _checksum(values: Tensor, index: Tensor) -> str:
    """Of the bytes of both: a disk or a network may change some without a word."""
    return f"{zlib.crc32(index.numpy().data, zlib.crc32(values.numpy().data)):08x}"


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """([n, D] values, [n] numbers of images) of several files -> of all, in the order of the numbers. Those of a single
    file stay memory-mapped."""
    if len(parts) == 1:
        return parts[0]
    index = torch.cat([numbers for _, numbers in parts]).sort().values
    joined = torch.empty(len(index), parts[0][0].shape[1])
    for values, numbers in parts:
        joined[torch.searchsorted(index, numbers)] = values
    return joined, index


def _write(folder: Path, key: str, content: dict[str, str], features: Features) -> None:
    """Write this process's share. When all processes have written theirs, older files of the same protocol from other
    numbers of processes are deleted."""
    path = folder / f"{key}.{rank()}-{world_size()}.safetensors"
    part = path.with_suffix(".part")
    values, index, problem = features.values.contiguous(), features.index.contiguous(), None
    try:
        tensorfile.write({"values": values, "index": index}, part, content | {"checksum": _checksum(values, index)})
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        problem = f"The features are not kept for the next evaluation: {path}: {error}."
        part.unlink(missing_ok=True)
    problem = next((one for one in gather_objects(problem) if one), None)
    if problem:
        say(problem)
        return
    if rank() == 0:
        for count, paths in _parts(folder, key).items():
            for old in paths.values() if count != world_size() else []:
                old.unlink(missing_ok=True)
    barrier()


def digest(encoder: Encoder) -> str:
    """SHA-256 of the names and values of all weights."""
    sha = hashlib.sha256()
    for name, value in encoder.model.state_dict().items():
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()
