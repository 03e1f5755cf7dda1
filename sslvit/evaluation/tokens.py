"""Frozen patch tokens of every image, in a file that may be larger than memory."""

import hashlib
import json
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import textfile
from ..data import Source, none_readable
from ..distributed import any_process, gather_objects, on_first_process, rank, say
from ..errors import UserError
from .feature_cache import digest, place_of
from .features import batches
from .frozen import Frozen


@dataclass
class Tokens:
    """Patch tokens of the readable images of a source, in its order, on disk."""

    values: np.ndarray  # [images of the source, N, D] float16, memory-mapped; rows of unreadable images are 0
    index: Tensor  # [M] int64, numbers of the readable images
    unreadable: int
    temporary: tempfile.TemporaryDirectory[str] | None = None  # of the file; it is deleted with this object

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """[B] numbers of images -> [B, N, D] float32."""
        return torch.from_numpy(self.values[numbers.numpy()]).float()


def patch_tokens(frozen: Frozen, source: Source, folder: Path | None) -> Tokens:
    """Patch tokens after the final norm, from a file in the folder, or computed by all processes into it. Without a
    folder the file is temporary. All processes must be able to open it. Raises UserError."""
    encoder, accelerator, config = frozen.vit(), frozen.accelerator, frozen.config
    h, w = encoder.grid()
    shape = (len(source), h * w, encoder.width)
    place = {"tokens": list(shape), **place_of(encoder, source, frozen.normalize, accelerator)}
    content = {"weights": digest(encoder), **place}
    temporary = None
    if folder is None:
        temporary = tempfile.TemporaryDirectory(prefix="sslvit_tokens_") if rank() == 0 else None
        folder = Path(gather_objects(temporary.name if temporary else "")[0])
    path = folder / f"{hashlib.sha256(json.dumps(place).encode()).hexdigest()[:16]}.tokens"
    record = path.with_suffix(".json")
    stored = gather_objects(_stored(record, path, content, shape) if rank() == 0 else None)[0]
    if stored is None:
        _create(path, record, shape)
        values = np.memmap(path, np.float16, "r+", shape=shape)
        done, broken = [], False
        for index, x in batches(encoder, source, frozen.normalize, accelerator, config.batch_size, config.workers):
            with torch.inference_mode(), accelerator.autocast():
                found = encoder(x).patches.to(torch.float16).cpu()
            broken |= not bool(torch.isfinite(found).all())
            values[index.numpy()] = found.numpy()
            done.append(index)
        values.flush()
        if any_process(broken):
            raise UserError(f"{frozen.subject.name} gives tokens that are not finite numbers of half precision.")
        stored = torch.cat(gather_objects(torch.cat([torch.empty(0, dtype=torch.long), *done]))).sort().values.tolist()
        on_first_process(partial(_keep, record, path, content, shape, stored))
    else:
        say(f"patch tokens of {source.name(0)} ... as computed before for these weights, {path}")
    if not stored:
        raise none_readable(source)
    values = np.memmap(path, np.float16, "r", shape=shape)
    tokens = Tokens(values, torch.tensor(stored), len(source) - len(stored), temporary)
    frozen.say_unreadable(source, tokens.index, tokens.unreadable)
    return tokens


def _stored(record: Path, path: Path, content: dict[str, Any], shape: tuple[int, int, int]) -> list[int] | None:
    """The numbers of the readable images, if there is a whole file for these weights and images; else None."""
    try:
        found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        read, checksum = found.pop("read"), found.pop("checksum")
        possible = read == sorted({number for number in read if type(number) is int and 0 <= number < shape[0]})
        same = possible and found == content and path.is_file() and path.stat().st_size == 2 * int(np.prod(shape))
        return read if same and checksum == _checksum(path, shape, read) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _checksum(path: Path, shape: tuple[int, int, int], read: list[int]) -> str:
    """Of the tokens and the numbers of the readable images."""
    tokens = np.memmap(path, np.float16, "r", shape=shape)
    return f"{zlib.crc32(tokens.data, zlib.crc32(json.dumps(read).encode())):08x}"


def _keep(record: Path, path: Path, content: dict[str, Any], shape: tuple[int, int, int], read: list[int]) -> None:
    """Write down what the file holds. Raises UserError."""
    try:
        textfile.write(record, json.dumps({**content, "read": read, "checksum": _checksum(path, shape, read)}))
    except OSError as error:
        raise UserError(f"The patch tokens cannot be written to {path}: {error.strerror}.") from error


def _create(path: Path, record: Path, shape: tuple[int, int, int]) -> None:
    """The first process makes an empty file of the right size. Raises UserError on every process."""
    size, problem = 2 * int(np.prod(shape)), None
    if rank() == 0:
        try:
            record.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free
            if size > 0.9 * free:
                problem = (
                    f"The patch tokens take {size / 1e9:.1f} GB, and {path.parent} has {free / 1e9:.1f} GB left: make "
                    "room, or use fewer images."
                )
            else:
                np.memmap(path, np.float16, "w+", shape=shape).flush()
        except OSError as error:
            problem = f"The patch tokens cannot be written to {path}: {error.strerror}."
    problem = gather_objects(problem)[0]
    if problem:
        raise UserError(problem)
    say(f"patch tokens of {shape[0]} images: {size / 2**20:,.0f} MiB in {path}")
