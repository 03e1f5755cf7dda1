"""What the images of fine-tuning are, one class each, several labels, or numbers, and which of them are used."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rng
from ..data import Source, labels
from ..distributed import say
from ..errors import UserError
from .classes import renumbered, same_classes
from .strata import hold_out, stratified


@dataclass
class Targets:
    """What the images of a source are: [N] int64 classes (-1: not known), or [N, K] float32."""

    task: str
    train: Tensor
    test: Tensor
    names: list[str]

    @property
    def known(self) -> tuple[Tensor, Tensor]:
        """Numbers of the images with a target, of both sets."""
        return tuple(
            ((of_set >= 0) if self.task == "single" else of_set.isfinite().all(dim=1)).nonzero()[:, 0]
            for of_set in (self.train, self.test)
        )


def read_targets(task: str, sources: list[Source], words: tuple[str, str]) -> Targets:
    """The targets of both sets, by the names of the training set. Raises UserError."""
    if task in ("auto", "single"):
        for source, word in zip(sources, words, strict=True):
            if source.labels is None:
                hint = ", or task=multilabel or task=regression for a table" if task == "auto" else ""
                raise UserError(
                    f"{word} has no labels: fine-tuning needs <folder>/<class>/<image>, or a labelled set{hint}."
                )
        train, test = sources
        numbers = same_classes(train, test, words)
        of_test = renumbered(torch.from_numpy(test.labels), numbers)
        return Targets("single", torch.from_numpy(train.labels), of_test, train.classes)
    read = labels.multilabel if task == "multilabel" else labels.numbers
    (train, names), (test, test_names) = (read(source) for source in sources)
    missing, unknown = sorted(set(names) - set(test_names)), sorted(set(test_names) - set(names))
    if unknown or (missing and task == "regression"):
        raise UserError(
            f"The labels of {words[0]} and {words[1]} differ: {', '.join((unknown or missing)[:5])} is only in "
            f"{words[1] if unknown else words[0]}."
        )
    if missing:  # texts of which no test image has some: measure leaves them out
        say(f"No image of {words[1]} has {', '.join(missing[:5])}{' ...' * (len(missing) > 5)}.")
    columns = [list(test_names).index(name) if name in test_names else -1 for name in names]
    test = F.pad(torch.as_tensor(test), (0, 1))[:, columns]  # the last column, of zeros, for those
    return Targets(task, torch.as_tensor(train), test, list(names))


def split(targets: Targets, labels_share: float, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the training images that are learned from, and of those that are held out. Raises UserError.

    Of each class its share; where images have several labels, or numbers, a random part of them.
    """
    known = targets.known[0]
    chosen = known[stratified(targets.train[known], labels_share, rng.fold_in(seed, "labels_share"))]
    if not holdout:
        return chosen, chosen[:0]
    held_out = hold_out(targets.train[chosen], holdout, seed)
    return chosen[~held_out], chosen[held_out]


def standard_scores(values: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """[N, T] -> the same with mean 0 and deviation 1, and both of what they were, [T] each."""
    mean = values.mean(dim=0)
    std = values.std(dim=0, unbiased=False)
    std = torch.where(std > 0, std, 1.0)
    return (values - mean) / std, (mean, std)
