"""The strong augmentation: by its formulas, and each image's own whatever the batch."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from sslvit import rng
from sslvit.evaluation.finetuning import mixing, training


def test_mixing_and_smoothing_give_the_loss_of_the_formula():
    """Each image by itself, in float64: 1 - e on the two labels by their shares, and e spread over all classes."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 5
    logits, key = torch.randn(8, 5, generator=generator), rng.fold_in(7, torch.arange(8))
    images, targets = mixing.mix(x.clone(), mixing.smooth_labels(labels, 5, 0.1), key, 0.8, 1.0)
    pasted, kept, boxes = mixing.draw_pairs(key[::2], (16, 16), 0.8, 1.0)
    assert 0 < pasted.sum() < 4  # both kinds
    total = 0.0
    for i in range(8):
        pair, other = i // 2, i ^ 1
        share = kept[pair].double()
        if pasted[pair]:
            top, left, h, w = boxes[pair].tolist()
            expected = x[i].clone()
            expected[:, top : top + h, left : left + w] = x[other][:, top : top + h, left : left + w]
            assert share == pytest.approx(1 - h * w / 256)
        else:
            expected = (share * x[i] + (1 - share) * x[other]).float()
        assert torch.allclose(images[i], expected, atol=1e-6)
        log = logits[i].double().log_softmax(dim=0)
        one = share * log[labels[i]] + (1 - share) * log[labels[other]]
        total -= 0.9 * one + 0.1 * log.mean()
    assert training.loss_of("single", logits, targets).item() == pytest.approx(total.item() / 8, rel=1e-6)


def test_shares_of_mixing_follow_their_distributions():
    key = rng.fold_in(1, torch.arange(4000))
    pasted, kept, boxes = mixing.draw_pairs(key, (100, 100), 0.8, 1.0)
    assert pasted.float().mean() == pytest.approx(0.5, abs=0.03)
    assert kept[~pasted].mean() == pytest.approx(0.5, abs=0.03)
    assert kept[~pasted].var() == pytest.approx(0.25 / (2 * 0.8 + 1), rel=0.1)  # of the beta distribution
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 100).all()
    assert mixing.draw_pairs(key, (9, 9), 0.8, 0.0)[0].sum() == 0
    assert mixing.draw_pairs(key, (9, 9), 0.0, 1.0)[0].all()


def test_erasing_puts_normal_noise_into_boxes_of_some_images():
    x, key = torch.full((2000, 1, 32, 32), 9.0), rng.fold_in(3, torch.arange(2000))
    mixing.erase(x, key, 0.25)
    erased = (x != 9).flatten(1)
    assert erased.any(dim=1).float().mean() == pytest.approx(0.25, abs=0.03)
    areas = erased[erased.any(dim=1)].float().mean(dim=1)
    assert 0.01 < areas.min() < areas.max() < 0.36
    assert areas.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    noise = x[x != 9]
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    again = mixing.erase(torch.full((1000, 1, 32, 32), 9.0), key[1000:], 0.25)
    assert torch.equal(again, x[1000:])  # an image's own, whatever the batch


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_is_an_images_own_and_leaves_the_global_generators_alone(channels):
    images = torch.randint(0, 256, (1, 40, channels, 24, 20), dtype=torch.uint8)
    key = rng.fold_in(5, torch.arange(40))
    change = mixing.RandAugment("rand-m9-mstd0.5-inc1", (0.5,) * channels)
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    whole = change({"image": images.clone(), "key": key})["image"]
    part = change({"image": images[:, 30:].clone(), "key": key[30:]})["image"]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
    assert torch.equal(whole[:, 30:], part)
    assert 10 < sum(not torch.equal(a, b) for a, b in zip(whole[0], images[0], strict=True)) <= 40


def test_the_greatest_magnitude_works_with_this_pillow():
    change = mixing.RandAugment("rand-m10-n15-p1", (0.5,) * 3)
    for op in change.transform.ops:
        for key in range(3):
            with mixing.seeded(key):
                assert op(Image.new("RGB", (8, 8), (200, 100, 50))).size == (8, 8)
