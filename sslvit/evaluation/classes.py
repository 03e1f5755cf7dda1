"""The classes of labelled images: whether there are enough, and the same number for the same class in two sets."""

import numpy as np
import torch
from torch import Tensor

from ..data import Source, WrappedSource
from ..distributed import gather_objects
from ..errors import UserError


class Relabelled(WrappedSource):
    """The images of a source with other labels. To the feature cache they are the same images."""

    def __init__(self, source: Source, labels: np.ndarray, classes: list[str]) -> None:
        super().__init__(source)
        self.classes, self.labels = classes, labels


def labels_of(source: Source) -> Tensor:
    """[N] int64, -1 where an image has no label."""
    return torch.from_numpy(np.full(len(source), -1) if source.labels is None else source.labels)


def check_labelled(source: Source, spec: str, least: int = 1) -> None:
    """Raises UserError for images without labels, or of fewer than `least` classes, 1 or 2."""
    present = labels_of(source).unique()
    if not (present >= 0).any():
        raise UserError(
            f"{spec} has no labels: evaluation needs one folder for each class, <folder>/<class>/<image>, or a "
            "labelled set by name."
        )
    if (present >= 0).sum() < least:
        raise UserError(f"{spec} has images of one class only: give images of two or more classes.")


def align_classes(train: Source, test: Source, specs: tuple[str, str]) -> Source:
    """The test images with the class numbers of the training set, matched by the names. Raises UserError."""
    check_labelled(train, specs[0], least=2)
    check_labelled(test, specs[1])
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        raise UserError(
            f"{specs[1]} has classes that {specs[0]} has not: {', '.join(unknown[:5])}{' ...' * (len(unknown) > 5)}. "
            f"{specs[0]} has {', '.join(train.classes[:5])}{' ...' * (len(train.classes) > 5)}."
        )
    if test is train:
        return test
    number = {name: i for i, name in enumerate(train.classes)}
    numbers, labels = np.array([number[name] for name in test.classes]), labels_of(test).numpy()
    return Relabelled(test, np.where(labels >= 0, numbers[labels], -1), train.classes)


def check_readable(train: Tensor, test: Tensor, specs: tuple[str, str]) -> None:
    """[N], [M] labels of the images that this process has read. All processes call it. Raises UserError on all of them
    if fewer than two training classes or no test image are left."""
    classes = set().union(*gather_objects(set(train[train >= 0].tolist())))
    if len(classes) < 2:
        raise UserError(
            f"The labelled images of {specs[0]} that can be read are of {len(classes)} classes: two are needed."
        )
    if not sum(gather_objects(int((test >= 0).sum()))):
        raise UserError(f"None of the labelled images of {specs[1]} can be read.")
