import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import CenterCrop, Compose, Resize
from torchvision.transforms.v2 import functional as tv

from sslvit import rng
from sslvit.data import crops
from sslvit.data.crops import Crop
from sslvit.errors import UserError


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return rng.fold_in(seed, torch.arange(n))


def sizes(n: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((n,), height), torch.full((n,), width)


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(60, 80, (0.2, 1.0)), (20, 200, (0.05, 0.4)), (32, 32, (0.4, 1.0))]
)
def test_boxes_have_the_distribution_of_torchvisions(height, width, scale):
    n = 4000
    ours = crops.draw_boxes(Crop((8, 8), scale), keys(n), *sizes(n, height, width)).double()
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)]).double()
    for column in range(4):
        a, b = ours[:, column].sort().values, theirs[:, column].sort().values
        grid = torch.cat([a, b]).unique()
        gap = (torch.searchsorted(a, grid, right=True) - torch.searchsorted(b, grid, right=True)).abs().max() / n
        assert gap < 1.95 * math.sqrt(2 / n), f"column {column}"  # Kolmogorov-Smirnov at 0.1 %


def test_boxes_lie_inside_images_of_any_shape():
    height = torch.tensor([1, 1, 500, 3, 40])
    width = torch.tensor([1, 300, 1, 4, 40])
    for seed in range(50):
        boxes = crops.draw_boxes(Crop((8, 8), (0.05, 1.0)), keys(5, seed), height, width)
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] >= 1).all()
        assert (boxes[:, 0] + boxes[:, 2] <= height).all()
        assert (boxes[:, 1] + boxes[:, 3] <= width).all()


def test_a_box_that_never_fits_becomes_torchvisions_centre_crop():
    """Every box of at least 80 % of the area is too wide for a strip of 10 x 100."""
    ours = crops.draw_boxes(Crop((8, 8), (0.8, 1.0)), keys(3), *sizes(3, 10, 100))
    theirs = RandomResizedCrop.get_params(torch.empty(3, 10, 100), [0.8, 1.0], [3 / 4, 4 / 3])
    assert ours.tolist() == [list(theirs)] * 3


def test_crops_are_torchvisions_bicubic_crops():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 50, 70), dtype=np.uint8))
    crop, key = Crop((24, 16), (0.2, 1.0)), keys(2)
    out = crops.cut([image, image], key, {"image": [crop]})["image"]
    boxes = crops.draw_boxes(crop, crops.crop_key(key, "image", 0), *sizes(2, 50, 70))
    for b, (top, left, h, w) in enumerate(boxes.tolist()):
        theirs = tv.resized_crop(image, top, left, h, w, [24, 16], InterpolationMode.BICUBIC, antialias=True)
        assert (out[0, b].int() - theirs.int()).abs().max() <= 1


def test_resizing_is_pils_bicubic():
    pixels = np.random.default_rng(0).integers(0, 256, (61, 47, 3), dtype=np.uint8)
    ours = crops.resize(torch.from_numpy(pixels).permute(2, 0, 1), (32, 20))
    theirs = np.array(Image.fromarray(pixels).resize((20, 32), Image.Resampling.BICUBIC))
    assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 1


def test_crops_are_view_major_and_do_not_depend_on_the_batch():
    images = [torch.randint(0, 256, (3, 40, 30 + i), dtype=torch.uint8) for i in range(4)]
    spec = {"global": [Crop((16, 16), (0.4, 1.0))] * 2, "local": [Crop((8, 8), (0.1, 0.4))] * 3}
    whole = crops.cut(images, keys(4), spec)
    assert whole["global"].shape == (2, 4, 3, 16, 16)
    assert whole["local"].shape == (3, 4, 3, 8, 8)
    alone = crops.cut(images[2:3], keys(4)[2:3], spec)
    assert torch.equal(whole["local"][:, 2:3], alone["local"])
    assert not torch.equal(whole["global"][0], whole["global"][1])


def test_deep_images_stay_deep():
    deep = torch.rand(3, 40, 40) * 255
    out = crops.cut([deep, deep], keys(2), {"image": [Crop((16, 16), (0.4, 1.0))]})["image"]
    assert out.dtype == torch.float32
    assert len(out.unique()) > 256
    assert 0 <= out.min() <= out.max() <= 255


@pytest.mark.parametrize("size", [224, 96, 37])
@pytest.mark.parametrize(("height", "width"), [(300, 199), (201, 333), (256, 256), (101, 90), (47, 389)])
def test_the_centre_is_torchvisions_resize_and_centre_crop(height, width, size):
    """Also where the longer side, or 96 / 0.875, is no whole number of pixels: it is truncated."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8))
    short = int(size / (224 / 256))
    published = Compose([Resize(short, InterpolationMode.BICUBIC, antialias=True), CenterCrop(size)])
    assert torch.equal(crops.centre(image, (size, size), 224 / 256), published(image))


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (7, 50)])
@pytest.mark.parametrize(("height", "width"), [(231, 199), (151, 253), (33, 47), (7, 50), (5, 5)])
def test_the_centre_of_another_shape_is_as_large_as_fits(height, width, size):
    position = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).float()
    rows, columns = crops.centre(position, size)
    assert rows.shape == size
    step = min(height / size[0], width / size[1])  # pixels of the image from one pixel of the crop to the next
    assert rows[:, 0].diff().median() == pytest.approx(step, rel=0.05)
    assert columns[0].diff().median() == pytest.approx(step, rel=0.05)
    assert rows.mean() == pytest.approx((height - 1) / 2, abs=0.6 * step)
    assert columns.mean() == pytest.approx((width - 1) / 2, abs=0.6 * step)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("spec", [{"image": [Crop((24, 16), (0.2, 1.0))]}, {"two": [Crop((16, 16), (0.1, 1.0))] * 2}])
def test_crops_do_not_depend_on_the_order_of_pixels_in_memory(spec, channels):
    """As a decoder gives them, as an array file does, and as a cache keeps them: the same run with each."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, channels), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    for name, cut_crops in crops.cut([image] * 3, keys(3), spec).items():
        assert torch.equal(cut_crops, crops.cut([image.contiguous()] * 3, keys(3), spec)[name])


def test_crops_that_differ_in_size_of_box_are_drawn_each_with_its_own():
    image = torch.arange(100, dtype=torch.uint8).repeat(3, 100, 1)
    small, large = Crop((8, 8), (0.01, 0.02)), Crop((8, 8), (1.0, 1.0), (1.0, 1.0))
    cut = crops.cut([image], keys(1), {"mixed": [small, large]})["mixed"]
    assert cut[0].max() - cut[0].min() < 25
    assert cut[1].max() - cut[1].min() > 80


def test_crops_that_are_turned_must_be_square():
    with pytest.raises(UserError, match="not square: set rotate_prob=0"):
        Crop((8, 16), (0.2, 1.0), rotate_prob=0.75)
