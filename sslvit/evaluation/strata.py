"""A part of labelled images in which each class has its share, chosen by a key and by nothing else."""

import torch
from torch import Tensor

from .. import rng
from ..errors import UserError


def stratified(labels: Tensor, share: float, key: Tensor) -> Tensor:
    """Row numbers of a share of the rows, in order: the same of each class and at least one, chosen by the key.

    labels: [N] int64, not negative, or [N, K] where a share of all rows is taken. A smaller share is part of a larger
    one.
    """
    classes = _classes(labels)
    wanted = (share * classes.bincount().double()).round().clamp(min=1)
    return first_of_each(classes, wanted, key).nonzero()[:, 0]


def check_holdout(share: float) -> None:
    """Raises UserError for what is no share to choose settings on."""
    if not 0 < share < 1:
        raise UserError(f"holdout={share} must lie between 0 and 1, both excluded.")


def hold_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """[N] bool, true for a share of the rows of each class, chosen by the seed. Raises UserError if there are none.

    At least one of a class and never all of them, so that every class is both learned and asked for, but for a class of
    one image, which is learned only. labels: as in `stratified`.
    """
    classes = _classes(labels)
    counts = classes.bincount().double()
    wanted = (share * counts).round().clamp(min=1).minimum(counts - 1)
    chosen = first_of_each(classes, wanted, rng.fold_in(seed, "holdout"))
    if not chosen.any():
        raise UserError(
            f"holdout={share:g}: no class has two of the {len(labels)} training images, so none can be held out: give "
            "more images."
        )
    return chosen


def first_of_each(classes: Tensor, wanted: Tensor, key: Tensor) -> Tensor:
    """[N] bool: of class c the `wanted[c]` rows that come first in a random order."""
    order = rng.permutation(key, len(classes))
    order = order[classes[order].argsort(stable=True)]  # class after class, each in the random order
    counts = classes.bincount()
    starts = counts.cumsum(0) - counts
    of = classes[order]
    chosen = torch.zeros(len(classes), dtype=torch.bool)
    chosen[order[torch.arange(len(classes)) - starts[of] < wanted[of]]] = True
    return chosen


def _classes(labels: Tensor) -> Tensor:
    return labels if labels.ndim == 1 else torch.zeros(len(labels), dtype=torch.long)
