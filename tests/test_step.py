"""One optimizer step by itself."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from sslvit import data, optim
from sslvit.distributed import rank
from sslvit.hardware import start_accelerator
from sslvit.metrics import Window
from sslvit.model import factory
from sslvit.objectives import dino
from sslvit.step import train_step

from . import processes
from .conftest import TINY_MODEL


class Roots(nn.Module):
    """The loss is the sum of the square roots of its parameters: at 0 it is finite and its gradient is not."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([values]))
        self.draws: list[float] = []

    def forward(self, batch, step):
        self.draws.append(torch.rand(()).item())
        return {"loss": self.weight.sqrt().sum()}


def take_steps(module: nn.Module, config: optim.Config, steps: int = 1, accumulate: int = 1) -> list[float]:
    """1.0 for each step that was skipped."""
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(module, optim.make_optimizer(config, module))
    settings = {"accumulate": accumulate, "seed": 0, "config": config}
    return [
        train_step(accelerator, model, optimizer, [None] * accumulate, step, Window(), **settings).item()
        for step in range(steps)
    ]


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_skips_the_step_though_the_loss_is_finite(clip):
    module = Roots(0.0, 4.0)
    assert take_steps(module, optim.Config(base_lr=0.1, clip=clip)) == [1.0]
    assert module.weight.tolist() == [[0.0, 4.0]]
    module = Roots(1.0, 4.0)
    assert take_steps(module, optim.Config(base_lr=0.1, clip=clip)) == [0.0]
    assert (module.weight < torch.tensor([1.0, 4.0])).all()


def test_what_a_model_draws_by_itself_is_a_function_of_step_and_micro_batch():
    first, second = Roots(1.0), Roots(1.0)
    take_steps(first, optim.Config(), steps=3, accumulate=2)
    take_steps(second, optim.Config(), steps=3, accumulate=2)
    assert first.draws == second.draws
    assert len(set(first.draws)) == 6


def statistics_after_steps(work_on: str) -> int:
    """On each of several processes, with images of its own: a network with BatchNorm, alone and in DINO."""
    accelerator = start_accelerator("float32")
    networks = [nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)), batch_norm_dino()]
    settings = {"accumulate": 1, "seed": 0, "config": optim.Config()}
    for network, batches in zip(networks, batches_of(rank()), strict=True):
        model, optimizer = accelerator.prepare(network, optim.make_optimizer(optim.Config(), network))
        for step, batch in enumerate(batches):
            train_step(accelerator, model, optimizer, [batch], step, Window(), **settings, forward=loss_of)
    torch.save([dict(network.named_buffers()) for network in networks], f"{work_on}/{rank()}")
    torch.save([steps_of_dino(accelerator, chosen) for chosen in (False, True)], f"{work_on}/dino_{rank()}")
    return 0


def steps_of_dino(accelerator: Accelerator, crop_wise: bool) -> dict[str, torch.Tensor]:
    """The weights after two steps of two micro-batches, of images of this process."""
    torch.manual_seed(0)
    config = dino.Config(prototypes=8, hidden_dim=8, bottleneck_dim=4, local_crops=0, crop_wise_backward=crop_wise)
    model = factory.Config("vit_tiny_patch16_224", TINY_MODEL)
    objective = dino.build(config, model, data.Config(image_size=32), 1, 2).train()
    settings = optim.Config(base_lr=0.01, clip=None, eps=1e-3)  # rounding stays small
    wrapped, optimizer = accelerator.prepare(objective, optim.make_optimizer(settings, objective))
    for step in range(2):
        batches = batches_of(10 * step + rank())[1]
        train_step(accelerator, wrapped, optimizer, batches, step, Window(), accumulate=2, seed=0, config=settings)
    return objective.state_dict()


def batch_norm_dino() -> nn.Module:
    torch.manual_seed(0)
    model = factory.Config("resnet18", {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]})
    config = dino.Config(prototypes=8, hidden_dim=8, bottleneck_dim=4, local_crops=0, drop_path=0.0)
    return dino.build(config, model, data.Config(image_size=32), 1, 2).train()


def batches_of(rank: int) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(rank)
    images = [torch.randn(2, 4, 3, 32, 32, generator=generator) + rank for _ in range(2)]
    keys = torch.arange(4) + 4 * rank
    return [torch.randn(5, 3, generator=generator) + rank for _ in range(2)], [
        {"key": keys, "global": crops} for crops in images
    ]


def loss_of(model: nn.Module, batch, step: int) -> dict[str, torch.Tensor]:
    return model(batch, step) if isinstance(batch, dict) else {"loss": model(batch).square().mean()}


def test_statistics_of_batch_norm_and_crop_wise_gradients_are_those_of_all_processes(tmp_path):
    """Each process normalises with its own images; the running statistics, which are evaluated, are averaged."""
    started = [
        processes.begin(statistics_after_steps, str(tmp_path), output=tmp_path / "log", environment=environment)
        for environment in processes.environments(2)
    ]
    for process in started:
        processes.finish(process, tmp_path / "log")
    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in (0, 1))
    for ours, theirs in zip(first, second, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert {name.split(".")[0] for name in first[1] if "running_mean" in name} == {"student", "teacher"}
    # Crop-wise backward passes average the gradients once, in the last one.
    (whole, parts), (_, others) = (torch.load(tmp_path / f"dino_{rank}", weights_only=True) for rank in (0, 1))
    assert any(not torch.equal(whole[name], value) for name, value in parts.items())
    for name, value in whole.items():
        assert torch.equal(parts[name], others[name]), name
        assert torch.allclose(parts[name], value, atol=1e-5), name
    alone = [nn.BatchNorm1d(3), nn.BatchNorm1d(3)]
    for number, norm in enumerate(alone):
        for batch in batches_of(number)[0]:
            norm(batch)
    for name in ("running_mean", "running_var"):
        expected = (getattr(alone[0], name) + getattr(alone[1], name)) / 2
        assert torch.allclose(first[0][f"0.{name}"], expected, atol=1e-6)
