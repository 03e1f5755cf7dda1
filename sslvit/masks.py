"""Which patches are hidden: index arithmetic for each image. In a mask, True = hidden from the encoder."""

from torch import Tensor

from . import rng


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """How many patches stay visible, truncated as in the published MAE: int(100 * (1 - 0.9)) is 9, not 10."""
    return int(num_patches * (1 - mask_ratio))


def random_order(key: Tensor, num_patches: int) -> Tensor:
    """[B] int64 keys -> [B, N] int64, a random order of each image's patches."""
    return rng.bits(rng.fold_in(key, "mask"), num_patches).argsort(dim=1)


def split(order: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """[B, N] order -> keep [B, K], hide [B, N-K]: indices of the visible and of the hidden patches.

    MAE, section 3 "Masking": sampling without replacement by shuffling and keeping the first part of the list. One sort
    is enough: the published code sorts a second time to invert the order, a scatter to `order` does the same.
    """
    return order[:, :kept], order[:, kept:]
