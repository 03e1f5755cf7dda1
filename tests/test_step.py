"""One optimizer step by itself, with a module of two numbers."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from sslvit import optim
from sslvit.metrics import Window
from sslvit.step import train_step


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
