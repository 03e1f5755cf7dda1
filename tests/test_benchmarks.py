"""What speed is measured against does the same work: its losses are ours, step by step."""

import pytest
import torch
from torchvision import transforms

from tests.benchmarks import input as pipelines
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


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_the_input_benchmark_makes_its_images_and_its_pipelines_give_the_same_crops(method, tmp_path, capsys):
    sizes = pipelines.SMALL
    folder = pipelines.make_small(tmp_path / "small", count=4)
    pipelines.compare("small", folder, sizes, method, images=4, rounds=1, cache=True)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6
    assert all(float(line.split()[-1]) > 0 for line in printed)
    path = next(folder.iterdir())
    assert torch.equal(transforms.functional.pil_to_tensor(pipelines.pil_image(path)), pipelines.tensor_image(path))
    ours = [crop.size for crops in pipelines.our_views(method, sizes).values() for crop in crops]
    published, tensors = getattr(pipelines, f"published_{method}"), getattr(pipelines, f"v2_{method}")
    for crops in (published(sizes)(pipelines.pil_image(path)), tensors(sizes)(pipelines.tensor_image(path))):
        assert [tuple(crop.shape[-2:]) for crop in (crops if method == "dino" else [crops])] == ours


def test_the_input_benchmark_makes_photos(tmp_path):
    folder = pipelines.make_photos(tmp_path / "photos", count=1)
    assert pipelines.tensor_image(next(folder.iterdir())).shape == (3, 375, 500)
    large = pipelines.make_large(folder, tmp_path / "large", count=1)
    assert pipelines.tensor_image(next(large.iterdir())).shape == (3, 2250, 3000)
