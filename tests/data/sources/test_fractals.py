import hashlib

import numpy as np
import pytest
import torch

from sslvit.data import Config, open_source
from sslvit.data.sources.fractals import MIN_FILL, Fractals
from sslvit.errors import UserError


def test_images_are_a_function_of_the_index():
    """The same pixels on every machine and in every order: a digest of the first images."""
    source = Fractals(count=100, size=32)
    backwards = [source.read(i) for i in reversed(range(8))][::-1]
    again = Fractals(count=1000, size=32)
    assert all(torch.equal(image, again.read(i)) for i, image in enumerate(backwards))
    digest = hashlib.sha256(torch.stack(backwards).numpy().tobytes()).hexdigest()
    assert digest[:16] == "2269b262ecdb0e42"


def test_size_count_classes_and_channels_are_free():
    source = open_source("fractals:test,classes=7,count=30,size=24,seed=3", Config(in_chans=5))
    assert len(source) == 30
    assert len(source.classes) == 7
    assert source.labels.tolist() == [i % 7 for i in range(30)]
    image = source.read(29)
    assert image.shape == (5, 24, 24)
    assert image.dtype == torch.uint8
    assert open_source("fractals", Config(image_size=48)).read(0).shape == (3, 48, 48)


def test_training_and_test_images_are_different_images_of_the_same_classes():
    train, test = Fractals("train", count=50), Fractals("test", count=50)
    assert all(np.array_equal(a, b) for a, b in zip(train.systems, test.systems, strict=True))
    assert not any(torch.equal(train.read(i), test.read(i)) for i in range(50))


def test_attractors_fill_the_picture_and_colours_stay_in_range():
    source = Fractals(classes=40, count=400, size=32)
    for i in range(0, 400, 7):
        image = source.read(i).float()
        inked = (image - image.flatten(1).mode(dim=1).values.view(3, 1, 1)).abs().sum(0) > 0
        assert inked.float().mean() > MIN_FILL / 2  # of the varied system; the class itself fills MIN_FILL
        assert image.flatten(1).std(dim=1).min() > 10


def test_colours_do_not_give_the_class_away():
    """A nearest class mean on mean colours is at chance."""
    source = Fractals(classes=10, count=1000, size=16)
    colours = torch.stack([source.read(i).float().mean(dim=(1, 2)) for i in range(1000)])
    labels = torch.from_numpy(source.labels)
    means = torch.stack([colours[:500][labels[:500] == c].mean(0) for c in range(10)])
    hits = (torch.cdist(colours[500:], means).argmin(1) == labels[500:]).float().mean()
    assert hits < 0.25


@pytest.mark.parametrize("name", ["fractals:validation", "fractals:classes=x", "fractals:train,sise=32"])
def test_words_that_are_not_understood_are_named(name):
    with pytest.raises(UserError, match=name.rsplit(",", 1)[-1].rsplit(":", 1)[-1]):
        open_source(name, Config())
    with pytest.raises(UserError, match="at least one class"):
        open_source("fractals:classes=0", Config())
