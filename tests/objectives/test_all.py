"""What every objective promises (sslvit/objectives/__init__.py); a new one is found here by its file."""

import pytest
import torch

from sslvit import config, data, hardware, objectives
from sslvit.pretrain import where
from tests.conftest import words

VARIANTS = {
    "plain": [],
    "registers": ["model.args.reg_tokens=3"],
    "not square": ["image_size=[16,32]"],
    "one channel": ["in_chans=1"],
    "five channels": ["in_chans=5"],
    "patch 4": ["model.args.patch_size=4"],
    "checkpointed": ["model.grad_checkpointing=true"],
}


def build(method: str, *more: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """An objective and a random batch of 6 images for it."""
    loaded = config.load(words(method, *more))
    module = objectives.find(method)
    torch.manual_seed(0)
    objective = module.build(loaded.objective, loaded.model, loaded.data, 4, 8)
    views = module.views(loaded.objective, loaded.data)
    batch = {name: torch.randn(len(crops), 6, loaded.data.in_chans, *crops[0].size) for name, crops in views.items()}
    return objective, {"key": torch.arange(6), **batch}


def part(batch: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    return {name: value[rows] if name == "key" else value[:, rows] for name, value in batch.items()}


def gradients(objective: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    objective.zero_grad()
    for batch in batches:
        (objective(batch, 0)["loss"] / len(batches)).backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", objectives.names())
def test_it_gives_a_loss_and_a_gradient_to_everything_that_learns(method, variant):
    objective, batch = build(method, *VARIANTS[variant])
    values = objective(batch, 0)
    assert values["loss"].shape == ()
    assert all(torch.isfinite(value) for value in values.values())
    values["loss"].backward()
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("method", objectives.names())
def test_forward_leaves_nothing_behind_that_is_saved(method):
    objective, batch = build(method)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective(batch, 0)
    objective(batch, 1)
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())


@pytest.mark.parametrize("method", objectives.names())
def test_micro_batches_add_up_to_the_batch(method):
    objective, batch = build(method)
    whole = gradients(objective, [batch])
    parts = gradients(objective, [part(batch, slice(0, 2)), part(batch, slice(2, 4)), part(batch, slice(4, 6))])
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert torch.allclose(gradient, parts[name], atol=1e-5), name


@pytest.mark.parametrize("method", objectives.names())
def test_the_same_keys_give_the_same_loss_and_others_another(method):
    objective, batch = build(method)
    first, again = objective(batch, 0)["loss"], objective(batch, 0)["loss"]
    assert torch.equal(first, again)
    assert not torch.equal(first, objective({**batch, "key": torch.arange(10, 16)}, 0)["loss"])


@pytest.mark.parametrize("method", objectives.names())
def test_bf16_keeps_losses_and_weights_in_float32(method):
    objective, batch = build(method)
    hardware.choose_attention(objective, torch.device("cpu"), "bf16")
    exact = objective(batch, 0)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = objective(batch, 0)
    assert all(value.dtype == torch.float32 for value in values.values())
    assert values["loss"].item() == pytest.approx(exact.item(), rel=0.02)
    values["loss"].backward()
    objective.after_step(0)
    assert all(value.dtype == torch.float32 for value in objective.state_dict().values() if value.is_floating_point())


@pytest.mark.parametrize("method", objectives.names())
def test_its_encoder_is_found_in_the_checkpoint_and_needs_nothing_else(method):
    objective, _ = build(method)
    place = where(objective)
    stored = objective.state_dict()
    own = objective.exported_encoder().model.state_dict()
    assert {name[len(place["prefix"]) :] for name in stored if name.startswith(place["prefix"])} == set(own)
    assert place["pool"] in ("cls", "mean", "pooled")
    assert not any("mask_token" in name for name in own)  # timm would take such weights for DINOv2's


def test_an_objective_may_live_outside_the_package(tmp_path, monkeypatch, cli, images):
    """A file of one's own, by its dotted name: mean squared error between two crops' features."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "siamese.py").write_text(
        """
from dataclasses import dataclass
from torch import nn
from sslvit import data, encoder
from sslvit.views import Crop

@dataclass
class Config:
    low: float = 0.4  # share of the image's area

DEFAULTS = {"epochs": 1}

def views(config, data_config):
    return {"pair": [Crop(data.image_size(data_config), (config.low, 1.0))] * 2}

def build(config, model, data_config, steps_per_epoch, steps):
    return Siamese(encoder.create(model, data.image_size(data_config), data_config.in_chans))

class Siamese(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
    def forward(self, views, step):
        a, b = (self.encoder.features(crop, key=views["key"]) for crop in views["pair"])
        return {"loss": (a - b).square().mean()}
    def before_step(self, step): pass
    def after_step(self, step): pass
    def exported_encoder(self): return self.encoder
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "run"
    arguments = [word for word in words("mae", f"out={out}", "low=0.6") if not word.startswith(("method", "decoder"))]
    status, printed, _ = cli("pretrain", images, "method=mine.siamese", *arguments)
    assert status == 0
    assert "step 8/8" in printed
    assert data.Config().train
