"""The layers of a model that is fine-tuned, how fast each learns, its positions and its head."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.optim import param_groups_layer_decay

from sslvit import pretrained
from sslvit.errors import UserError
from sslvit.evaluation.finetuning import classifier as building
from tests.conftest import TINY_MODEL


def subject(size=(32, 32), **args) -> pretrained.Pretrained:
    return pretrained.load("random:vit_tiny_patch16_224", size, TINY_MODEL | args)


def make(pool="mean", size=None, drop_path=0.0, fresh_norm=False, outputs=5, seed=0, of=None) -> building.Classifier:
    return building.build_classifier(of or subject(), pool, outputs, size, drop_path, fresh_norm, seed)


def published_layer(name: str, num_blocks: int) -> int:
    """The rule of MAE's released fine-tuning (which is BEiT's), from its description: positions, tokens and the patch
    embedding are layer 0, block i is layer i + 1, and everything else is the last, one after the last block."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks"):
        return int(name.split(".")[1]) + 1
    return num_blocks + 1


@pytest.mark.parametrize("fresh_norm", [True, False])
@pytest.mark.parametrize("decay", [0.65, 0.75])
def test_layers_of_a_vit_learn_at_the_published_rates(decay, fresh_norm):
    model = make(fresh_norm=fresh_norm, of=subject(depth=12)).model
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen = {}
    for group in building.parameter_groups(model, decay, 0.05):
        for parameter in group["params"]:
            seen[names[parameter]] = (group["lr_scale"], group["weight_decay"])
    assert seen.keys() == set(names.values())
    for name, parameter in model.named_parameters():
        scale = decay ** (13 - published_layer(name, 12))
        undecayed = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
        assert seen[name] == (pytest.approx(scale), 0.0 if undecayed else 0.05), name
    norm = "fc_norm.weight" if fresh_norm else "norm.weight"
    assert seen["head.weight"][0] == seen[norm][0] == 1
    assert seen["blocks.11.mlp.fc1.weight"][0] == pytest.approx(decay)
    assert seen["pos_embed"][0] == pytest.approx(decay**13)


def test_timms_layer_decay_is_the_same_but_for_the_norm():
    model = make(of=subject(depth=3)).model
    names = {parameter: name for name, parameter in model.named_parameters()}

    def scales(groups: list[dict]) -> dict[str, tuple[float, float]]:
        return {names[p]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}

    ours = scales(building.parameter_groups(model, 0.7, 0.05))
    theirs = scales(param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.7))
    assert {name for name in ours if ours[name] != pytest.approx(theirs[name])} == {"norm.weight", "norm.bias"}


def test_the_heads_rate_is_its_own():
    model = make().model
    groups = building.parameter_groups(model, 0.5, 0.05, head_lr=4.0)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert scale[id(model.head.weight)] == scale[id(model.head.bias)] == 4
    assert scale[id(model.norm.weight)] == 1


def test_blocks_learn_one_after_the_other_from_the_top():
    layers = [building.trained_layers(epoch / 4, 4, head_epochs=1, unfreeze_epochs=0.5) for epoch in range(12)]
    assert layers == [1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert [building.trained_layers(e, 4, 0, 0) for e in (0, 5)] == [4, 4]
    assert [building.trained_layers(e, 4, 1, 0) for e in (0.9, 1)] == [1, 4]
    model = make(of=subject(depth=2))
    for trained, learning in (
        (1, {"head", "norm"}), (2, {"head", "norm", "blocks.1"}), (4, {"head", "norm", "blocks.1", "blocks.0", "stem"}),
    ):  # fmt: skip
        building.freeze(model, trained)
        found = {n for n, p in model.model.named_parameters() if p.requires_grad}
        stem = ("patch_embed", "pos_embed", "cls_token")
        tops = {"stem" if n.startswith(stem) else ".".join(n.split(".")[: 1 + n.startswith("blocks")]) for n in found}
        assert tops == learning
        assert model.model.blocks[0].training == (trained == 4)


def test_a_frozen_layer_does_not_change_and_its_batch_norm_keeps_its_statistics():
    """MobileViT with everything but the head frozen, one step."""
    net = make("pooled", of=pretrained.load("random:mobilevitv2_050", 64))
    building.freeze(net, 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(building.parameter_groups(net.model, 0.7, 0.05), lr=0.1)
    net(torch.randn(4, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"encoder.model.head.fc.weight", "encoder.model.head.fc.bias"}


@pytest.mark.parametrize("size", [(48, 48), (16, 64)])
@pytest.mark.parametrize("args", [{}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}])
def test_positions_for_another_size_are_timms_bicubic_resampling(size, args):
    of = subject(**args)
    net = make(size=size, of=of)
    old = of.encoder.model
    prefix = 0 if old.no_embed_class else old.num_prefix_tokens
    grid = (size[0] // 8, size[1] // 8)
    assert torch.equal(net.model.pos_embed, resample_abs_pos_embed(old.pos_embed, grid, (4, 4), prefix))
    spatial = old.pos_embed[:, prefix:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    by_hand = F.interpolate(spatial, grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert torch.allclose(net.model.pos_embed[:, prefix:], by_hand, atol=1e-6)
    assert net(torch.randn(2, 3, *size)).shape == (2, 5)


def test_a_swin_takes_images_of_another_size():
    args = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
    of = pretrained.load("random:swin_tiny_patch4_window7_224", (64, 64), args)
    net = make("pooled", size=(96, 64), of=of)
    weights = of.encoder.model.state_dict()
    assert all(torch.equal(net.model.state_dict()[name], weights[name]) for name in weights)
    assert net(torch.randn(2, 3, 96, 64)).shape == (2, 5)
    with pytest.raises(UserError, match="convit_tiny cannot take images of 48x48"):
        make("pooled", size=(48, 48), of=pretrained.load("random:convit_tiny", 32))


def test_mean_pooled_features_are_normalised_after_the_mean_by_a_fresh_layer():
    of = subject()
    torch.nn.init.normal_(of.encoder.model.norm.weight)
    net = make(fresh_norm=True, of=of)
    torch.nn.init.normal_(net.head.weight)
    x = torch.randn(3, 3, 32, 32)
    model = net.model
    tokens = model.blocks(model._pos_embed(model.patch_embed(x)))  # of random:'s ViT, without its final norm
    pooled = F.layer_norm(tokens[:, 1:].mean(dim=1), (48,), eps=model.fc_norm.eps)
    assert torch.allclose(net(x), F.linear(pooled, net.head.weight, net.head.bias), atol=1e-5)
    assert torch.allclose(net(x), model(x), atol=1e-5)


@pytest.mark.parametrize("fresh_norm", [True, False])
def test_the_head_sees_standardised_features_and_folding_them_in_changes_nothing(fresh_norm):
    net, x = make(fresh_norm=fresh_norm), torch.randn(16, 3, 32, 32)
    torch.nn.init.normal_(net.head.weight)
    torch.nn.init.normal_(net.head.bias)
    seen = []
    net.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net.standardise(net.encoder.features(x))
    before = net(x)
    assert torch.allclose(seen[0].mean(dim=0), torch.zeros(48), atol=1e-4)
    assert (seen[0].std(dim=0, unbiased=False) > 0.9).all()
    net.fold()
    assert torch.allclose(net(x), before, atol=1e-3)
    assert torch.allclose(net.model(x), before, atol=1e-3)


def test_the_head_begins_almost_at_zero_and_hangs_on_the_seed_only():
    assert 1e-5 < make(outputs=50).head.weight.std().item() < 3e-5
    assert not make().head.bias.any()
    assert torch.equal(make(seed=3).head.weight, make(seed=3).head.weight)
    assert not torch.equal(make(seed=3).head.weight, make(seed=4).head.weight)
