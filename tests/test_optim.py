import math

import pytest
import torch
from torch import nn

from sslvit import data, optim
from sslvit.errors import UserError, check_limits
from sslvit.model import factory
from sslvit.objectives import dino, mae

from .conftest import TINY_MODEL

MODEL = factory.Config("vit_tiny_patch16_224", TINY_MODEL)


def group_names(module: nn.Module) -> tuple[set[str], set[str]]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    decayed, others = optim.parameter_groups(module)
    return {names[p] for p in decayed["params"]}, {names[p] for p in others["params"]}


def test_mae_decays_its_tokens_but_no_bias_norm_or_frozen_embedding():
    decayed, others = group_names(
        mae.build(mae.Config(decoder_width=32, decoder_heads=2), MODEL, data.Config(image_size=32), 1, 2)
    )
    assert {"mask_token", "encoder.model.cls_token", "decoder_embed.weight"} <= decayed
    assert not any("pos_embed" in name for name in decayed | others)
    assert not any("norm" in name for name in decayed)
    assert all(name.endswith(("bias", "norm1.weight", "norm2.weight", "norm.weight")) for name in others)


def test_dino_decays_its_position_embedding_and_its_gains_if_they_learn():
    config = dino.Config(prototypes=8, norm_last_layer=False, local_crops=0)
    decayed, others = group_names(dino.build(config, MODEL, data.Config(image_size=32), 1, 2))
    assert {"student.encoder.model.pos_embed", "student.encoder.model.cls_token"} <= decayed
    assert {"student.head.last_layer.weight_g", "student.head.last_layer.weight_v"} <= decayed
    assert not any(name.startswith("teacher.") for name in decayed | others)


def parameters(*gradients: list[float]) -> list[nn.Parameter]:
    result = []
    for gradient in gradients:
        result.append(nn.Parameter(torch.zeros(len(gradient))))
        result[-1].grad = torch.tensor(gradient)
    return result


def test_clipping_each_tensor_by_itself_is_not_clipping_all_together():
    each, together = parameters([3.0, 4.0], [0.3, 0.4]), parameters([3.0, 4.0], [0.3, 0.4])
    norm = optim.clip_gradients(each, optim.Config(clip=1.0, clip_mode="tensor"))
    assert norm.item() == pytest.approx(25.25**0.5)
    assert each[0].grad.tolist() == pytest.approx([0.6, 0.8], abs=1e-5)
    assert each[1].grad.tolist() == pytest.approx([0.3, 0.4])
    optim.clip_gradients(together, optim.Config(clip=1.0, clip_mode="global"))
    assert torch.cat([p.grad for p in together]).norm().item() == pytest.approx(1.0, abs=1e-5)
    assert together[1].grad.norm() / together[0].grad.norm() == pytest.approx(0.1)


def test_without_a_limit_nothing_is_clipped_and_missing_gradients_are_passed_over():
    some = [*parameters([30.0, 40.0]), nn.Parameter(torch.zeros(3))]
    assert optim.clip_gradients(some, optim.Config(clip=None)).item() == pytest.approx(50)
    assert some[0].grad.tolist() == [30.0, 40.0]


@pytest.mark.parametrize("change", [{"base_lr": 0}, {"weight_decay": -1}, {"betas": (0.9, 1.0)}, {"clip": 0.0}])
def test_values_without_meaning_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        check_limits("optim.", optim.Config(**change))


def test_mae_warms_up_from_exactly_zero_and_would_end_one_step_after_the_last():
    lr = [optim.warmup_cosine(i, 1.0, 0.0, 10, 110) for i in range(111)]
    assert lr[0] == 0
    assert lr[5] == 0.5
    assert lr[10] == 1.0
    assert lr[60] == pytest.approx(0.5)
    assert 0 < lr[109] < 1e-3
    assert lr[110] == pytest.approx(0)


def test_dino_reaches_its_peak_twice():
    lr = [optim.warmup_cosine(i, 1.0, 0.1, 10, 110, linspace=True) for i in range(110)]
    assert lr[0] == 0
    assert lr[9] == lr[10] == 1.0
    assert lr[1] == pytest.approx(1 / 9)
    assert lr[-1] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 99 / 100)))


def test_without_warm_up_the_first_step_has_the_peak():
    assert optim.warmup_cosine(0, 1.0, 0.0, 0, 10) == 1.0
    assert optim.warmup_cosine(0, 1.0, 0.0, 0, 10, linspace=True) == 1.0
    assert optim.warmup_cosine(0, 1.0, 0.0, 1, 10, linspace=True) == 0.0


def test_learning_rate_scales_with_the_global_batch_and_weight_decay_follows_its_cosine():
    schedule = optim.Schedule(optim.Config(base_lr=1e-3, weight_decay=0.04, weight_decay_end=0.4), 1024, 0, 100)
    assert schedule.peak_lr == pytest.approx(4e-3)
    assert schedule.weight_decay(0) == pytest.approx(0.04)
    assert schedule.weight_decay(50) == pytest.approx(0.22)
    assert schedule.weight_decay(99) < 0.4
    assert optim.Schedule(optim.Config(weight_decay=0.05), 256, 0, 100).weight_decay(77) == 0.05
