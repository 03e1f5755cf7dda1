"""Attention maps against timm's own, rollout and colours against their definitions, and the picture."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sslvit.data.augment import Normalize
from sslvit.evaluation import attention
from sslvit.model import factory
from tests.conftest import TINY_MODEL

PLAIN = Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def build(size=(32, 32), **more):
    torch.manual_seed(0)
    built = factory.create(factory.Config("vit_tiny_patch16_224", {**TINY_MODEL, **more}), size).eval()
    for block in built.model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.3)  # attention that is not even
        for norm in (block.attn.q_norm, block.attn.k_norm):
            if hasattr(norm, "weight"):
                torch.nn.init.uniform_(norm.weight, 0.5, 2)
    return built


@pytest.mark.parametrize(
    "more", [{}, {"reg_tokens": 2}, {"qk_norm": True}, {"class_token": False, "global_pool": "avg"}]
)
def test_the_maps_are_those_that_timm_multiplies_the_values_with(more):
    built, x = build(**more), torch.rand(3, 3, 32, 32)
    found = [attention.attend(built, PLAIN, x, block, with_means=True) for block in (0, -1)]
    theirs = []
    for block in built.model.blocks:
        block.attn.fused_attn = False  # then the softmax goes through a module of its own
        block.attn.attn_drop.register_forward_pre_hook(lambda module, args: theirs.append(args[0]))
    with torch.inference_mode():
        tokens = built.model.forward_features(PLAIN(x))
    assert len(theirs) == 2
    for ours, their in zip(found, theirs, strict=True):
        assert torch.allclose(ours.weights, their, atol=1e-6)
        assert torch.allclose(ours.weights.sum(dim=-1), torch.ones(their.shape[:3]), atol=1e-5)
    for ours, their in zip(found[0].means, theirs, strict=True):
        assert torch.allclose(ours, their.mean(dim=1), atol=1e-6)
    assert torch.allclose(found[0].patches, tokens[:, built.model.num_prefix_tokens :], atol=1e-4)
    assert not any(block._forward_pre_hooks for block in built.model.blocks)


@pytest.mark.parametrize("fused", [True, False])
def test_the_maps_equal_a_softmax_by_hand(fused):
    built, x = build(), torch.rand(1, 3, 32, 32)
    for block in built.model.blocks:
        block.attn.fused_attn = fused  # off, as on a CPU in bf16, where blocks pass their attention module by
    weights = attention.attend(built, PLAIN, x, block=0).weights
    vit, block = built.model, built.model.blocks[0]
    with torch.no_grad():
        tokens = block.norm1(vit._pos_embed(vit.patch_embed(PLAIN(x))))[0].double()
    weight, bias = block.attn.qkv.weight.detach().double(), block.attn.qkv.bias.detach().double()
    for head in range(2):
        rows = slice(24 * head, 24 * head + 24)
        q = tokens @ weight[rows].t() + bias[rows]
        k = tokens @ weight[48:96][rows].t() + bias[48:96][rows]
        scores = [
            [sum(a * b for a, b in zip(q[i].tolist(), k[j].tolist(), strict=True)) for j in range(17)] for i in (0, 5)
        ]
        expected = (torch.tensor(scores, dtype=torch.float64) / 24**0.5).softmax(dim=-1)
        assert torch.allclose(weights[0, head, [0, 5]].double(), expected, atol=1e-5)


def test_rollout_is_the_product_of_half_attention_and_half_identity():
    means = [torch.rand(2, 5, 5).softmax(dim=-1) for _ in range(3)]
    through = attention.rollout(means)
    for i in range(2):
        expected = torch.eye(5)
        for mean in means:
            expected = (mean[i] + torch.eye(5)) / 2 @ expected
        assert torch.allclose(through[i], expected, atol=1e-6)
    assert torch.allclose(through.sum(dim=-1), torch.ones(2, 5), atol=1e-6)


def test_the_query_is_the_class_token_or_the_mean_of_the_patches():
    weights = torch.rand(2, 3, 7, 7).softmax(dim=-1)  # a class token, two registers and four patches
    assert torch.equal(attention.from_query(weights, "cls", 3), weights[:, :, 0, 3:])
    assert torch.allclose(attention.from_query(weights, "mean", 3), weights[:, :, 3:, 3:].mean(dim=2))


def test_heads_are_described_by_entropy_distance_and_what_goes_to_prefix_tokens():
    even = torch.full((1, 1, 5, 5), 0.2)  # one prefix token and 2 x 2 patches
    near = torch.eye(5).view(1, 1, 5, 5)
    (of_even,), (of_near,) = (attention.describe(w, "mean", 1, (2, 2)).tolist() for w in (even, near))
    assert of_even == pytest.approx([np.log2(5), (0 + 1 + 1 + 2**0.5) / 4, 20], abs=1e-3)
    assert of_near == [0, 0, 0]


def test_colours_follow_the_directions_in_which_tokens_differ():
    generator = torch.Generator().manual_seed(0)
    place = torch.rand(4, 25, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0])
    basis = torch.linalg.qr(torch.randn(10, 10, generator=generator))[0][:3]
    colours = attention.principal_colours(place @ basis + 7)
    assert colours.shape == (4, 25, 3)
    assert colours.min() == 0
    assert colours.max() == 1
    for axis in range(3):
        pair = torch.stack([colours[..., axis].flatten(), place[..., axis].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.95
    assert torch.isfinite(attention.principal_colours(torch.ones(1, 4, 8))).all()


@pytest.mark.parametrize("size", [None, 64])
def test_the_command_draws_a_row_an_image_and_describes_the_heads(cli, images, colour_run, tmp_path, size):
    out, picture = tmp_path / "result.json", tmp_path / "attention.png"
    more = [f"size={size}"] if size else ["query=mean"]
    words = ["attention", f"run={colour_run}", f"data={images}", f"picture={picture}", f"out={out}", "images=3", *more]
    status, printed, _ = cli(*words, "rollout=true")
    assert status == 0
    record = json.loads(out.read_text())
    assert record["patches"] == ([8, 8] if size else [4, 4])
    assert record["results"]["query"] == ("cls" if size else "mean")
    assert record["results"]["block"] == 1
    assert len(record["results"]["heads"]) == 2
    assert "on prefix %" in printed
    image = Image.open(picture)
    assert image.width >= 6 * 128  # the image, its patches, mean, rollout and two heads
    assert image.height >= 3 * 128
    before = picture.read_bytes()
    assert cli(*words, "rollout=true")[0] == 0
    assert picture.read_bytes() == before


def test_bad_input_gets_a_sentence(fails, images, colour_run, tmp_path):
    run, data, picture = f"run={colour_run}", f"data={images}", f"picture={tmp_path / 'p.png'}"
    assert "data is missing" in fails("attention", run, picture)
    assert "picture is missing" in fails("attention", run, data)
    assert "there is no folder" in fails("attention", run, data, f"picture={tmp_path / 'no' / 'p.png'}")
    assert "size=36 is not divisible by the patch size 8" in fails("attention", run, data, picture, "size=36")
    assert "block=2 is not one of the 2 blocks" in fails("attention", run, data, picture, "block=2")
    assert "images=0" in fails("attention", run, data, picture, "images=0")
    assert "no patch tokens" in fails("attention", "run=pixels", data, picture)
    assert "no patch tokens" in fails("attention", "run=random:resnet18", "image_size=32", data, picture)
    without = "model_args={patch_size: 8, depth: 1, class_token: false, global_pool: avg}"
    random = ["run=random:vit_tiny_patch16_224", "image_size=32", without]
    assert "has no class token: use query=mean" in fails("attention", *random, data, picture, "query=cls")
    assert not (tmp_path / "p.png").exists()
