import math

import pytest
import torch

from sslvit import rng
from sslvit.model import masks


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


def test_an_enlarged_mask_has_whole_squares():
    mask = torch.tensor([[True, False, False, True, False, True]])
    expected = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    ours = masks.enlarge(mask, (2, 3), (1, 2)).view(2, 6)
    assert ours.tolist() == [[True, True, False, False, False, False], [True, True, False, False, True, True]]
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(masks.from_indices(torch.tensor([[5, 1]]), 6), torch.tensor([[0, 1, 0, 0, 0, 1]]).bool())


def oracle(u: list[list[float]], h: int, w: int, wanted: int, min_area: float) -> list[list[bool]]:
    """One image's blocks with plain loops, as BEiT's and iBOT's code draws them: ten tries for each rectangle."""
    mask, draws = [[False] * w for _ in range(h)], iter(u)
    for _ in range(wanted):
        for _ in range(10):
            room = wanted - sum(map(sum, mask))
            draw = next(draws, None)
            if draw is None:
                return mask
            area = min_area + (room - min_area) * draw[0]
            ratio = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * draw[1])
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if not (height < h and width < w):
                continue
            top, left = int(draw[2] * (h - height + 1)), int(draw[3] * (w - width + 1))
            cells = [(y, x) for y in range(top, top + height) for x in range(left, left + width) if not mask[y][x]]
            if 0 < len(cells) <= room:
                for y, x in cells:
                    mask[y][x] = True
                break
        else:
            return mask
    return mask


@pytest.mark.parametrize(("grid", "wanted", "min_area"), [((14, 14), 75, 16), ((7, 10), 35, 4), ((4, 4), 5, 1)])
def test_blocks_are_those_of_a_slow_oracle_of_the_published_code(grid, wanted, min_area):
    key = rng.fold_in(0, torch.arange(60))
    ours = masks.random_blocks(key, grid, wanted, min_area)
    draws = rng.uniform(rng.fold_in(key, "mask"), 240).view(60, 60, 4)
    for image, u in enumerate(draws.tolist()):
        assert ours[image].view(grid).tolist() == oracle(u, *grid, wanted, min_area), image
    assert (ours.sum(dim=1) <= wanted).all()
    assert ours.sum(dim=1).float().mean() > 0.9 * wanted
    rate = ours.view(-1, *grid).float().mean(dim=0)
    assert rate.min() > 0  # every patch is hidden in some image
    assert torch.equal(masks.random_blocks(key[7:8], grid, wanted, min_area)[0], ours[7])  # whatever the batch


def test_each_image_may_hide_a_number_of_blocks_of_its_own():
    wanted = torch.tensor([0, 20, 60] * 20)
    ours = masks.random_blocks(rng.fold_in(1, torch.arange(60)), (14, 14), wanted, 4).sum(dim=1)
    assert (ours <= wanted).all()
    assert ours[0] == 0
    assert ours[2::3].float().mean() > 50
