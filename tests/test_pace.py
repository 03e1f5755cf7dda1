"""minutes=: the length of a run follows from its speed, and no step before the correction changes."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sslvit import config, objectives, optim
from sslvit.checkpoints import state
from sslvit.pace import Pace, unchanged
from sslvit.pretraining import pretrain

from .conftest import words


def weights(out: Path) -> dict[str, torch.Tensor]:
    step = state.steps_saved(out)[-1]
    return load_file(state.folder_of(out, step) / "model.safetensors")


def test_a_corrected_run_is_the_run_of_its_config(images, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    more = ["lr_schedule=hold", "steps=4000", "workers=0", "precision=float32", "save.every_steps=3"]
    first = config.load([str(images), *words("mae", *more), "minutes=0.068", f"out={out}"])
    began = time.monotonic()
    result = pretrain(first, began)
    assert time.monotonic() - began < 20
    assert 5 < result.steps < 4000
    stored = config.load([str(out / "config.yaml"), f"out={again}"])
    assert stored.steps == result.steps
    stored.minutes = None
    assert pretrain(stored).steps == result.steps
    one, two = weights(out), weights(again)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def schedule(shape: str, steps: int = 1000) -> optim.Schedule:
    return optim.Schedule(optim.Config(lr_schedule=shape), 256, 50, steps)


def objective(images: Path, *more: str) -> objectives.Objective:
    loaded = config.load([str(images), *words("dino" if more else "mae", *more)])
    return objectives.start(loaded, 4, 1000)


def test_a_length_changes_only_while_no_step_depends_on_it(images):
    mae, rising = objective(images), objective(images, "momentum=0.9")
    constant = objective(images, "momentum=0.9", "momentum_end=0.9")
    assert unchanged(schedule("hold"), mae, 600, 900) == schedule("hold", 900)
    assert unchanged(schedule("hold"), mae, 710, 900) is None  # the rate falls from step 700
    assert unchanged(schedule("hold"), mae, 600, 800) is None  # it would have fallen from step 560
    assert unchanged(schedule("warmup_cosine"), mae, 50, 900) is not None
    assert unchanged(schedule("warmup_cosine"), mae, 80, 900) is None
    assert unchanged(schedule("hold"), rising, 600, 900) is None
    assert rising.scheduled(500) == objective(images, "momentum=0.9").scheduled(500)  # as it was
    assert unchanged(schedule("hold"), constant, 600, 900) is not None
    decayed = dataclasses.replace(schedule("hold"), config=optim.Config(lr_schedule="hold", weight_decay_end=0.4))
    assert unchanged(decayed, mae, 600, 900) is None


@pytest.mark.parametrize(("speed", "later"), [(10.0, 10.0), (10.0, 5.0), (2.0, 3.0), (100.0, 60.0)])
def test_a_run_ends_in_time_though_its_speed_changes(speed, later, monkeypatch):
    """600 seconds, of which 20 pass before the loop and 30 after it. The speed changes after a third of the time."""
    now = [20.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    plan = config.Plan(layout=None, steps_per_epoch=100, steps=4000, warmup_steps=100)
    pace, step, steps, forecast = Pace(600.0, state.RunState(), plan), 0, 4000, None
    while step < steps:
        step += 1
        now[0] += 1 / (speed if now[0] < 200 else later)
        if (new := pace.steps(step, steps, 30.0)) and step < 0.7 * min(steps, new) + 1:
            steps = new
        if forecast is None and now[0] > 80:
            forecast = now[0] + (steps - step) / speed + 32
    assert now[0] + 32 == pytest.approx(600, rel=0.05)
    assert forecast == pytest.approx(600, rel=0.15)


def test_hold_is_constant_until_seventy_percent():
    rates = [schedule("hold").lr(step) for step in range(1001)]
    assert rates[0] == 0
    assert set(rates[50:701]) == {schedule("hold").peak_lr}
    assert rates[701:] == sorted(rates[701:], reverse=True)
    assert rates[1000] == 0
