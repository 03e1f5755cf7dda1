import pytest
import torch
import torch.nn.functional as F

from sslvit.model.heads import PrototypeHead, koleo
from tests.oracles import dino as oracle


def test_prototypes_stay_in_float32_under_bf16():
    """Divided by a temperature of 0.04, bf16's rounding of a cosine near 1 would be a tenth."""
    torch.manual_seed(0)
    head = PrototypeHead(12, prototypes=64, hidden_dim=16, bottleneck_dim=8, layers=2, train_gain=False)
    x = torch.randn(32, 12)
    with torch.autocast("cpu", torch.bfloat16):
        logits, features = head(x), head.mlp(x)
    assert features.dtype == torch.bfloat16
    cosines = F.normalize(features.double(), dim=-1) @ F.normalize(head.last_layer.weight_v.double(), dim=-1).t()
    assert logits.dtype == torch.float32
    assert torch.allclose(logits.double(), cosines, atol=1e-6)


def test_koleo_equals_a_slow_oracle_and_spreads_features():
    features = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = koleo(features)
    assert value.item() == pytest.approx(sum(oracle.koleo(crop) for crop in features.detach()), rel=1e-5)
    value.backward()
    moved = (features - 0.1 * features.grad).detach()
    assert oracle.koleo(moved[0]) < oracle.koleo(features.detach()[0])
    assert koleo(features[:, :1]).item() == 0
    same = torch.ones(1, 3, 5, requires_grad=True)  # features in one place: still a finite gradient
    koleo(same).backward()
    assert torch.isfinite(same.grad).all()


def test_koleo_finds_the_nearest_of_features_that_are_nearly_alike_under_bf16_too():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 1, 32, generator=generator) + 0.05 * torch.randn(1, 64, 32, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = koleo(features)
    assert value.item() == pytest.approx(oracle.koleo(features[0]), rel=1e-4)
