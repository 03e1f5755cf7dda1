import math

import pytest

from sslvit import schedules
from sslvit.optim import Config, Schedule


def test_mae_warms_up_from_exactly_zero_and_would_end_one_step_after_the_last():
    lr = [schedules.warmup_cosine(i, 1.0, 0.0, 10, 110) for i in range(111)]
    assert lr[0] == 0
    assert lr[5] == 0.5
    assert lr[10] == 1.0
    assert lr[60] == pytest.approx(0.5)
    assert 0 < lr[109] < 1e-3
    assert lr[110] == pytest.approx(0)


def test_dino_reaches_its_peak_twice():
    lr = [schedules.warmup_cosine(i, 1.0, 0.1, 10, 110, linspace=True) for i in range(110)]
    assert lr[0] == 0
    assert lr[9] == lr[10] == 1.0
    assert lr[1] == pytest.approx(1 / 9)
    assert lr[-1] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 99 / 100)))


def test_without_warm_up_the_first_step_has_the_peak():
    assert schedules.warmup_cosine(0, 1.0, 0.0, 0, 10) == 1.0
    assert schedules.warmup_cosine(0, 1.0, 0.0, 0, 10, linspace=True) == 1.0
    assert schedules.warmup_cosine(0, 1.0, 0.0, 1, 10, linspace=True) == 0.0


def test_learning_rate_scales_with_the_global_batch_and_weight_decay_follows_its_cosine():
    schedule = Schedule(Config(base_lr=1e-3, weight_decay=0.04, weight_decay_end=0.4), 1024, 0, 100)
    assert schedule.peak_lr == pytest.approx(4e-3)
    assert schedule.weight_decay(0) == pytest.approx(0.04)
    assert schedule.weight_decay(50) == pytest.approx(0.22)
    assert schedule.weight_decay(99) < 0.4
    assert Schedule(Config(weight_decay=0.05), 256, 0, 100).weight_decay(77) == 0.05
