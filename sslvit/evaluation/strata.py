"""A random part of labelled images with the same share of each class. The key decides, and nothing else."""

import torch
from torch import Tensor

from .. import rng
from ..errors import UserError


def stratified(labels: Tensor, share: float, key: Tensor) -> Tensor:
    """Row numbers of a share of the rows, in order: the same share of each class, at least one row, chosen by the key.

    labels: [N] int64, not negative; or [N, K], of which a share of all rows is taken. A smaller share is part of a
    larger one.
    """
    classes = _classes(labels)
    counts = (share * classes.bincount().double()).round().clamp(min=1)
    return first_of_each(classes, counts, key).nonzero()[:, 0]


def check_holdout(share: float) -> None:
    """Raises UserError for a share of held-out images that is not between 0 and 1."""
    if not 0 < share < 1:
        raise UserError(f"holdout={share} must lie between 0 and 1, both excluded.")


def hold_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """[N] bool, true for a share of the rows of each class, chosen by the seed. Raises UserError if there are none.

    At least one row of each class and never all of them. The row of a class of one is not held out. labels: as in
    `stratified`.
    """
    classes = _classes(labels)
    sizes = classes.bincount().double()
    counts = (share * sizes).round().clamp(min=1).minimum(sizes - 1)
    chosen = first_of_each(classes, counts, rng.fold_in(seed, "holdout"))
    if not chosen.any():
        raise UserError(
            f"holdout={share:g}: no class has two of the {len(labels)} training images, so none can be held out: give "
            "more images."
        )
    return chosen


def first_of_each(classes: Tensor, counts: Tensor, key: Tensor) -> Tensor:
    """[N] bool: of each class c the `counts[c]` rows that come first in a random order, or all if it has fewer."""
    order = rng.permutation(key, len(classes))
    order = order[classes[order].argsort(stable=True)]  # class after class, each in the random order
    sizes, sorted_classes = classes.bincount(), classes[order]
    starts = sizes.cumsum(0) - sizes
    place_in_class = torch.arange(len(classes)) - starts[sorted_classes]
    chosen = torch.zeros(len(classes), dtype=torch.bool)
    chosen[order[place_in_class < counts[sorted_classes]]] = True
    return chosen


def _classes(labels: Tensor) -> Tensor:
    return labels if labels.ndim == 1 else torch.zeros(len(labels), dtype=torch.long)
