import pytest
import torch
from torch import nn

from sslvit.model.ema import EMA


def test_a_teacher_is_the_average_of_its_students_with_the_momentum_of_each_step():
    torch.manual_seed(0)
    teacher, student = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    ema, expected = EMA(start=0.6, end=1.0, steps=4), teacher.weight.detach().clone()
    momenta = [0.6, 0.6585786, 0.8, 0.9414214]  # 1 - 0.4 (1 + cos(pi step / 4)) / 2
    for step, momentum in enumerate(momenta):
        with torch.no_grad():
            student.weight.normal_()
            student.running_mean.normal_()
        ema.update(teacher, student, step)
        assert ema.momentum(step) == pytest.approx(momentum, abs=1e-7)
        expected = momentum * expected + (1 - momentum) * student.weight.detach()
        assert torch.allclose(teacher.weight, expected, atol=1e-6)
    assert teacher.running_mean.tolist() == [0, 0, 0]  # buffers are its own
