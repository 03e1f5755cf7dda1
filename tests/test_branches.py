"""A block written out by hand for CPUs in bf16 gives what the same block gives step by step."""

import copy

import pytest
import torch
from timm.models.vision_transformer import Block
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sslvit import blocks, branches
from sslvit.blocks import DropPath
from sslvit.hardware import choose_attention

pytestmark = pytest.mark.skipif(branches._product() is None, reason="this torch has no product that adds a bias")


def block(**settings) -> Block:
    torch.manual_seed(0)
    built = Block(48, num_heads=3, qkv_bias=True, **settings)
    for parameter in built.parameters():  # gains of 1 and biases of 0 would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    choose_attention(built, torch.device("cpu"), "bf16")
    return built


def tokens(images: int = 6) -> torch.Tensor:
    return torch.randn(images, 9, 48, generator=torch.Generator().manual_seed(1))


def results(built: Block, x: torch.Tensor, rows: slice | None = None, autocast: bool = True) -> list[torch.Tensor]:
    """The output, and the gradients for x and for all weights."""
    x = x.clone().requires_grad_()
    built.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = blocks.run(built, x, rows)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in built.parameters() if p.grad is not None)]


def by_hand(y: torch.Tensor) -> bool:
    return "Residual" in type(y.grad_fn).__name__


def step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "serve", lambda x: False)


@pytest.mark.parametrize("rows", [None, slice(0, 1), slice(-4, None)])
@pytest.mark.parametrize("drop", [False, True])
def test_output_and_gradients_are_as_near_to_float32_as_step_by_step(rows, drop, monkeypatch):
    built = block()
    if drop:
        built.drop_path1, built.drop_path2 = DropPath(0.5, 0), DropPath(0.5, 1)
        for part in (built.drop_path1, built.drop_path2):
            part.take(torch.arange(6))
    exact = results(built, tokens(), rows, autocast=False)
    ours = results(built, tokens(), rows)
    step_by_step(monkeypatch)
    theirs = results(built, tokens(), rows)
    assert len(ours) == len(theirs) == 14
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype == torch.float32
        assert (mine - truth).norm() < 1.2 * (other - truth).norm() + 1e-4 * truth.norm()
    if drop:  # the same images are dropped: those keep their tokens
        untouched = [(y[0] == tokens()[:, rows or slice(None)]).flatten(1).all(dim=1) for y in (ours, theirs)]
        assert torch.equal(*untouched)
        assert 0 < untouched[0].sum() < 6


def test_forward_is_bit_for_bit_that_of_step_by_step_when_training(monkeypatch):
    built, x = block(), tokens()
    ours = results(built, x)[0]
    step_by_step(monkeypatch)
    assert torch.equal(ours, results(built, x)[0])


def test_without_gradients_gelu_sees_more_digits(monkeypatch):
    built, x = block().eval(), tokens(64)
    exact = built(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = blocks.run(built, x)
        step_by_step(monkeypatch)
        theirs = blocks.run(built, x)
    assert not torch.equal(ours, theirs)
    assert (ours - exact).norm() < (theirs - exact).norm()


def test_frozen_weights_get_no_gradient_and_the_others_theirs():
    built, x = block(), tokens()
    full = dict(zip(["y", "x", *dict(built.named_parameters())], results(built, x), strict=True))
    frozen = ("norm1.weight", "attn.qkv.weight", "attn.qkv.bias", "mlp.fc2.weight", "norm2.bias")
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(name not in frozen)
    results(built, x)
    for name, parameter in built.named_parameters():
        assert (parameter.grad is None) == (name in frozen)
        assert name in frozen or torch.equal(parameter.grad, full[name])
    for parameter in built.attn.parameters():  # nothing before the second branch learns, not even x
        parameter.requires_grad_(False)
    built.norm1.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        blocks.run(built, x).square().sum().backward()
    assert built.mlp.fc1.weight.grad is not None


def test_recomputed_in_the_backward_pass_the_gradients_are_the_same():
    built = block()
    expected = results(built, tokens())
    x = tokens().requires_grad_()
    built.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(blocks.run, built, x, use_reentrant=False)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    for ours, theirs in zip([y, x.grad, *(p.grad for p in built.parameters())], expected, strict=True):
        assert torch.equal(ours, theirs)


def test_tall_products_give_the_same_gradients(monkeypatch):
    built = block()
    expected = results(built, tokens())
    monkeypatch.setattr(branches, "TALL", 1)
    for ours, theirs in zip(results(built, tokens()), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=0.02, atol=1e-3)


def test_blocks_with_more_than_two_plain_branches_go_step_by_step():
    seen = []
    watched, silu = block(), block(act_layer=torch.nn.SiLU)
    watched.mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
    others = [
        watched,
        silu,
        block(init_values=0.1),
        block(qk_norm=True),
        block(proj_drop=0.1),
        block(scale_mlp_norm=True),
    ]
    x = tokens().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert by_hand(blocks.run(block(), x))
        assert not any(by_hand(blocks.run(other, x)) for other in others)
        assert by_hand(blocks.run(block(proj_drop=0.1).eval(), x))
    assert seen == [1]
    assert not by_hand(blocks.run(block(), x))  # without autocast


def test_floating_point_operations_are_counted_as_step_by_step(monkeypatch):
    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            results(block(), tokens())
        return counter.get_total_flops()

    ours = count()
    step_by_step(monkeypatch)
    assert ours == count() > 0


def test_a_torch_whose_product_gives_other_numbers_is_not_used(monkeypatch):
    call = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: call(*args) + 1)
    assert branches._product.__wrapped__() is None
    monkeypatch.undo()
    assert branches._product.__wrapped__() is not None


def test_the_copy_of_a_block_has_its_own_weights():
    built = block()
    other = copy.deepcopy(built)
    with torch.no_grad():
        other.mlp.fc1.weight.zero_()
    assert not torch.equal(results(built, tokens())[0], results(other, tokens())[0])
