import copy

import pytest
import timm
import torch

from sslvit import rng
from sslvit.errors import UserError
from sslvit.model import encoder, factory
from sslvit.model.factory import Config

from ..conftest import TINY_MODEL

VITS = {
    "plain": ({}, (32, 32), 3),
    "registers": ({"reg_tokens": 4}, (32, 32), 3),
    "not square": ({}, (16, 48), 3),
    "one channel": ({}, (32, 32), 1),
    "five channels": ({}, (32, 32), 5),
    "no class token": ({"class_token": False, "global_pool": "avg"}, (32, 32), 3),
    "positions for patches only": ({"no_embed_class": True, "reg_tokens": 2}, (32, 32), 3),
    "norm before the blocks": ({"pre_norm": True}, (32, 32), 3),
    "layer scale": ({"init_values": 1e-2, "qk_norm": True}, (32, 32), 3),
    "patches not square": ({"patch_size": (8, 4)}, (32, 32), 3),
}


def make(kind: str) -> tuple[encoder.Encoder, torch.Tensor]:
    args, size, in_chans = VITS[kind]
    torch.manual_seed(0)
    built = factory.create(Config("vit_tiny_patch16_224", TINY_MODEL | args), size, in_chans).eval()
    return built, torch.randn(3, in_chans, *size)


@pytest.mark.parametrize("kind", VITS)
def test_tokens_equal_timms_forward_features_bit_for_bit(kind):
    built, images = make(kind)
    tokens = built(images)
    assert torch.equal(torch.cat(tokens, dim=1), built.model.forward_features(images))
    assert tokens.patches.shape[1] == built.grid()[0] * built.grid()[1]


@pytest.mark.parametrize("kind", VITS)
def test_kept_patches_are_embedded_and_encoded_alone(kind):
    """Keeping all patches in another order gives the same tokens; keeping some equals attention over some."""
    built, images = make(kind)
    whole = built(images)
    order = torch.stack([torch.randperm(whole.patches.shape[1]) for _ in images])
    shuffled = built(images, keep=order)
    assert torch.allclose(shuffled.patches, encoder.take(whole.patches, order), atol=1e-5)
    assert torch.allclose(shuffled.prefix, whole.prefix, atol=1e-5)

    vit, keep = built.model, order[:, :3]
    x = vit._pos_embed(vit.patch_embed(images))
    p = vit.num_prefix_tokens
    x = vit.norm_pre(torch.cat([x[:, :p], encoder.take(x[:, p:], keep)], dim=1))
    assert torch.allclose(torch.cat(built(images, keep=keep), dim=1), vit.norm(vit.blocks(x)), atol=1e-5)


def test_hidden_pixels_cannot_influence_the_tokens():
    built, images = make("plain")
    keep = torch.tensor([[0, 5]]).expand(3, -1)
    before = built(images, keep=keep).patches
    changed = images.clone()
    changed[:, :, 24:, 24:] = 9.0  # patch 15
    assert torch.equal(built(changed, keep=keep).patches, before)


@pytest.mark.parametrize("size", [(16, 16), (48, 32)])
def test_other_image_sizes_resample_the_positions_as_timm_does(size):
    built, _ = make("plain")
    images = torch.randn(2, 3, *size)
    assert torch.equal(torch.cat(built(images), dim=1), built.model.forward_features(images))
    everything = torch.arange(size[0] * size[1] // 64).expand(2, -1)
    assert torch.allclose(built(images, keep=everything).patches, built(images).patches, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "registers", "not square", "positions for patches only", "no class token"])
def test_positions_are_resampled_as_published_where_asked(kind):
    """Bicubic by a factor for a target that is 0.1 larger, as in DINO's released code; nothing at the own size."""
    built, images = make(kind)
    assert torch.equal(built(images, resampling="published").patches, built(images).patches)
    vit, (h, w) = built.model, built.grid()
    table = vit.pos_embed[:, vit.pos_embed.shape[1] - h * w :].detach().clone()
    with torch.no_grad():
        vit.pos_embed[:, -h * w :] = torch.randn_like(table)
    table = vit.pos_embed[:, -h * w :].reshape(1, h, w, 48).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(table, scale_factor=(1.1 / h, 3.1 / w), mode="bicubic")
    assert expected.shape[-2:] == (1, 3)
    small = images[:, :, :8, :24]
    fitted = copy.deepcopy(built)  # a model of that size with the expected table
    fitted.model.set_input_size((8, 24))
    with torch.no_grad():
        fitted.model.pos_embed[:, -3:] = expected.flatten(2).transpose(1, 2)
        prefix = vit.pos_embed.shape[1] - h * w
        fitted.model.pos_embed[:, :prefix] = vit.pos_embed[:, :prefix]
    ours = torch.cat(built(small, resampling="published"), dim=1)
    assert torch.allclose(ours, fitted.model.forward_features(small), atol=1e-5)
    assert not torch.allclose(ours, vit.forward_features(small), atol=1e-3)
    order = torch.tensor([[2, 0]]).expand(3, -1)
    kept, all_of_them = built(small, keep=order, resampling="published"), built(small, keep=order)
    assert not torch.allclose(kept.patches, all_of_them.patches, atol=1e-3)


@pytest.mark.parametrize("kind", VITS)
def test_a_token_replaces_masked_patches_before_positions_are_added(kind):
    built, images = make(kind)
    n = built.grid()[0] * built.grid()[1]
    mask = torch.rand(3, n) < 0.5
    token = torch.randn(1, 1, 48)
    vit = copy.deepcopy(built.model)
    grid = built.grid()
    inner = vit.patch_embed.forward
    where = mask.view(3, *grid, 1)
    vit.patch_embed.forward = lambda x: torch.where(where, token, inner(x))
    expected = vit.forward_features(images)
    assert torch.allclose(torch.cat(built(images, replace=(mask, token)), dim=1), expected, atol=1e-5)
    nothing = built(images, replace=(torch.zeros_like(mask), token))
    assert torch.equal(torch.cat(nothing, dim=1), built.model.forward_features(images))


def test_features_are_the_class_token_the_mean_of_patches_or_both():
    built, images = make("registers")
    tokens = built(images)
    assert torch.equal(built.features(images, "cls"), tokens.prefix[:, 0])
    assert torch.equal(built.features(images, "mean"), tokens.patches.mean(dim=1))
    assert torch.equal(built.features(images, "cls+mean"), torch.cat([tokens.prefix[:, 0], tokens.patches.mean(1)], 1))
    assert built.feature_dim("cls+mean") == 96


def test_models_with_a_pooling_norm_get_one_over_all_tokens():
    built = factory.create(Config("vit_tiny_patch16_224", TINY_MODEL | {"global_pool": "avg"}), (32, 32))
    assert isinstance(built.model.norm, torch.nn.LayerNorm)
    assert isinstance(built.model.fc_norm, torch.nn.Identity)


@pytest.mark.parametrize(
    ("name", "size"),
    [("swin_tiny_patch4_window7_224", 64), ("mobilevitv2_050", 64), ("convit_tiny", 32), ("resnet18", 32)],
)
def test_other_families_give_pooled_features(name, size):
    args = {"window_size": 4, "depths": (1, 1, 1, 1)} if "swin" in name else {}
    built = factory.create(Config(name, args), (size, size)).eval()
    features = built.features(torch.randn(2, 3, size, size))
    assert features.shape == (2, built.feature_dim())
    assert built.why_tokens_cannot_be_dropped()


def test_stems_that_overlap_patches_cannot_drop_tokens():
    built = factory.create(Config("vit_small_r26_s32_224"), (64, 64))
    assert "stem" in built.why_tokens_cannot_be_dropped()


def test_drop_path_depends_on_the_images_key_only():
    torch.manual_seed(0)
    built = factory.create(Config("vit_tiny_patch16_224", TINY_MODEL), (32, 32), drop_path=0.5).train()
    images, key = torch.randn(8, 3, 32, 32), rng.fold_in(0, torch.arange(8))
    together = built.features(images, key=key)
    assert torch.allclose(built.features(images[3:], key=key[3:]), together[3:], atol=1e-6)
    assert not torch.allclose(built.features(images, key=rng.fold_in(1, torch.arange(8))), together, atol=1e-3)
    assert torch.equal(built.eval().features(images), built.features(images))


def test_drop_path_drops_at_its_rate_and_keeps_the_mean():
    drop = encoder.DropPath(0.3, place=0).train()
    drop.key = rng.fold_in(0, torch.arange(20_000))
    kept = drop(torch.ones(20_000, 1)).squeeze(1)
    assert (kept == 0).float().mean().item() == pytest.approx(0.3, abs=0.015)
    assert kept.mean().item() == pytest.approx(1.0, abs=0.02)
    folded = drop(torch.ones(40_000, 1))  # two rows an image, as MobileViT has them
    assert (folded == 0).float().mean().item() == pytest.approx(0.3, abs=0.015)


def test_drop_path_rises_linearly_over_the_blocks_as_in_timm():
    built = factory.create(Config("vit_tiny_patch16_224", TINY_MODEL | {"depth": 3}), (32, 32), drop_path=0.2)
    assert [m.rate for m in built.modules() if isinstance(m, encoder.DropPath)] == pytest.approx([0.1, 0.1, 0.2, 0.2])


def test_recomputed_blocks_draw_the_same_paths():
    torch.manual_seed(0)
    built = factory.create(Config("vit_tiny_patch16_224", TINY_MODEL), (32, 32), drop_path=0.5).train()
    crops = [(torch.randn(4, 3, 32, 32), rng.fold_in(0, torch.arange(4))), (torch.randn(8, 3, 16, 16), torch.arange(8))]

    def gradients() -> list[torch.Tensor]:
        built.zero_grad()
        sum(built.features(x, key=key).square().sum() for x, key in crops).backward()
        return [p.grad.clone() for p in built.parameters()]

    plain = gradients()
    built.model.set_grad_checkpointing(True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize(
    ("config", "size", "words"),
    [
        (Config("vit_tinny_patch16_224"), (32, 32), ["vit_tinny_patch16_224", "Did you mean vit_tiny_patch16_224"]),
        (Config("vit_tiny_patch16_224", {"patch_size": 4}), (30, 30), ["30x30", "patch size 4", "28 or 32"]),
        (Config("vit_tiny_patch16_224", {"patchsize": 4}), (32, 32), ["patchsize"]),
        (Config("vit_tiny_patch16_224", {"patch_size:4": None}), (32, 32), ["{patch_size: 4}"]),
        (Config("vit_tiny_patch16_224", {"img_size": 64}), (32, 32), ["img_size=64", "data.image_size"]),
    ],
)
def test_mistakes_get_a_sentence(config, size, words):
    with pytest.raises(UserError) as error:
        factory.create(config, size)
    assert all(word in str(error.value) for word in words), error.value


def test_the_wrapped_model_is_plain_timm():
    built, images = make("plain")
    again = timm.create_model(built.architecture, num_classes=0, **built.model_args).eval()
    again.load_state_dict(built.model.state_dict())
    assert torch.equal(again(images), built.features(images, "cls"))
