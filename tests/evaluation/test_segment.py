"""Segmentation: targets, heads and measures by their definitions, and a set whose answer is known."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sslvit.evaluation import linear, masked, segment

MODEL = [
    "run=random:vit_tiny_patch16_224",
    "image_size=32",
    "model_args={patch_size: 8, embed_dim: 48, depth: 2, num_heads: 2}",
    "workers=0",
    "epochs=40",
    "probe_batch_size=64",
]


def write_set(root, count, side=64, seed=0):
    """Red and blue noise on both sides of a line between patches, sometimes with a green strip, on a gray photo-like
    ground; the mask has a palette, and its first row is unknown."""
    generator = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    colours = np.array([[200, 40, 40], [40, 40, 200], [40, 200, 40]])
    for i in range(count):
        mask = np.zeros((side, side), np.uint8)
        mask[:, int(generator.integers(1, 4)) * side // 4 :] = 1
        if i % 2:
            mask = mask.T.copy()
        if i % 3 == 0:
            mask[side // 2 :] = 2
        image = colours[mask] + generator.integers(-35, 35, (side, side, 3))
        mask[0] = masked.UNKNOWN
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{i:02d}.png")
        written = Image.fromarray(mask, mode="P")
        written.putpalette(generator.integers(0, 256, 768).tolist())
        written.save(root / "masks" / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    root = tmp_path_factory.mktemp("stripes")
    write_set(root / "train", 24)
    write_set(root / "test", 9, seed=1)
    return root


def words(root, *more):
    return ["segment", *MODEL, f"data.train={root / 'train'}", f"data.test={root / 'test'}", *more]


@pytest.mark.parametrize("size", [32, 64])
def test_masks_whose_edges_lie_between_patches_are_found_again(cli, stripes, tmp_path, size):
    out, picture = tmp_path / "result.json", tmp_path / "picture.png"
    status, printed, _ = cli(*words(stripes, f"size={size}", f"out={out}", f"picture={picture}"))
    assert status == 0
    results = json.loads(out.read_text())["results"]
    # An edge between two classes moves by a pixel where one is surer than the other, and corners are cut.
    assert results["miou"] > 94
    assert results["pixel_accuracy"] > 97
    assert len(results["iou"]) == 3
    assert sum(results["pixels"]) == 9 * 63 * 64  # the first row of each is unknown
    assert f"24 training images at {size} x {size} pixels, {size // 8} x {size // 8} patches, 3 classes" in printed
    assert json.loads(out.read_text())["test"]["images"] == 9
    assert Image.open(picture).height > 6 * 128


@pytest.mark.parametrize("column", [1, 2, 3])
def test_an_edge_between_patches_is_exact_when_the_features_contain_it(column):
    """Tokens that are the class: the enlarged logits cross where the patches meet, at any size of the mask."""
    grid, side = (4, 4), 64
    classes = torch.zeros(4, 4, dtype=torch.long)
    classes[:, column:] = 1
    x = F.one_hot(classes.flatten(), 2).float()
    head = torch.cat([4 * torch.eye(2), torch.zeros(1, 2)])
    mask = classes.repeat_interleave(side // 4, 0).repeat_interleave(side // 4, 1)
    prediction = segment.Head(torch.zeros(x.shape[1]), torch.ones(x.shape[1]), head).predict(x, grid, (side, side))
    assert torch.equal(prediction, mask)
    assert segment.mean_iou(segment.compare(prediction, mask, 2)) == 100


@pytest.mark.parametrize("shape", [(32, 32), (45, 31), (8, 12), (3, 2)])
def test_targets_are_the_shares_of_the_known_pixels_under_a_patch(shape):
    """Against an image enlarged until patches and pixels share their edges."""
    grid = (4, 3)
    mask = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0))
    mask[: shape[0] // 3] = masked.UNKNOWN
    h, w = math.lcm(shape[0], 4), math.lcm(shape[1], 3)
    fine = mask.repeat_interleave(h // shape[0], 0).repeat_interleave(w // shape[1], 1)
    cells = fine.unfold(0, h // 4, h // 4).unfold(1, w // 3, w // 3).reshape(12, -1)
    shares, known = masked.patch_targets(mask, grid, 3)
    for patch in range(12):
        seen = cells[patch][cells[patch] != masked.UNKNOWN]
        assert known[patch].item() == pytest.approx(len(seen) / cells.shape[1], abs=1e-6)
        if len(seen):
            expected = [(seen == c).double().mean().item() for c in range(3)]
            assert shares[patch].tolist() == pytest.approx(expected, abs=1e-5)


def test_heads_to_choose_from_do_not_see_held_out_images_and_the_last_one_sees_all(cli, stripes, monkeypatch):
    seen, train_heads = [], linear.train_heads
    monkeypatch.setattr(linear, "train_heads", lambda x, *rest: seen.append(len(x)) or train_heads(x, *rest))
    assert cli(*words(stripes, "holdout=0.25", "epochs=1"))[0] == 0
    assert seen == [18 * 16, 24 * 16]  # images, patches


def test_with_one_class_a_patch_the_heads_are_those_of_the_linear_probe():
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(64, 6, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    more = (3, [0.1, 1.0], 3, 1e-3, 16, 2)
    ours = linear.train_heads(x, F.one_hot(labels, 3).float(), *more, torch.ones(64))
    theirs = linear.train_heads(x, labels, *more)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_patch_that_nobody_knows_teaches_nothing():
    x, targets = torch.randn(32, 4), torch.eye(2)[torch.arange(32) % 2]
    weights = (torch.arange(32) < 16).float()
    other = torch.where(weights.bool().unsqueeze(1), targets, 1 - targets)
    first, second = (linear.train_heads(x, t, 2, [1.0], 2, 0.0, 32, 0, weights) for t in (targets, other))
    assert torch.equal(first, second)


def test_iou_counts_pixels_over_all_images_and_leaves_absent_classes_out():
    truth = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255]])
    called = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 3]])
    counts = segment.compare(called, truth, 4)
    assert segment.iou(counts).tolist()[:2] == pytest.approx([100 * 3 / 5, 100 * 2 / 4])
    assert segment.iou(counts)[2:].isnan().all()
    assert segment.mean_iou(counts) == pytest.approx((60 + 50) / 2)


def test_a_mask_is_read_as_the_numbers_in_the_file(tmp_path):
    classes = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = Image.fromarray(classes, mode="P")
    palette.putpalette([255 - i // 3 for i in range(768)])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(classes).save(tmp_path / "gray.png")
    Image.fromarray(classes.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(classes > 5).save(tmp_path / "bits.png")
    for name in ("palette", "gray", "deep"):
        assert torch.equal(masked.read_mask(tmp_path / f"{name}.png"), torch.from_numpy(classes).long())
    assert torch.equal(masked.read_mask(tmp_path / "bits.png"), torch.from_numpy(classes > 5).long())


def test_an_image_that_cannot_be_read_is_left_out_and_said(cli, stripes, tmp_path):
    root, out = tmp_path / "set", tmp_path / "result.json"
    shutil.copytree(stripes, root)
    (root / "test" / "images" / "03.png").write_bytes(b"no image")
    status, printed, _ = cli(*words(root, f"out={out}", "images=12"))
    assert status == 0
    assert "03.png cannot be read and is left out" in printed
    record = json.loads(out.read_text())
    assert (record["train"]["images"], record["test"]["images"]) == (12, 8)


def test_bad_input_gets_a_sentence(fails, stripes, images, tmp_path):
    assert "has no folder images" in fails(*words(stripes / "train"), f"data.train={images}")
    assert "data.test is missing" in fails("segment", *MODEL, f"data.train={stripes / 'train'}")
    assert "size=36 is not divisible by the patch size 8: use 32 or 40" in fails(*words(stripes, "size=36"))
    assert "no folder" in fails(*words(stripes, f"picture={tmp_path / 'no' / 'p.png'}"))
    assert "are the training images" in fails(*words(stripes)[:-1], f"data.test={stripes / 'train'}")
    assert "holdout=0" in fails(*words(stripes, "holdout=0"))
    assert "epochs=0" in fails(*words(stripes, "epochs=0"))
    pixels = [word for word in words(stripes) if not word.startswith(("run=", "model_args="))]
    assert "has no patch tokens" in fails(*pixels, "run=pixels")

    def changed(name):
        shutil.copytree(stripes, tmp_path / name)
        return tmp_path / name, tmp_path / name / "test" / "masks"

    root, masks = changed("missing")
    (masks / "00.png").unlink()
    assert "image 00 has no mask of its name" in fails(*words(root))
    root, masks = changed("more")
    shutil.copy(masks / "00.png", masks / "77.png")
    assert "mask 77 has no image of its name" in fails(*words(root))
    root, masks = changed("twice")
    Image.open(root / "test" / "images" / "00.png").save(root / "test" / "images" / "00.jpg")
    assert "two images are called 00" in fails(*words(root))
    root, masks = changed("colours")
    Image.open(masks / "00.png").convert("RGB").save(masks / "00.png")
    assert "has colours (RGB)" in fails(*words(root))
    root, masks = changed("classes")
    Image.fromarray(np.full((64, 64), 7, np.uint8)).save(masks / "00.png")
    assert "has the class 7, and those of" in fails(*words(root))
    root, masks = changed("turned")
    Image.fromarray(np.zeros((64, 20), np.uint8)).save(masks / "00.png")
    assert "they must have the same shape" in fails(*words(root))
    root, masks = changed("broken")
    (masks / "00.png").write_bytes(b"no image")
    assert "00.png cannot be read" in fails(*words(root))
    root, masks = changed("one")
    for path in (root / "train" / "masks").iterdir():
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)
    assert "one class only, [0]" in fails(*words(root))
