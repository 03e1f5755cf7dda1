"""The targets of fine-tuning: one class for each image, several labels, or numbers; and which images are used."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import rng
from ...data import Source, labels
from ...distributed import say
from ...errors import UserError
from ..classes import align_classes, labels_of
from ..strata import hold_out, stratified


@dataclass
class Targets:
    """The targets of both sets: [N] int64 classes (-1: no label), or [N, K] float32 (NaN: no number)."""

    task: str
    train: Tensor
    test: Tensor
    names: list[str]  # of the classes, the labels or the numbers

    @property
    def labelled(self) -> tuple[Tensor, Tensor]:
        """Indices of the images that have a target, of both sets."""
        return self._labelled(self.train), self._labelled(self.test)

    def _labelled(self, targets: Tensor) -> Tensor:
        has_target = targets >= 0 if self.task == "single" else targets.isfinite().all(dim=1)
        return has_target.nonzero()[:, 0]


def read_targets(task: str, sources: tuple[Source, Source], specs: tuple[str, str]) -> Targets:
    """The targets of both sets, by the names of the training set. Raises UserError."""
    train, test = sources
    if task in ("auto", "single"):
        hint = ", or task=multilabel or task=regression for a table" if task == "auto" else ""
        for source, spec in zip(sources, specs, strict=True):
            if source.labels is None:
                raise UserError(
                    f"{spec} has no labels: fine-tuning needs <folder>/<class>/<image>, or a labelled set{hint}."
                )
        aligned = align_classes(train, test, specs)
        return Targets("single", labels_of(train), labels_of(aligned), train.classes)
    read = labels.multilabel if task == "multilabel" else labels.numbers
    (train_values, names), (test_values, test_names) = read(train), read(test)
    only_train, only_test = sorted(set(names) - set(test_names)), sorted(set(test_names) - set(names))
    if only_test or (only_train and task == "regression"):
        raise UserError(
            f"The labels of {specs[0]} and {specs[1]} differ: {', '.join((only_test or only_train)[:5])} is only in "
            f"{specs[1] if only_test else specs[0]}."
        )
    if only_train:  # no score counts them
        say(f"No image of {specs[1]} has {', '.join(only_train[:5])}{' ...' * (len(only_train) > 5)}.")
    columns = [list(test_names).index(name) if name in test_names else -1 for name in names]
    padded = F.pad(torch.as_tensor(test_values), (0, 1))  # a last column of zeros, for labels that no test image has
    return Targets(task, torch.as_tensor(train_values), padded[:, columns], list(names))


def split(targets: Targets, labels_share: float, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training images to learn from, and of those held out. Raises UserError.

    The same share of each class, or of all images where they have several labels or numbers.
    """
    labelled, _ = targets.labelled
    chosen = labelled[stratified(targets.train[labelled], labels_share, rng.fold_in(seed, "labels_share"))]
    if not holdout:
        return chosen, chosen[:0]
    held_out = hold_out(targets.train[chosen], holdout, seed)
    return chosen[~held_out], chosen[held_out]


def standardise_targets(task: str, values: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """For regression [N, T] -> the values with mean 0 and standard deviation 1; their own mean and standard deviation,
    [T]. For other tasks: the values as they are, 0 and 1."""
    if task != "regression":
        return values, (torch.tensor(0.0), torch.tensor(1.0))
    mean, std = values.mean(dim=0), values.std(dim=0, unbiased=False)
    std = torch.where(std > 0, std, 1.0)
    return (values - mean) / std, (mean, std)
