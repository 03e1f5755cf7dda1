import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as pil_tv
from torchvision.transforms.v2 import functional as tv

from sslvit import rng
from sslvit.data import augment
from sslvit.data.augment import Normalize, Parameters
from sslvit.data.crops import Crop
from sslvit.objectives import dino

LEVEL = 1 / 255
UNTURNED = (torch.tensor([False]), torch.tensor([0]), torch.ones(1, 2, 3))  # no flip, no turn, no jitter of channels


def photo(seed: int = 0, size: int = 48) -> torch.Tensor:
    """[3, size, size] uint8, smooth like a photo."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def as_float(image: Image.Image | torch.Tensor) -> torch.Tensor:
    if isinstance(image, Image.Image):
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return image.float() / 255


def number(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value)


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.0, 1.25, 1.4])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_blends_match_torchvision_on_the_same_factor(name, factor):
    image = photo()
    ours = getattr(augment, name)(as_float(image).unsqueeze(0), number(factor))[0]
    for theirs in (getattr(tv, f"adjust_{name}")(image, factor), _pil(image, f"adjust_{name}", factor)):
        assert (ours - as_float(theirs)).abs().mean() < 1.5 * LEVEL


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.03, 0.1, 0.4])
def test_hue_matches_torchvision_on_the_same_shift(shift):
    image = photo(1)
    ours = augment.hue(as_float(image).unsqueeze(0), number(shift))[0]
    assert (ours - tv.adjust_hue(as_float(image), shift)).abs().max() < 1e-4
    assert (ours - as_float(_pil(image, "adjust_hue", shift))).abs().mean() < 2 * LEVEL


def test_hue_of_gray_and_pure_colours():
    colours = torch.tensor([[0.5] * 3, [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0.0] * 3, [1.0] * 3])
    turned = augment.hue(colours.view(6, 3, 1, 1), torch.full((6, 1, 1, 1), 1 / 3)).view(6, 3)
    expected = colours[:, [2, 0, 1]]  # a third of a turn: red becomes green, green blue, blue red
    assert torch.allclose(turned, expected, atol=1e-5)


def test_grayscale_matches_torchvision_and_pil():
    image = photo(2)
    ours = augment.gray(as_float(image).unsqueeze(0))[0]
    pil = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L").convert("RGB")
    for theirs in (as_float(tv.rgb_to_grayscale(image)), as_float(pil)):
        assert (ours - theirs).abs().max() < 2 * LEVEL


SIGMAS = [0.1, 0.2, 0.3, 0.4, 0.55, 0.8, 1.2, 1.7, 2.0, 5.0]


def pil_blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """[3, H, W] uint8 -> the same."""
    blurred = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(sigma))
    return torch.from_numpy(np.array(blurred)).permute(2, 0, 1)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("size", [(3, 8), (47, 31)])
def test_blur_is_pils_but_for_its_six_roundings(sigma, size):
    noise = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (3, *size), dtype=np.uint8))
    gap = augment.blur(noise.float().unsqueeze(0), number(sigma))[0] - pil_blur(noise, sigma).float()
    assert gap.abs().max() < 3  # levels of 255; PIL rounds after each of three passes along each axis
    assert gap.abs().mean() < 1.2
    assert gap.mean().abs() < 0.3


@pytest.mark.parametrize("sigma", SIGMAS)
def test_box_filters_with_pils_roundings_are_pils_blur(sigma):
    """The same box filter, rounded after each pass as PIL does, gives its pixels one by one."""
    image = photo(3, 41)
    box = augment._box_filter(41, augment._box_radius(number(sigma).view(1, 1, 1)))[0]
    ours = image.float()
    for turn in range(6):
        ours = (ours @ box.t() if turn < 3 else box @ ours).add(0.5).floor()
    gap = (ours - pil_blur(image, sigma).float()).abs()
    assert gap.max() <= 1  # sums half way between two levels: PIL's weights of 24 bits fall short of them
    assert gap.mean() < 0.1


def test_blur_of_small_sigma_keeps_as_much_contrast_as_pils():
    """A sampled Gaussian would keep 0.985 of it at sigma 0.3."""
    stripes = 255 * (torch.arange(64) % 2).to(torch.uint8).expand(3, 64, 64)
    for sigma, kept in ((0.2, 0.92), (0.3, 0.83), (0.4, 0.71)):
        ours = augment.blur(as_float(stripes).unsqueeze(0), number(sigma))[0]
        for blurred in (ours, as_float(pil_blur(stripes, sigma))):
            assert 2 * blurred[:, :, 16:-16].std(unbiased=False) == pytest.approx(kept, abs=0.01)


def test_every_image_of_a_batch_has_its_own_blur():
    images = torch.stack([as_float(photo(seed, 16)) for seed in range(4)])
    sigma = torch.tensor([0.3, 2.0, 0.1, 1.1]).view(4, 1, 1, 1)
    together = augment.blur(images, sigma)
    assert torch.allclose(together, torch.cat([augment.blur(images[i : i + 1], sigma[i]) for i in range(4)]), atol=1e-6)


def test_solarise_matches_pil():
    image = photo(4)
    theirs = as_float(ImageOps.solarize(Image.fromarray(image.permute(1, 2, 0).numpy()), threshold=128))
    assert torch.allclose(augment.solarize(as_float(image)), theirs, atol=1e-6)


def test_operations_come_in_the_drawn_order():
    image = as_float(photo(5)).unsqueeze(0)
    factors = torch.tensor([[1.3, 0.7, 1.4, 0.08]])
    operations = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    no, yes = torch.tensor([False]), torch.tensor([True])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        p = Parameters(no, yes, torch.tensor([order]), factors, no, no, torch.tensor([1.0]), no, *UNTURNED)
        expected = image.clone()
        for i in order:
            expected = operations[i](expected, number(factors[0, i].item()))
        assert torch.allclose(augment.apply(image.clone(), p), expected, atol=1e-6)


def test_probabilities_and_ranges_over_ten_thousand_draws():
    """Each of DINO's crops gets each operation as often as the paper says, each factor in its range."""
    spec = dino.views(dino.Config(), dino.data.Config(image_size=32))
    first, second = spec["global"]
    local = spec["local"][0]
    n = 10_000
    for crop, blur, solarize in ((first, 1.0, 0.0), (second, 0.1, 0.2), (local, 0.5, 0.0)):
        p = augment.draw(crop, rng.fold_in(0, "draws", torch.arange(n)))
        for drawn, expected in (
            (p.flip, 0.5), (p.jitter, 0.8), (p.gray, 0.2), (p.blur, blur), (p.solarize, solarize),
        ):  # fmt: skip
            tolerance = 4 * (expected * (1 - expected) / n) ** 0.5
            assert abs(drawn.double().mean().item() - expected) <= tolerance
        for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
            factor = p.factors[:, column]
            assert low <= factor.min() < low + 0.01 * (high - low)
            assert high - 0.01 * (high - low) < factor.max() <= high
            assert factor.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
        assert 0.1 <= p.sigma.min() < p.sigma.max() <= 2.0
        assert len({tuple(row) for row in p.order.tolist()}) == 24
        assert torch.equal(p.order.sort(dim=1).values, torch.arange(4).expand(n, 4))


def test_flips_and_turns_over_ten_thousand_draws():
    n, keys = 10_000, rng.fold_in(0, "draws", torch.arange(10_000))
    p = augment.draw(Crop((8, 8), (0.4, 1.0), vertical_flip_prob=0.3, rotate_prob=0.75), keys)
    assert abs(p.upside_down.double().mean().item() - 0.3) <= 4 * (0.3 * 0.7 / n) ** 0.5
    for turns in range(4):
        assert abs((p.turns == turns).double().mean().item() - 0.25) <= 4 * (0.25 * 0.75 / n) ** 0.5
    flags = torch.stack([p.flip, p.upside_down, p.turns > 0]).double()
    assert (torch.corrcoef(flags) - torch.eye(3)).abs().max() < 0.05
    never = augment.draw(Crop((8, 8), (0.4, 1.0)), keys)
    assert not never.upside_down.any()
    assert not never.turns.any()
    assert torch.equal(never.flip, p.flip)  # other operations do not move the draws of these


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_channel_jitter_over_ten_thousand_draws(channels):
    keys = rng.fold_in(0, "draws", torch.arange(10_000))
    p = augment.draw(Crop((8, 8), (0.4, 1.0), channel_jitter=(0.4, 0.2), jitter_prob=0.8), keys, channels)
    assert p.channels.shape == (10_000, 2, channels)
    for row, (low, high) in enumerate([(0.6, 1.4), (0.8, 1.2)]):
        factor = p.channels[:, row]
        assert low <= factor.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < factor.max() <= high
        assert factor.mean().item() == pytest.approx(1.0, abs=0.02 * (high - low))
    between = torch.corrcoef(p.channels.flatten(1).t().double()) - torch.eye(2 * channels)
    assert between.abs().max() < 0.05


def test_flips_and_turns_are_torchvisions_and_pils():
    image = as_float(photo(6)).unsqueeze(0)
    no = torch.tensor([False])
    for flip, upside_down, turns in ((0, 1, 0), (1, 1, 0), (0, 0, 1), (0, 0, 3), (1, 0, 1), (0, 1, 2)):
        p = Parameters(
            torch.tensor([bool(flip)]), no, torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4), no, no,
            torch.tensor([1.0]), no, torch.tensor([bool(upside_down)]), torch.tensor([turns]),
            torch.ones(1, 2, 3),
        )  # fmt: skip
        pil = Image.fromarray(photo(6).permute(1, 2, 0).numpy())
        pil = pil_tv.hflip(pil) if flip else pil
        pil = pil_tv.vflip(pil) if upside_down else pil
        pil = pil.rotate(90 * turns)
        assert torch.equal(augment.apply(image.clone(), p)[0], as_float(pil))


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_jitter_of_a_channel_is_torchvisions_of_that_channel_alone(factor):
    image = torch.cat([photo(7), photo(8)])[:5]
    factors = factor * torch.linspace(0.8, 1.2, 5).view(1, 5, 1, 1)
    for name, operation in (("brightness", augment.brightness), ("contrast", augment.channel_contrast)):
        ours = operation(as_float(image).unsqueeze(0), factors)[0]
        for c in range(5):
            one = getattr(tv, f"adjust_{name}")(image[c : c + 1], factors[0, c].item())
            assert (ours[c : c + 1] - as_float(one)).abs().mean() < 1.5 * LEVEL


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_channel_jitter_changes_each_channel_by_itself(channels):
    crop = Crop((16, 16), (0.4, 1.0), flip_prob=0.0, channel_jitter=(0.4, 0.4), jitter_prob=0.5)
    images = torch.randint(0, 256, (1, 40, channels, 16, 16), dtype=torch.uint8)
    key = torch.arange(40)
    flat = Normalize((0.0,) * channels, (1.0,) * channels)
    out = augment.augment({"key": key, "image": images}, {"image": [crop]}, flat, torch.device("cpu"))["image"][0]
    p = augment.draw(crop, rng.fold_in(key, "image", 0), channels)
    for row in range(40):
        expected = images[0, row].float() / 255
        if p.jitter[row]:
            brightness, contrast = p.channels[row].view(2, channels, 1, 1)
            expected = (expected * brightness).clamp(0, 1)
            expected = (expected * contrast + expected.mean((1, 2), keepdim=True) * (1 - contrast)).clamp(0, 1)
        assert torch.allclose(out[row], expected, atol=1e-5)
    assert 5 < p.jitter.sum() < 35


def test_draws_of_different_operations_are_independent():
    crop = Crop((8, 8), (0.4, 1.0), flip_prob=0.5, jitter_prob=0.5, gray_prob=0.5, blur_prob=0.5, solarize_prob=0.5)
    p = augment.draw(crop, rng.fold_in(0, torch.arange(10_000)))
    flags = torch.stack([p.flip, p.jitter, p.gray, p.blur, p.solarize]).double() - 0.5
    correlation = 4 * flags @ flags.t() / 10_000 - torch.eye(5)
    assert correlation.abs().max() < 0.05


def test_a_batch_is_augmented_as_its_images_alone_would_be():
    config = dino.Config(local_crops=3, local_crop_size=16)
    spec = dino.views(config, dino.data.Config(image_size=32))
    normalize = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    batch = {
        "key": rng.fold_in(0, torch.arange(6)),
        "global": torch.randint(0, 256, (2, 6, 3, 32, 32), dtype=torch.uint8),
        "local": torch.randint(0, 256, (3, 6, 3, 16, 16), dtype=torch.uint8),
    }
    device = torch.device("cpu")
    whole = augment.augment(batch, spec, normalize, device)
    part = {"key": batch["key"][4:], "global": batch["global"][:, 4:], "local": batch["local"][:, 4:]}
    alone = augment.augment(part, spec, normalize, device)
    for name in ("global", "local"):
        gap = (whole[name][:, 4:] - alone[name]).abs()
        assert gap.quantile(0.999) < 1e-5  # a pixel at the threshold of solarise may fall on either side
        assert whole[name].dtype == torch.float32
    assert (whole["global"][0] - whole["global"][1]).abs().mean() > 0.1


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channel_counts_pass_without_colour_operations(channels):
    spec = dino.views(dino.Config(local_crops=0), dino.data.Config(image_size=16))
    batch = {"key": torch.arange(3), "global": torch.randint(0, 256, (2, 3, channels, 16, 16), dtype=torch.uint8)}
    out = augment.augment(batch, spec, Normalize((0.5,) * channels, (0.25,) * channels), torch.device("cpu"))
    assert torch.isfinite(out["global"]).all()


def test_normalising_is_undone():
    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = torch.rand(2, 3, 4, 4)
    assert torch.allclose(normalize.undo(normalize(x)), x, atol=1e-6)
    assert torch.allclose(normalize(x), tv.normalize(x, list(normalize.mean), list(normalize.std)), atol=1e-6)


def _pil(image: torch.Tensor, name: str, value: float) -> Image.Image:
    return getattr(pil_tv, name)(Image.fromarray(image.permute(1, 2, 0).numpy()), value)
