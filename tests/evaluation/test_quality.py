"""The measures have the values that follow from their definitions, and run on an encoder of this package."""

import json

import pytest
import torch
import torch.nn.functional as F

from sslvit.evaluation import quality


def rotation(width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)).double())[0]


def test_the_effective_rank_counts_equal_directions():
    assert quality.effective_rank(torch.tensor([2.0] * 5 + [0.0] * 3)) == pytest.approx(5)
    assert quality.effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    # Shares 3/4 and 1/4: entropy 0.5623 nats.
    assert quality.effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(1.7548, abs=1e-4)


def test_rankme_is_of_singular_values():
    x = (rotation(16)[:, :2] * torch.tensor([3.0, 1.0])).float()
    assert quality.measure(x, torch.stack([x, x]))["rankme"] == pytest.approx(1.7548, abs=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_the_decay_of_a_power_law_is_its_exponent(alpha):
    orthogonal = F.normalize(rotation(64)[:, :16] - rotation(64)[:, :16].mean(dim=0), dim=0)
    basis = torch.linalg.qr(orthogonal)[0]
    x = basis * torch.arange(1, 17).double() ** (-alpha / 2) @ rotation(16)
    assert quality.spectrum_decay(x) == pytest.approx(alpha, rel=1e-6)


def test_lidar_counts_the_directions_in_which_images_differ_more_than_their_views():
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(400, 12)
    images[:, :4] = torch.randn(400, 4, generator=generator)  # four directions tell images apart
    noise = torch.randn(8, 400, 12, generator=generator)
    assert quality.lidar(images + 0.01 * noise) == pytest.approx(4, abs=0.2)
    assert quality.lidar(0.01 * images + noise) > 10  # nothing does: noise of the means in all twelve


def test_uniformity_and_std_tell_a_sphere_from_a_point():
    sphere = torch.randn(800, 32, generator=torch.Generator().manual_seed(0))
    point = torch.ones(800, 32) + 1e-4 * sphere
    assert quality.uniformity(torch.tensor([[1.0, 0], [-1.0, 0]])) == pytest.approx(-8)  # squared distance 4
    assert quality.uniformity(point) == pytest.approx(0, abs=1e-5)
    views = torch.stack([sphere, sphere])
    assert quality.measure(sphere, views)["std"] == pytest.approx(1, abs=0.01)
    assert quality.measure(point, views)["std"] < 1e-3
    assert quality.measure(sphere, views)["alignment"] == 0
    assert quality.measure(sphere, torch.stack([sphere, -sphere]))["alignment"] == pytest.approx(4, abs=1e-3)


def test_neighbours_are_shared_by_equal_views_and_by_chance_otherwise():
    generator = torch.Generator().manual_seed(0)
    first, second = (F.normalize(torch.randn(300, 16, generator=generator), dim=1) for _ in range(2))
    assert quality.shared_neighbours(first, first, 10) == 1
    assert quality.shared_neighbours(first, second, 10) == pytest.approx(10 / 299, abs=0.02)
    same = torch.ones(20, 4) / 2
    assert 0 <= quality.shared_neighbours(same, same, 10) <= 1  # ties: itself may not be among the nearest


def test_the_command_measures_a_run_and_files_the_result(cli, colour_run, labelled):
    status, printed, _ = cli("quality", f"run={colour_run}", f"data={labelled / 'train'}", "views=3", "workers=0")
    assert status == 0
    record = json.loads((colour_run / "eval" / "quality.json").read_text())
    assert record["images"] == 36
    results = record["results"]
    assert 1 <= results["rankme"] <= record["width"]
    assert 0 < results["agreement"] <= 100
    for name in results:
        assert name in printed
    assert cli("quality", f"run={colour_run}", f"data={labelled / 'train'}", "views=3", "workers=0")[1] == printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["views=1"], "views=1"),
        (["images=5"], "images=5"),
        (["crop_scale=[0,1]"], "crop_scale"),
        ([], "data is missing"),
    ],
)
def test_bad_words_are_refused(fails, colour_run, labelled, words, expected):
    data = [f"data={labelled / 'train'}"] if words else []
    assert expected in fails("quality", f"run={colour_run}", *data, *words)
