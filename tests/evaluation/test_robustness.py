"""Corruptions by their formulas, attacks inside their ball, and the command whose classifier is the linear probe's."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sslvit import rng
from sslvit.evaluation import attacks, corruptions, robustness
from sslvit.evaluation.config import CORRUPTIONS
from tests import processes

KEY = rng.fold_in(0, "test")


def photo(side=32, channels=3):
    """Smooth colours with an edge."""
    generator = torch.Generator().manual_seed(0)
    x = F.interpolate(torch.rand(1, channels, 5, 5, generator=generator), (side, side), mode="bicubic")[0]
    x[:, 3 * side // 7 :, 3 * side // 7 :] *= 0.3
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("side", "channels"), [(32, 3), (96, 3), (32, 1), (32, 4), (8, 3)])
def test_every_corruption_takes_any_size_and_channels_and_gets_worse_with_severity(name, side, channels):
    image = photo(side, channels)
    worse = [corruptions.corrupt(image, name, s, KEY) for s in corruptions.SEVERITIES]
    for result in worse:
        assert result.dtype == torch.uint8
        assert result.shape == image.shape
    distance = [(w.double() - image.double()).square().mean().item() for w in worse]
    if side >= 32:  # smaller, a disk below a pixel or a box of the same size changes nothing
        assert distance[4] > 1.3 * distance[0] > 0
    again = corruptions.corrupt(image, name, 5, KEY)
    assert torch.equal(again, worse[4])
    other = corruptions.corrupt(image, name, 5, rng.fold_in(1, "test"))
    assert torch.equal(again, other) == ("noise" not in name)


def test_noise_has_the_spread_of_its_formula():
    gray = torch.full((3, 200, 200), 128, dtype=torch.uint8)
    level = 128 / 255
    for s, (c, counts) in enumerate(
        zip(corruptions.IMAGENET["gaussian_noise"][:2], corruptions.IMAGENET["shot_noise"][:2], strict=True), start=1
    ):
        assert corruptions.corrupt(gray, "gaussian_noise", s, KEY).double().std() / 255 == pytest.approx(c, rel=0.02)
        spread = corruptions.corrupt(gray, "shot_noise", s, KEY).double().std() / 255
        assert spread == pytest.approx(math.sqrt(level / counts), rel=0.03)
    hit = corruptions.corrupt(gray, "impulse_noise", 5, KEY)
    assert ((hit == 0) | (hit == 255)).double().mean() == pytest.approx(0.27, abs=0.01)
    assert (hit == 0).double().mean() == pytest.approx(0.135, abs=0.01)
    assert (hit == 128).double().mean() == pytest.approx(0.73, abs=0.01)


def test_brightness_adds_to_the_value_of_hsv_and_keeps_hue_and_saturation():
    colours = torch.tensor([[200, 100, 50], [0, 0, 0], [90, 90, 90], [250, 10, 0]], dtype=torch.uint8)
    image = colours.t().reshape(3, 2, 2)
    result = corruptions.corrupt(image, "brightness", 3, KEY).flatten(1).t()  # V + 0.15
    for before, after in zip(colours.tolist(), result.tolist(), strict=True):
        v = min(max(before) / 255 + 0.15, 1)
        factor = v / (max(before) / 255) if max(before) else 0
        expected = [factor * b if max(before) else 255 * v for b in before]
        assert after == pytest.approx(expected, abs=0.51)


def test_contrast_draws_pixels_to_the_mean_of_their_channel():
    image = photo()
    x = image.double() / 255
    mean = x.mean(dim=(1, 2), keepdim=True)
    expected = 255 * (mean + 0.3 * (x - mean))
    assert (corruptions.corrupt(image, "contrast", 4, KEY) - expected).abs().max() <= 0.51


def test_blur_keeps_a_flat_image_and_spreads_a_point_into_its_kernel():
    flat = torch.full((3, 32, 32), 77, dtype=torch.uint8)
    for name in ("gaussian_blur", "defocus_blur"):
        assert (corruptions.corrupt(flat, name, 5, KEY) == 77).all()
    point = torch.zeros(1, 129, 129)
    point[0, 64, 64] = 1
    generator = torch.Generator()
    blurred = corruptions.gaussian_blur(point, 3, generator)[0].double()
    place = torch.arange(129).double() - 64
    assert (blurred * place.square()).sum().item() == pytest.approx(9, rel=0.02)  # the variance along a line
    disk = corruptions.defocus_blur(point, (10, 1e-3), generator)[0]
    inside = place.square() + place.square().unsqueeze(1) <= 100
    assert torch.allclose(disk, inside / inside.sum(), atol=1e-6)


def test_pixelate_and_jpeg_are_those_of_pil(tmp_path):
    image = photo(96)
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    box = pil.resize((38, 38), Image.Resampling.BOX).resize((96, 96), Image.Resampling.BOX)  # int(96 * 0.4)
    pil.save(tmp_path / "image.jpg", quality=15)
    for name, expected in (("pixelate", box), ("jpeg", Image.open(tmp_path / "image.jpg"))):
        ours = corruptions.corrupt(image, name, 3, KEY)
        assert Image.fromarray(ours.permute(1, 2, 0).numpy()).tobytes() == expected.tobytes()


def test_small_images_get_the_numbers_of_cifar_and_large_ones_those_of_imagenet():
    assert corruptions.scale_of((32, 32))[0] == "CIFAR-10-C"
    assert corruptions.scale_of((224, 224))[0] == "ImageNet-C"
    assert list(corruptions.CIFAR) == list(corruptions.IMAGENET) == list(corruptions.CORRUPTIONS)


@pytest.fixture(scope="module")
def classifier():
    """A small network on images with its labels' own answer mostly right: (logits, x, labels)."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 64, 5)
    )
    x, labels = torch.rand(200, 3, 8, 8), torch.arange(200) % 5
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()
    return net.requires_grad_(False), x, labels


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
@pytest.mark.parametrize("eps", [0, 1 / 255, 8 / 255])
def test_an_attack_stays_in_its_ball_and_in_the_range_of_pixels(classifier, attack, eps):
    logits, x, labels = classifier
    x = x.clone()
    x[:, :, 0], x[:, :, 1] = 0, 1  # at the edges of the range, where a step would leave it
    moved = attacks.ATTACKS[attack](logits, x, labels, eps, 5, rng.fold_in(0, torch.arange(len(x))))
    assert (moved - x).abs().max() <= eps + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    if eps == 0:
        assert torch.equal(moved, x)
    else:
        assert (moved - x).abs().max() >= 0.99 * eps


def test_attacks_raise_the_loss_and_pgd_is_no_weaker_than_fgsm(classifier):
    logits, x, labels = classifier
    key = rng.fold_in(0, torch.arange(len(x)))

    def loss(x):
        return F.cross_entropy(logits(x), labels).item()

    for eps in (1 / 255, 4 / 255):
        fgsm, pgd = (attacks.ATTACKS[name](logits, x, labels, eps, 10, key) for name in ("fgsm", "pgd"))
        assert loss(x) < loss(fgsm) <= loss(pgd)
        alone = attacks.pgd(logits, x[7:9], labels[7:9], eps, 10, key[7:9])
        assert torch.allclose(alone, pgd[7:9], atol=1e-6)  # whatever else is in the batch


def test_the_gradient_step_of_a_linear_classifier_is_the_sign_of_its_weights():
    weight = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))

    def logits(x):
        return x.flatten(1) @ weight

    x = torch.full((1, 3, 2, 2), 0.5)
    moved = attacks.fgsm(logits, x, torch.tensor([0]), 0.1, 1, KEY.view(1))
    assert torch.allclose((moved - x).flatten(), 0.1 * (weight[:, 1] - weight[:, 0]).sign(), atol=1e-6)
    steps = attacks.pgd(logits, x, torch.tensor([0]), 0.1, 5, KEY.view(1))
    assert torch.allclose(steps, moved, atol=1e-6)  # the corner of the ball is the maximum


def words(run, labelled, out, *more):
    return [
        "robustness", f"run={run}", f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}", f"out={out}",
        "epochs=30", "probe_batch_size=16", "lr=[0.1,1]", "workers=0", "precision=float32", *more,
    ]  # fmt: skip


def test_the_command_has_the_linear_probes_accuracy_on_clean_images_and_at_eps_0(cli, labelled, colour_run, tmp_path):
    out, linear, picture = tmp_path / "result.json", tmp_path / "linear.json", tmp_path / "corruptions.png"
    few = ["corruptions=[gaussian_noise,contrast]", "eps=[0,2,64]", "steps=3", f"picture={picture}"]
    status, printed, _ = cli(*words(colour_run, labelled, out, *few, "images=null"))
    assert status == 0
    probe = ["linear", *words(colour_run, labelled, linear)[1:], "pool=mean"]
    assert cli(*probe)[0] == 0
    record, expected = json.loads(out.read_text()), json.loads(linear.read_text())["results"]
    results = record["results"]
    assert results["clean"] == expected["top1"]
    assert results["setting"] == expected["setting"]
    assert results["clean_interval"] == expected["top1_interval"]
    attacks = {name: [one["top1"] for one in row] for name, row in results["attacks"].items()}
    assert attacks["fgsm"][0] == attacks["pgd"][0] == results["clean"]
    assert attacks["pgd"][2] <= attacks["fgsm"][2] < results["clean"]
    table = results["corruptions"]
    every = [value for row in table["top1"].values() for value in row]
    assert len(every) == 10
    assert table["mean_error"] == pytest.approx(100 - sum(every) / 10, abs=1e-3)
    assert table["relative_error"] == pytest.approx(table["mean_error"] - (100 - results["clean"]), abs=1e-3)
    assert "gaussian_noise" in printed
    assert "CIFAR-10-C" in printed
    assert Image.open(picture).width > 6 * 96
    status, printed, _ = cli(*words(colour_run, labelled, out, "corruptions=[]", "attacks=[]", "images=7"))
    assert status == 0
    assert "7 test images" in printed
    assert set(json.loads(out.read_text())["results"]) == {"setting", "images", "clean", "clean_interval"}


@pytest.mark.slow  # starts three processes
def test_one_and_two_processes_give_the_same_and_unreadable_images_are_left_out(labelled, colour_run, tmp_path):
    sets = tmp_path / "sets"
    shutil.copytree(labelled, sets)
    (sets / "test" / "class1" / "0.png").write_bytes(b"no image")
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    few = ["corruptions=[shot_noise]", "eps=[16]", "steps=2", "cache=false", "batch_size=40"]
    processes.finish(processes.start(words(colour_run, sets, alone, *few), tmp_path / "log"), tmp_path / "log")
    processes.launch(words(colour_run, sets, together, *few), tmp_path / "log2", world_size=2)
    first, second = (json.loads(path.read_text()) for path in (alone, together))
    assert first["results"] == second["results"]
    assert first["test"] == {"data": str(sets / "test"), "images": 17, "unreadable": 1, "of": 18}
    assert first["results"]["images"] == 17


def test_pixels_are_attacked_too(cli, labelled, tmp_path):
    out = tmp_path / "result.json"
    more = ["image_size=16", "corruptions=[contrast]", "eps=[0,128]"]
    assert cli(*words("pixels", labelled, out, *more))[0] == 0
    results = json.loads(out.read_text())["results"]
    assert results["clean"] == 100
    assert results["attacks"]["fgsm"][1]["top1"] < 50


def test_the_classifier_gives_the_logits_of_the_standardised_features():
    x, head = torch.randn(6, 4), torch.randn(5, 3)
    mean, std = torch.randn(4), torch.rand(4) + 0.5
    logits = robustness.Classifier(mean, std, head)(x)
    assert torch.allclose(logits, (x - mean) / std @ head[:-1] + head[-1], atol=1e-6)


def test_the_corruption_of_an_image_does_not_depend_on_the_others():
    images = [photo(32), photo(48)]
    source = SimpleNamespace(read=lambda i: images[i], labels=None, classes=[], __len__=lambda: 2)
    one = robustness.Corrupted(source, (32, 32), "gaussian_noise", 3, seed=0)
    first = one.read(0)
    assert torch.equal(first, one.read(0))
    assert one.read(1).shape == (3, 32, 32)
    assert not torch.equal(first, robustness.Corrupted(source, (32, 32), "gaussian_noise", 3, seed=1).read(0))


def test_bad_input_gets_a_sentence(fails, labelled, images, colour_run, tmp_path):
    run, train, test = f"run={colour_run}", f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"
    assert "data.test is missing" in fails("robustness", run, train)
    assert "has no labels" in fails("robustness", run, train, f"data.test={images}")
    assert "rain, which is not one of gaussian_noise" in fails("robustness", run, train, test, "corruptions=[rain]")
    assert "deepfool, which is not one of fgsm, pgd" in fails("robustness", run, train, test, "attacks=[deepfool]")
    assert "eps=[-1.0] must lie between 0 and 255" in fails("robustness", run, train, test, "eps=[-1]")
    assert "eps is empty" in fails("robustness", run, train, test, "eps=[]")
    assert "are the training images" in fails("robustness", run, train, train.replace("train=", "test=", 1))
    assert "images=0" in fails("robustness", run, train, test, "images=0")
    assert "holdout=1" in fails("robustness", run, train, test, "holdout=1")
    assert "there is no folder" in fails("robustness", run, train, test, f"picture={tmp_path / 'no' / 'p.png'}")
    shutil.copytree(labelled / "train" / "class0", tmp_path / "one" / "class0")
    assert "of one class only" in fails("robustness", run, f"data.train={tmp_path / 'one'}", test)
