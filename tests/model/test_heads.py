import torch
import torch.nn.functional as F

from sslvit.model.heads import DINOHead


def test_prototypes_stay_in_float32_under_bf16():
    """Divided by a temperature of 0.04, bf16's rounding of a cosine near 1 would be a tenth."""
    torch.manual_seed(0)
    head = DINOHead(12, prototypes=64, hidden_dim=16, bottleneck_dim=8, layers=2, train_gain=False)
    x = torch.randn(32, 12)
    with torch.autocast("cpu", torch.bfloat16):
        logits, features = head(x), head.mlp(x)
    assert features.dtype == torch.bfloat16
    cosines = F.normalize(features.double(), dim=-1) @ F.normalize(head.last_layer.weight_v.double(), dim=-1).t()
    assert logits.dtype == torch.float32
    assert torch.allclose(logits.double(), cosines, atol=1e-6)
