"""Crops cut on the device beside torch's own resampling, and images read at a smaller scale."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from sslvit import data, rng
from sslvit.data import BadImage, open_source
from sslvit.data.crops import Crop, crop_key, cut, cut_at_once, draw_boxes, reduction, resize
from sslvit.data.resample import resample, weights
from sslvit.data.sources import decode as decoding
from sslvit.data.sources.decode import decode, decode_smaller
from sslvit.objectives import dino, mae

KEYS = rng.fold_in(7, "test", torch.arange(64))


@pytest.fixture
def at_any_size(monkeypatch):
    """As if it were worth it for the small images of these tests."""
    monkeypatch.setattr(decoding, "MIN_SCALED", 1)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """[3, H, W] uint8 with coarse detail and some grain."""
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 80 + 128
    fine = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed + 1)) * 3
    coarse = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")
    return (coarse + fine).clamp(0, 255).to(torch.uint8)[0]


def jpeg(image: torch.Tensor, quality: int = 92) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return file.getvalue()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(16, 16), (32, 32), (7, 45), (96, 64)])
def test_boxes_resampled_at_once_are_those_resampled_one_by_one_to_a_level(size, interpolation):
    images = torch.stack([picture(50, 60, seed) for seed in range(6)])
    boxes = [[0, 0, 50, 60], [3, 4, 16, 16], [10, 20, 1, 1], [49, 0, 1, 60], [0, 59, 50, 1], [7, 9, 33, 48]]
    ours = resample(images, torch.tensor(boxes), size, interpolation)
    for image, (top, left, h, w), at_once in zip(images, boxes, ours, strict=True):
        one = resize(image[:, top : top + h, left : left + w].contiguous(), size, interpolation)
        difference = (one.int() - at_once.int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.1


def test_weights_are_those_of_the_antialiased_kernel_inside_the_box_only():
    found = weights(torch.tensor([3]), torch.tensor([8]), 20, 2, "bilinear")[0]
    assert torch.allclose(found.sum(1), torch.ones(2))
    assert (found[:, :3] == 0).all()
    assert (found[:, 11:] == 0).all()
    # 8 pixels become 2, so the triangle reaches 4 pixels to either side of 2: 1 - |j + 0.5 - 2| / 4
    expected = torch.tensor([0.625, 0.875, 0.875, 0.625, 0.375, 0.125, 0, 0])
    assert torch.allclose(found[0, 3:11], expected / expected.sum())


@pytest.mark.parametrize("method", [mae, dino])
def test_crops_cut_at_once_are_those_that_a_worker_cuts(method):
    config = data.Config(image_size=32)
    views = method.views(method.Config(), config)
    source = open_source("fractals:train,count=64", config)
    pixels = torch.stack([source.read(i) for i in range(len(KEYS))])
    one_by_one, at_once = cut(list(pixels), KEYS, views), cut_at_once(pixels, KEYS, views)
    assert one_by_one.keys() == at_once.keys()
    for name, crops in one_by_one.items():
        assert crops.shape == at_once[name].shape
        difference = (crops.int() - at_once[name].int()).abs()
        assert difference.max() <= 2  # two passes, each rounded
        assert difference.float().mean() < 0.05


def test_an_image_is_read_no_smaller_than_twice_what_its_smallest_crop_needs():
    views = {"global": [Crop((32, 32), (0.2, 1.0))] * 2, "local": [Crop((16, 16), (0.05, 0.2))]}
    seen = set()
    for key in KEYS.split(1):
        scale = reduction(views, key, 800, 600)
        seen.add(scale)
        needed = smallest(views, key, 800, 600)
        assert scale == max((s for s in (1, 2, 4, 8) if needed >= 2 * s), default=1)
    assert len(seen) > 1
    assert {reduction({"image": [Crop((224, 224), (0.2, 1.0))]}, key, 500, 375) for key in KEYS.split(1)} == {1}


def smallest(views: dict[str, list[Crop]], key: torch.Tensor, height: int, width: int) -> float:
    """The least number of image pixels to a crop's pixel, from the boxes as they are documented."""
    least = float("inf")
    for name, crops in views.items():
        for v, crop in enumerate(crops):
            box = draw_boxes(crop, crop_key(key, name, v), torch.tensor([height]), torch.tensor([width]))[0].tolist()
            least = min(least, box[2] / crop.size[0], box[3] / crop.size[1])
    return least


@pytest.mark.usefixtures("at_any_size")
def test_crops_of_an_image_read_at_a_smaller_scale_are_those_of_the_whole_one():
    views = {"image": [Crop((32, 32), (0.2, 1.0))]}
    content = jpeg(picture(601, 803))
    scales = set()
    for key in KEYS[:16].split(1):
        whole = cut([decode(content, 3)], key, views)["image"].float()
        image, size = decode_smaller(content, 3, None, lambda h, w, key=key: reduction(views, key, h, w))
        scales.add(803 // image.shape[2])
        smaller = cut([image], key, views, [size])["image"].float()
        assert size == (601, 803)
        assert (whole - smaller).abs().mean() < 0.08 * (whole - whole.mean()).abs().mean()
    assert max(scales) > 1


@pytest.mark.usefixtures("at_any_size")
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_jpeg_comes_at_the_scale_that_is_enough(scale, in_chans):
    image, size = decode_smaller(jpeg(picture(333, 250)), in_chans, None, lambda h, w: scale)
    assert size == (333, 250)
    assert image.shape == (in_chans, -(-333 // scale), -(-250 // scale))
    content = jpeg(picture(640, 480))
    image, size = decode_smaller(content, in_chans, None, lambda h, w: scale)
    assert image.shape == (in_chans, 640 // scale, 480 // scale)
    with Image.open(io.BytesIO(content)) as theirs:
        theirs.draft("L" if in_chans == 1 else "RGB", (480 // scale, 640 // scale))
        assert np.array_equal(image.permute(1, 2, 0).numpy().squeeze(), np.array(theirs))
    whole = torch.nn.functional.interpolate(decode(content, in_chans)[None].float(), image.shape[1:], mode="area")[0]
    assert (whole - image.float()).abs().mean() < 2.5


@pytest.mark.usefixtures("at_any_size")
def test_what_is_no_large_jpeg_is_read_as_ever(monkeypatch):
    pixels = picture(300, 300)
    content = jpeg(pixels)
    for too_large, scale in ((1, 1), (300 * 300 + 1, 8)):
        monkeypatch.setattr(decoding, "MIN_SCALED", too_large)
        image, size = decode_smaller(content, 3, None, lambda h, w, scale=scale: scale)
        assert torch.equal(image, decode(content, 3))
        assert size == (300, 300)
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    image, size = decode_smaller(file.getvalue(), 3, None, lambda h, w: 8)
    assert torch.equal(image, pixels)
    assert size == (300, 300)


@pytest.mark.usefixtures("at_any_size")
@pytest.mark.parametrize("damage", ["cut", "header", "empty", "bomb"])
def test_a_broken_jpeg_is_a_bad_image_at_any_scale(damage):
    content = jpeg(picture(300, 300))
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "header":
        content = content[:20]
    elif damage == "empty":
        content = b""
    else:
        at = content.index(b"\xff\xc0") + 5
        content = content[:at] + np.array([65500, 65500], dtype=">u2").tobytes() + content[at + 4 :]
    with pytest.raises(BadImage):
        decode_smaller(content, 3, None, lambda h, w: 4)
