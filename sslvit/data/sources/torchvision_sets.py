"""CIFAR-10, CIFAR-100 and STL-10 by name, through torchvision: downloaded once, where there is a network."""

import hashlib
import os
from typing import Any

import numpy as np
import torch
import torchvision.datasets
from torch import Tensor

from ...errors import UserError
from ..config import Config
from .files import SAMPLE
from .pixels import from_array
from .source import Source

SPLITS: dict[str, dict[str, dict[str, Any]]] = {
    "cifar10": {"train": {"train": True}, "test": {"train": False}},
    "cifar100": {"train": {"train": True}, "test": {"train": False}},
    "stl10": {split: {"split": split} for split in ("train", "test", "unlabeled", "train+unlabeled")},
}
CLASSES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}


class TorchvisionSet(Source):
    """One split of a set, held in memory as torchvision does: [N, H, W, 3] uint8."""

    def __init__(self, name: str, split: str, config: Config) -> None:
        if config.in_chans not in (1, 3):
            raise UserError(f"data: {name} has colour images, and data.in_chans={config.in_chans}: use 3 or 1.")
        self.title, self.in_chans = f"{name}:{split}", config.in_chans
        make = getattr(torchvision.datasets, CLASSES[name])
        root = os.path.expanduser(config.download_dir)
        try:
            data = make(root, **SPLITS[name][split], download=True)
        except Exception as error:
            raise UserError(
                f"data: {name} is not in {root} and could not be downloaded ({type(error).__name__}: {error}). "
                "Put torchvision's files there, or name a folder of images instead."
            ) from error
        pixels = data.data if name != "stl10" else data.data.transpose(0, 2, 3, 1)
        self.pixels = np.ascontiguousarray(pixels)
        labels = np.asarray(data.targets if name != "stl10" else data.labels, dtype=np.int64)
        self.labels = labels if (labels >= 0).any() else None
        self.classes = list(data.classes)

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def identity(self) -> str:
        return f"{self.title},{self.in_chans},{len(self)}"

    def fingerprint(self) -> str:
        some = self.pixels[:: -(-len(self) // SAMPLE)]
        return f"{self.identity()},{hashlib.sha256(some.tobytes()).hexdigest()}"

    def read(self, index: int) -> Tensor:
        if self.in_chans == 1:
            return from_array(self.pixels[index], 1)
        return torch.from_numpy(self.pixels[index]).permute(2, 0, 1)


def open_set(spec: str, config: Config) -> TorchvisionSet:
    """`cifar10`, `cifar10:test`, ..."""
    name, _, split = spec.partition(":")
    split = split or ("unlabeled" if name == "stl10" else "train")
    if name not in SPLITS or split not in SPLITS[name]:
        name = name if name in SPLITS else spec.split(",")[0]
        raise UserError(f"data: {spec} has no such split: use {name}:{' or :'.join(SPLITS[name])}.")
    return TorchvisionSet(name, split, config)
