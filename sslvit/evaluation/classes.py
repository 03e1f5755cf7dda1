"""The classes of two labelled sets: that there are some, and which of one is which of the other."""

import numpy as np
import torch
from torch import Tensor

from ..data import Source
from ..distributed import gather_objects
from ..errors import UserError


def check_labelled(source: Source, name: str, least: int = 1) -> None:
    """Raises UserError for images without labels, or of fewer than `least` classes, 1 or 2."""
    if source.labels is None or (source.labels < 0).all():
        raise UserError(
            f"{name} has no labels: evaluation needs one folder a class, <folder>/<class>/<image>, or a labelled set "
            "by name."
        )
    if len(np.unique(source.labels[source.labels >= 0])) < least:
        raise UserError(f"{name} has images of one class only: telling classes apart needs two or more.")


def match_classes(train: Source, test: Source, names: tuple[str, str]) -> Tensor:
    """[classes of test] int64: the training set's number of each, by name. Raises UserError."""
    check_labelled(train, names[0], least=2)
    check_labelled(test, names[1])
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        raise UserError(
            f"{names[1]} has classes that {names[0]} has not: {', '.join(unknown[:5])}{' ...' * (len(unknown) > 5)}. "
            f"{names[0]} has {', '.join(train.classes[:5])}{' ...' * (len(train.classes) > 5)}."
        )
    number = {name: i for i, name in enumerate(train.classes)}
    return torch.tensor([number[name] for name in test.classes])


def check_readable(train: Tensor, test: Tensor, names: tuple[str, str]) -> None:
    """[N], [M] labels of the images that this process has read: all processes call it. Raises UserError on all of them
    if too few are left to learn from or to judge by."""
    classes = set().union(*gather_objects(set(train[train >= 0].tolist())))
    if len(classes) < 2:
        raise UserError(
            f"The labelled images of {names[0]} that can be read are of {len(classes)} classes: two are needed."
        )
    if not sum(gather_objects(int((test >= 0).sum()))):
        raise UserError(f"None of the labelled images of {names[1]} can be read.")


def remap_labels(labels: Tensor, numbers: Tensor) -> Tensor:
    """[N] int64 labels, -1 for none -> the same images by other numbers of their classes."""
    return torch.where(labels >= 0, numbers[labels.clamp(min=0)], -1)
