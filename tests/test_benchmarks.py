"""What speed is measured against does the same work: its losses are ours, step by step."""

import pytest

from tests.benchmarks.steps import Case, losses

TINY = ["model.name=vit_tiny_patch16_224", "model.args={patch_size: 8, embed_dim: 48, depth: 2, num_heads: 2}"]
CASES = {
    "mae": Case("mae", [*TINY, "image_size=32"], (32, 8, 48, 2, 2), 8, decoder=(32, 1, 2)),
    "dino": Case("dino", [*TINY, "image_size=32"], (32, 8, 48, 2, 2), 8, local=(2, 16), prototypes=64),
}


@pytest.mark.parametrize("method", list(CASES))
def test_plain_losses_are_ours(method):
    found = losses(CASES[method], steps=20)
    assert found["sslvit float32"] == pytest.approx(found["plain float32"], rel=1e-5)
    assert found["sslvit bf16"] == pytest.approx(found["plain float32"], rel=2e-3)
    assert abs(found["plain float32"][-1] / found["plain float32"][0] - 1) > 0.01  # it does train
