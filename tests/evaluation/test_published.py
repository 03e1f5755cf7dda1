import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslvit import rng
from sslvit.data.crops import Crop, draw_boxes
from sslvit.evaluation import published
from tests import processes
from tests.conftest import TINY_MODEL

MODEL = f"model_args={{{', '.join(f'{k}: {v}' for k, v in TINY_MODEL.items())}}}"


@pytest.fixture
def sets(labelled, colour_run) -> list[str]:
    return [f"run={colour_run}", f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}", "cache=false"]


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_colours_are_told_apart_and_departures_from_the_paper_are_said(cli, sets, tmp_path, name):
    out = tmp_path / "r.json"
    lr = {"mae": 2000.0, "dino": 20.0}[name]  # LARS moves weights by a thousandth of their size at a rate of 1
    arguments = [f"protocol={name}", "epochs=12", "global_batch_size=12", f"lr=[{lr}]", f"out={out}"]
    status, printed, _ = cli("linear", *sets, *arguments)
    assert status == 0
    record = json.loads(out.read_text())
    assert record["results"]["top1"] > 90
    theirs = {"mae": (90, 16384), "dino": (100, 1024)}[name]
    assert record["departures"]["epochs"] == {"here": 12, "published": theirs[0]}
    assert record["departures"]["global_batch_size"] == {"here": 12, "published": theirs[1]}
    assert f"not as published: lr is {lr}, published 0" in printed
    assert record["features"] == {"mae": "class token", "dino": "class tokens of the last four blocks"}[name]


def test_learning_rates_are_the_published_ones(cli, sets, monkeypatch, tmp_path):
    """MAE: linear over 10 of 90 epochs, then half a cosine a step; DINO: half a cosine that moves between epochs."""
    rates = []
    for made, name in ((published.LARS, "LARS"), (torch.optim.SGD, "SGD")):

        class Noted(made):
            def step(self, *arguments, **more):
                rates.append(self.param_groups[0]["lr"])
                return super().step(*arguments, **more)

        monkeypatch.setattr(published if name == "LARS" else torch.optim, name, Noted)
    assert cli("linear", *sets, "protocol=mae", "global_batch_size=36", f"out={tmp_path / 'a'}")[0] == 0
    peak = 0.1 * 36 / 256
    assert rates[:3] == pytest.approx([0, peak / 10, 2 * peak / 10])
    assert rates[10] == pytest.approx(peak)
    assert rates[50] == pytest.approx(peak / 2)
    assert len(rates) == 90
    rates.clear()
    assert cli("linear", *sets, "protocol=dino", "global_batch_size=18", f"out={tmp_path / 'b'}", "epochs=4")[0] == 0
    peak = 0.001 * 18 / 256
    cosine = [peak, peak * (2 + 2**0.5) / 4, peak / 2, peak * (2 - 2**0.5) / 4]
    assert rates == pytest.approx([rate for rate in cosine for _ in range(2)])


@pytest.mark.parametrize(("name", "lr"), [("dino", 20), ("mae", 2000)])
def test_processes_and_micro_batches_do_not_change_the_head(sets, tmp_path, name, lr):
    """BatchNorm of the one and the loss of the other are of the global batch."""
    arguments = ["linear", *sets, f"protocol={name}", "epochs=3", "global_batch_size=12", f"lr={lr}"]
    single, together = tmp_path / "single.json", tmp_path / "together.json"
    log = tmp_path / "log"
    first = processes.finish(processes.start([*arguments, f"out={single}"], log), log)
    second = processes.launch([*arguments, f"out={together}", "batch_size=3"], tmp_path / "log2", world_size=2)
    assert "epoch 3/3" in first
    assert "epoch 3/3" in second
    one, two = (json.loads(path.read_text()) for path in (single, together))
    assert one["results"]["right"] == two["results"]["right"]
    loss = [text.split("epoch 3/3")[1].split()[1] for text in (first, second)]
    assert float(loss[0]) == pytest.approx(float(loss[1]), abs=2e-3)


def test_maes_head_is_a_batch_norm_without_weights_and_a_linear_layer():
    head = published.Head(64, 5, True, seed=0)
    assert [name for name, _ in head.named_parameters()] == ["linear.weight", "linear.bias"]
    assert head.linear.weight.std().item() == pytest.approx(0.01, rel=0.15)
    x = 3 * torch.randn(32, 64) + 1
    normed = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
    expected = F.linear(normed, head.linear.weight, head.linear.bias)
    assert torch.allclose(head(x), expected, atol=1e-5)
    assert isinstance(published.Head(64, 5, False, seed=0).norm, nn.Identity)


def test_maes_crop_is_one_draw_clamped_to_the_image():
    """A flat image, of which most boxes do not fit: ten tries find others, one is cut at the border."""
    key = rng.fold_in(0, torch.arange(2000))
    height, width = torch.full((2000,), 20), torch.full((2000,), 100)
    once = draw_boxes(Crop((8, 8), (0.08, 1.0), tries=1), key, height, width)
    top, left, h, w = once.unbind(1)
    assert (h >= 1).all()
    assert ((top >= 0) & (top + h <= 20) & (left >= 0) & (left + w <= 100)).all()
    assert (h == 20).double().mean() > 0.5
    ten = draw_boxes(Crop((8, 8), (0.08, 1.0)), key, height, width)
    assert (ten[:, 2] == 20).double().mean() < 0.4


def test_what_the_protocol_has_not_gets_a_sentence(fails, sets):
    assert "one learning rate" in fails("linear", *sets, "protocol=mae", "lr=[1,2]")
    assert "epochs=0 must be 1 or above" in fails("linear", *sets, "protocol=mae", "epochs=0")
    assert "holdout belongs to protocol=sweep" in fails("linear", *sets, "protocol=mae", "holdout=0.5")
    assert "pools belongs to protocol=sweep" in fails("linear", *sets, "protocol=dino", "pools=[cls]")
    assert "belongs to protocol=mae" in fails("linear", *sets, "global_batch_size=8")
    pixels = ["run=pixels", "image_size=32", *sets[1:]]
    for name in ("mae", "dino"):
        assert f"protocol={name} is for plain ViTs, and run=pixels is none" in fails(
            "linear", *pixels, f"protocol={name}"
        )
    headless = ["run=random:vit_tiny_patch16_224", f"{MODEL.removesuffix('}')}, class_token: false, global_pool: avg}}"]
    assert "reads class token" in fails("linear", *headless, "image_size=32", *sets[1:], "protocol=mae")
