"""DINO's loss, center and teacher in float64, pair by pair, from Caron et al. (2021), algorithm 1 and equations 2 to
4."""

import torch
from torch import Tensor


def softmax(logits: Tensor) -> Tensor:
    exp = torch.exp(logits - logits.max())
    return exp / exp.sum()


def loss(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float) -> float:
    """[V, B, K] student logits, [2, B, K] teacher logits of the same first two crops, [K] -> the mean over all pairs of
    different crops and all images of the cross-entropy."""
    total, pairs = 0.0, 0
    for t in range(2):
        for s in range(len(student)):
            if s == t:
                continue
            pairs += 1
            for b in range(student.shape[1]):
                target = softmax((teacher[t, b].double() - center.double()) / teacher_temp)
                log_p = torch.log(softmax(student[s, b].double() / student_temp))
                total -= float((target * log_p).sum())
    return total / pairs / student.shape[1]


def center(old: Tensor, teacher: Tensor, momentum: float) -> Tensor:
    """[K], [2, B, K] -> [K]."""
    return momentum * old.double() + (1 - momentum) * teacher.double().flatten(0, 1).mean(dim=0)


def koleo(features: Tensor) -> float:
    """[B, D] -> minus the mean logarithm of each unit vector's distance to the nearest other one."""
    unit = [x.double() / x.double().norm() for x in features]
    nearest = [min(float((a - b).norm()) for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)]
    return -float(torch.tensor(nearest, dtype=torch.float64).log().mean())
