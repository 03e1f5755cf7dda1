import pytest
import torch

from sslvit import masks, rng


@pytest.mark.parametrize(("patches", "ratio", "kept"), [(196, 0.75, 49), (100, 0.9, 9), (64, 0.75, 16), (49, 0.6, 19)])
def test_the_number_of_visible_patches_is_truncated_as_published(patches, ratio, kept):
    assert masks.num_kept(patches, ratio) == kept == int(patches * (1 - ratio))


def test_visible_and_hidden_patches_partition_the_image():
    keep, hide = masks.split(masks.random_order(rng.fold_in(0, torch.arange(5)), 16), 4)
    assert keep.shape == (5, 4)
    assert torch.equal(torch.cat([keep, hide], dim=1).sort(dim=1).values, torch.arange(16).expand(5, 16))


def test_every_patch_is_hidden_equally_often_and_independently_of_the_batch():
    order = masks.random_order(rng.fold_in(0, torch.arange(20_000)), 16)
    keep, _ = masks.split(order, 4)
    visible = torch.zeros(20_000, 16).scatter(1, keep, 1.0).mean(dim=0)
    assert (visible - 0.25).abs().max() < 0.012  # 4 standard deviations
    assert torch.equal(masks.random_order(rng.fold_in(0, torch.tensor([7])), 16)[0], order[7])
