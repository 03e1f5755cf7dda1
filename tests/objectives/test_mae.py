import math

import pytest
import torch

from sslvit import data, rng
from sslvit.errors import UserError
from sslvit.model import factory, masks
from sslvit.model.encoder import patchify, take
from sslvit.objectives import mae
from tests.conftest import TINY_MODEL
from tests.oracles import mae as oracle
from tests.oracles.dino import koleo as koleo_oracle

SMALL = factory.Config("vit_tiny_patch16_224", TINY_MODEL | {"embed_dim": 16, "patch_size": 4})
CONFIG = {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}


def build(model: factory.Config = SMALL, size: int | tuple[int, int] = 12, in_chans: int = 3, **settings) -> mae.MAE:
    torch.manual_seed(0)
    return mae.build(mae.Config(**CONFIG | settings), model, data.Config(image_size=size, in_chans=in_chans), 1, 2)


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(("size", "in_chans", "ratio"), [((12, 12), 3, 0.75), ((8, 16), 1, 0.5)])
def test_the_loss_equals_a_slow_oracle(norm_pix, size, in_chans, ratio):
    module = build(size=size, in_chans=in_chans, norm_pix=norm_pix, mask_ratio=ratio)
    images = torch.randn(2, in_chans, *size)
    order = masks.random_order(rng.fold_in(0, torch.arange(2)), module.num_patches)
    expected = oracle.loss(module.state_dict(), images, order, module.num_kept, 4, (2, 2), norm_pix)
    assert module.loss(images, order)["loss"].item() == pytest.approx(expected, abs=1e-5)


def test_initialisation_is_the_papers():
    module = build(factory.Config("vit_tiny_patch16_224", {"depth": 2, "patch_size": 16}), size=64, decoder_width=128)
    vit = module.encoder.model
    for weight in (vit.blocks[0].attn.qkv.weight, vit.blocks[0].mlp.fc1.weight, module.decoder_pred.weight):
        bound = math.sqrt(6 / sum(weight.shape))  # Xavier on the matrix as it stands: the fused qkv is (3D, D)
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    stem = vit.patch_embed.proj.weight
    assert stem.abs().max().item() == pytest.approx(math.sqrt(6 / (192 + 768)), rel=0.01)
    assert vit.patch_embed.proj.bias.abs().max() > 0  # the convolution's default is left alone
    assert vit.blocks[0].attn.qkv.bias.abs().max() == 0
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert module.mask_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert not vit.pos_embed.requires_grad
    assert not module.decoder_pos_embed.requires_grad
    assert vit.pos_embed[0, 0].abs().max() == 0
    assert [b.norm1.eps for b in module.decoder_blocks] + [vit.norm.eps, module.decoder_norm.eps] == [1e-6] * 3


def test_visible_patches_carry_no_loss_and_hidden_pixels_reach_only_the_target():
    module = build()
    images, order = torch.randn(1, 3, 12, 12), torch.arange(9).unsqueeze(0)
    before = module.loss(images, order)["loss"]
    _, hide = masks.split(order, module.num_kept)
    latent = module.encode(images, order[:, : module.num_kept])
    images[:, :, :, 8:] = 5.0  # patches 2, 5 and 8
    assert torch.equal(module.encode(images, order[:, : module.num_kept]), latent)
    assert module.loss(images, order)["loss"] != before
    assert 2 in hide


def test_gray_patches_have_finite_targets():
    module = build()
    images = torch.zeros(1, 3, 12, 12)
    assert torch.isfinite(module.loss(images, torch.arange(9).unsqueeze(0))["loss"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer works on the whole grid"),
        ("mobilevitv2_050", "works on the whole grid"),
        ("convit_tiny", "works on the whole grid"),
        ("vit_small_r26_s32_224", "stem lets neighbouring patches"),
    ],
)
def test_backbones_that_cannot_drop_tokens_are_refused_with_the_reason(name, reason):
    with pytest.raises(UserError) as error:
        build(factory.Config(name), size=224)
    assert reason in str(error.value)
    assert "method=dino" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask_ratio": 1.5}, "mask_ratio=1.5 must lie between 0 and 1"),
        ({"mask_ratio": 0.0}, "mask_ratio=0.0"),
        ({"mask_ratio": 0.95}, "leaves 0 of 9 patches"),
        ({"decoder_width": 10, "decoder_heads": 3}, "divisible by decoder_heads=3"),
    ],
)
def test_settings_that_cannot_be_get_a_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        build(**settings)


def test_koleo_spreads_the_mean_of_the_kept_patches_by_its_weight():
    module, weighted = build(), build(koleo_weight=0.5)
    images, order = torch.randn(5, 3, 12, 12), masks.random_order(rng.fold_in(0, torch.arange(5)), 9)
    values = weighted.loss(images, order)
    kept = masks.split(order, module.num_kept)[0]
    features = weighted.encoder.features(images, pool="mean", keep=kept).detach()
    assert values["koleo"].item() == pytest.approx(koleo_oracle(features), rel=1e-4)
    assert values["reconstruction"].item() == module.loss(images, order)["loss"].item()
    assert values["loss"].item() == pytest.approx(values["reconstruction"].item() + 0.5 * values["koleo"].item())


@pytest.mark.parametrize(("size", "norm_pix"), [((12, 12), True), ((8, 16), False)])
def test_its_pictures_show_the_prediction_that_the_loss_measures(size, norm_pix):
    module, images, key = build(size=size, norm_pix=norm_pix), torch.randn(2, 3, *size), rng.fold_in(0, torch.arange(2))
    order = masks.random_order(key, module.num_patches)
    keep, hide = masks.split(order, module.num_kept)
    made = module.pictures({"key": key, "image": images.unsqueeze(0)})
    seen, made, real = (patchify(x, (4, 4), channels_last=True) for x in (*made.values(), images))
    assert torch.equal(take(made, keep), take(real, keep))
    assert torch.equal(take(seen, keep), take(real, keep))
    assert not take(seen, hide).any()
    made, real = take(made, hide), take(real, hide)
    if norm_pix:
        variance, mean = torch.var_mean(real, dim=-1, keepdim=True)
        made, real = ((x - mean) / (variance + 1e-6).sqrt() for x in (made, real))
    expected = module.loss(images, order)["loss"].item()
    assert (made - real).square().mean().item() == pytest.approx(expected, abs=1e-5)
