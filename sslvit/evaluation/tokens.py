"""Frozen patch tokens of every image, in a file that may be larger than memory."""

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Source
from ..distributed import any_process, barrier, gather_objects, rank, say
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
    stored = gather_objects(_stored(record, path, content, shape))[0]
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
        if rank() == 0:
            record.write_text(json.dumps({**content, "read": stored}), encoding="utf-8")
        barrier()
    else:
        say(f"patch tokens of {source.name(0)} ... as computed before for these weights, {path}")
    if not stored:
        raise UserError(f"None of the {len(source)} images can be read, the first is {source.name(0)}.")
    values = np.memmap(path, np.float16, "r", shape=shape)
    return Tokens(values, torch.tensor(stored), len(source) - len(stored), temporary)


def _stored(record: Path, path: Path, content: dict[str, Any], shape: tuple[int, int, int]) -> list[int] | None:
    """The numbers of the readable images, if there is a complete file for these weights and images; else None."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        whole = path.stat().st_size == 2 * int(np.prod(shape))
    except (OSError, ValueError):
        return None
    read = found.pop("read", None) if isinstance(found, dict) else None
    return read if whole and found == content else None


def _create(path: Path, record: Path, shape: tuple[int, int, int]) -> None:
    """The first process makes an empty file of the right size. Raises UserError on every process."""
    size, problem = 2 * int(np.prod(shape)), None
    if rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
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
