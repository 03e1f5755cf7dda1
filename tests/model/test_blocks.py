"""Blocks that leave work out give what timm's blocks give."""

import pytest
import torch
from timm.layers import LayerScale
from timm.models.vision_transformer import Block

from sslvit.hardware import choose_attention
from sslvit.model import blocks, factory

ROWS = [slice(0, 1), slice(-6, None), slice(2, 5), None]


def block(**settings) -> Block:
    torch.manual_seed(0)
    built = Block(24, num_heads=3, qkv_bias=True, **settings)
    for parameter in built.parameters():  # gains of 1 and biases of 0 would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return built


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("settings", [{}, {"qk_norm": True, "init_values": 0.5, "scale_attn_norm": True}])
def test_some_rows_of_a_block_and_their_gradients_are_timms(rows, fused, settings):
    whole = block(**settings)
    whole.attn.fused_attn = fused
    assert blocks.is_plain(whole)
    assert isinstance(whole.ls1, LayerScale) == ("init_values" in settings)
    gradients = []
    for forward in (lambda x: whole(x)[:, rows or slice(None)], lambda x: blocks.run(whole, x, rows)):
        x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        whole.zero_grad()
        y = forward(x)
        y.square().sum().backward()
        gradients.append([y.detach(), x.grad, *(p.grad.clone() for p in whole.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_in_bf16_attention_is_as_near_to_float32_as_timms():
    whole = block()
    x = torch.randn(4, 17, 24, generator=torch.Generator().manual_seed(1))
    expected = whole(x)
    choose_attention(whole, torch.device("cpu"), "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = blocks.run(whole, x), whole(x)
    assert (ours - expected).norm() < 1.1 * (theirs - expected).norm()


def test_a_block_that_does_more_than_run_knows_is_called_whole():
    """Dropout of attention weights, another attention, a hook: then the rows are cut from its output."""
    with_dropout, with_hook = block(attn_drop=0.5), block()
    calls = []
    with_hook.register_forward_hook(lambda *_: calls.append(1))
    assert not blocks.is_plain(with_dropout.train())
    assert blocks.is_plain(with_dropout.eval())
    assert not blocks.is_plain(torch.nn.Linear(2, 2))
    assert blocks.run(with_hook, torch.randn(1, 9, 24), slice(0, 1)).shape == (1, 1, 24)
    assert calls == [1]


def test_training_on_the_class_token_leaves_the_patches_of_the_last_block_out():
    built = factory.create(factory.Config("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 48, "depth": 2,
                                                                   "num_heads": 2}), (32, 32))  # fmt: skip
    seen = []
    built.model.blocks[-1].mlp.register_forward_hook(lambda m, x, y: seen.append(y.shape[1]))
    images = torch.randn(2, 3, 32, 32)
    training = built.train().features(images, "cls")
    evaluated = built.eval().features(images, "cls")
    assert seen == [1, 17]
    assert torch.allclose(training, evaluated, atol=1e-5)
    assert torch.equal(evaluated, built.model(images))
