"""Frozen features: each image passes the encoder once, on any number of processes."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..augment import Normalize
from ..data import BadImage, Source
from ..distributed import any_process, gather_objects, rank, say
from ..encoder import Encoder, Pool
from ..errors import UserError
from ..hardware import default_workers
from ..stopping import ignore_in_worker
from ..views import centre

CROP_RATIO = 224 / 256  # the published evaluation resizes to 256 and cuts the central 224


@dataclass
class Features:
    """Features of the readable images of a source, in its order."""

    values: Tensor  # [N, D] float32 on the CPU
    labels: Tensor  # [N] int64, -1 where an image has none
    classes: list[str]
    index: Tensor  # [N] int64, numbers of the images in the source
    unreadable: int = 0

    def __len__(self) -> int:
        return len(self.values)

    def normalized(self) -> Tensor:
        return F.normalize(self.values, dim=1)


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


@torch.inference_mode()
def extract(
    encoder: Encoder,
    source: Source,
    normalize: Normalize,
    accelerator: Accelerator,
    pool: Pool | None = None,
    batch_size: int = 256,
    workers: int | None = None,
) -> Features:
    """Features of all images of a source. Every process computes its share and gets the whole."""
    device = accelerator.device
    mine = torch.arange(accelerator.process_index, len(source), accelerator.num_processes)
    loader = DataLoader(
        Centred(source, mine, encoder.image_size),
        batch_size=batch_size,
        num_workers=default_workers(device) if workers is None else workers,
        collate_fn=_collate,
        worker_init_fn=ignore_in_worker,
        multiprocessing_context="fork" if workers != 0 and default_workers(device) else None,
    )
    was_training = encoder.training
    encoder.eval()
    values, numbers, unreadable = [], [], 0
    for index, images, failed in loader:
        unreadable += failed
        if len(index):
            x = normalize(images.to(device, non_blocking=True).float() / 255)
            # Blocks that were compiled for training are not compiled again for these shapes.
            with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                values.append(encoder.features(x, pool).float().cpu())
            numbers.append(index)
    encoder.train(was_training)
    width = encoder.feature_dim(pool)
    part = (
        torch.cat([torch.zeros(0, width), *values]),
        torch.cat([torch.zeros(0, dtype=torch.long), *numbers]),
        unreadable,
    )
    parts = gather_objects(part)
    index = torch.cat([p[1] for p in parts])
    order = index.argsort()
    if not len(index):
        raise UserError(f"None of the {len(source)} images can be read, the first is {source.name(0)}.")
    index = index[order]
    labels = torch.full_like(index, -1) if source.labels is None else torch.from_numpy(source.labels)[index]
    return Features(torch.cat([p[0] for p in parts])[order], labels, source.classes, index, sum(p[2] for p in parts))


def extract_cached(
    folder: Path | None,
    encoder: Encoder,
    source: Source,
    normalize: Normalize,
    accelerator: Accelerator,
    pool: Pool,
    batch_size: int,
    workers: int | None,
) -> Features:
    """`extract`, or what it gave before for the same weights, images and protocol, from a file in the folder.

    One file for each set and protocol: features of other weights replace it. A file that cannot be read is made again.
    """
    if folder is None:
        return extract(encoder, source, normalize, accelerator, pool, batch_size, workers)
    place = {
        "images": source.fingerprint(),
        "pool": pool,
        "image_size": list(encoder.image_size),
        "normalize": [list(normalize.mean), list(normalize.std)],
        "precision": accelerator.mixed_precision,
        "crop_ratio": CROP_RATIO,
    }
    path = folder / f"{hashlib.sha256(json.dumps(place).encode()).hexdigest()[:16]}.safetensors"
    content = {"weights": digest(encoder), **{key: json.dumps(value) for key, value in place.items()}}
    stored = _read(path, content, source)
    if not any_process(stored is None):
        say(f"features of {source.name(0)} ... as computed before for these weights, {path}")
        return stored
    features = extract(encoder, source, normalize, accelerator, pool, batch_size, workers)
    if rank() == 0:
        tensors = {"values": features.values, "labels": features.labels, "index": features.index}
        part = path.with_suffix(".part")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in tensors.items()}, part, content)
            os.replace(part, path)
        except (OSError, SafetensorError) as error:
            say(f"The features are not kept for next time: {path}: {error}.")
            part.unlink(missing_ok=True)
    return features


def _read(path: Path, content: dict[str, str], source: Source) -> Features | None:
    try:
        with safe_open(path, "pt") as file:
            if file.metadata() != content:
                return None
            values, labels, index = (file.get_tensor(name) for name in ("values", "labels", "index"))
    except (OSError, SafetensorError):
        return None
    return Features(values, labels, source.classes, index, len(source) - len(index))


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


def align_labels(train: Features, test: Features, names: tuple[str, str]) -> tuple[Tensor, Tensor, list[str]]:
    """Labels of both sets by the training set's class names, and these names. Raises UserError."""
    for features, name in ((train, names[0]), (test, names[1])):
        if not features.classes or (features.labels < 0).all():
            raise UserError(
                f"{name} has no labels: evaluation needs one folder a class, <folder>/<class>/<image>, "
                "or a labelled set by name."
            )
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        raise UserError(
            f"{names[1]} has classes that {names[0]} has not: {', '.join(unknown[:5])}{' ...' * (len(unknown) > 5)}. "
            f"{names[0]} has {', '.join(train.classes[:5])}{' ...' * (len(train.classes) > 5)}."
        )
    number = {name: i for i, name in enumerate(train.classes)}
    mapping = torch.tensor([number[name] for name in test.classes])
    test_labels = torch.where(test.labels >= 0, mapping[test.labels.clamp(min=0)], -1)
    return train.labels, test_labels, train.classes
