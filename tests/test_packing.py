"""Crops of several resolutions in one list of tokens give what they give one resolution at a time."""

import pytest
import torch
from torch._dynamo.utils import counters

from sslvit import blocks, config, data, encoder
from sslvit.errors import UserError
from sslvit.hardware import choose_attention
from sslvit.objectives import dino
from tests.conftest import TINY_MODEL, words

NO_CLASS_TOKEN = {"class_token": False, "global_pool": "avg"}
MODELS = {
    "plain": {},
    "registers": {"reg_tokens": 3},
    "no class token": NO_CLASS_TOKEN,
    "no class token, registers": {**NO_CLASS_TOKEN, "reg_tokens": 2},
    "layer scale": {"init_values": 0.5},
    "norms in attention and MLP": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "norm before, no positions": {"pre_norm": True, "pos_embed": "none"},
    "one block": {"depth": 1},
}
SIZES = [(4, (32, 32)), (7, (16, 24)), (2, (8, 8))]  # images, pixels


def create(drop_path: float = 0.5, checkpointing: bool = False, **args) -> encoder.Encoder:
    torch.manual_seed(0)
    model = encoder.Config("vit_tiny_patch16_224", TINY_MODEL | args, grad_checkpointing=checkpointing)
    built = encoder.create(model, (32, 32), drop_path=drop_path)
    for parameter in built.parameters():  # gains of 1 and biases of 0 would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return built


def gradients(module: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_in_float64_features_and_gradients_are_those_of_one_size_at_a_time(name, checkpointing, fused, pool):
    built = create(checkpointing=checkpointing, **MODELS[name]).double().train()
    if pool not in built.pools():
        return
    built.pool = pool
    assert built.why_sizes_cannot_be_packed() is None
    for block in built.model.blocks:
        block.attn.fused_attn = fused
    images = [torch.randn(b, 3, *size, dtype=torch.float64) for b, size in SIZES]
    keys = list(torch.arange(13).split([b for b, _ in SIZES]))
    keep = [torch.rand(4, 16).argsort(dim=1)[:, :5], None, None]
    found = []
    for packed in (True, False):
        features = (
            built.packed_features(images, keys, keep)
            if packed
            else torch.cat([built.features(x, key=key, keep=k) for x, key, k in zip(images, keys, keep, strict=True)])
        )
        found.append([features.detach(), *gradients(built, features.sin().sum())])
    assert found[0][0].shape == (13, built.feature_dim())
    scale = max(theirs.norm() for theirs in found[1])  # some gradients are nothing but rounding: those of keys' biases
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-12 * scale


def test_all_tokens_of_an_image_are_dropped_together():
    """With the residual of a block at rate 1/2, an image's tokens change all or not at all, as each alone."""
    built = create(drop_path=0.5, depth=2).train()
    block = built.model.blocks[1]
    x, shapes = blocks.pack([torch.randn(6, 5, 48), torch.randn(9, 3, 48)])
    key = torch.arange(15)
    changed = [
        (part != before).any(dim=2)
        for part, before in zip(
            blocks.unpack(built._run(block, x, key, None, shapes), shapes), blocks.unpack(x, shapes), strict=True
        )
    ]
    assert all(torch.equal(part.any(dim=1), part.all(dim=1)) for part in changed)
    images = torch.cat([part.any(dim=1) for part in changed])
    assert 0 < images.sum() < 15
    alone = built._run(block, torch.randn(15, 4, 48), key, None)
    assert alone.shape == (15, 4, 48)


SMALL = {"prototypes": 16, "hidden_dim": 24, "bottleneck_dim": 8, "local_crops": 3, "local_crop_size": 16}


def build(args: dict | None = None, name: str = "vit_tiny_patch16_224", **settings) -> dino.DINO:
    torch.manual_seed(0)
    model = encoder.Config(name, TINY_MODEL | (args or {}) if args is not None else {})
    return dino.build(dino.Config(**SMALL | settings), model, data.Config(image_size=32), 5, 10)


def batch(b: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    crops = {
        name: torch.randn(v, b, 3, s, s, generator=generator) for name, v, s in (("global", 2, 32), ("local", 3, 16))
    }
    return {"key": torch.arange(b), **crops}


@pytest.mark.parametrize("b", [1, 5])
@pytest.mark.parametrize(
    ("args", "settings"),
    [
        ({}, {}),
        ({}, {"pool": "mean", "student_keep": 0.25, "koleo_weight": 0.5}),
        ({"reg_tokens": 2, "init_values": 0.1, "qk_norm": True}, {"drop_path": 0.4}),
        (NO_CLASS_TOKEN, {"init": "mae"}),
    ],
)
def test_dinos_loss_and_gradients_in_float32_are_those_without(args, settings, b):
    found = []
    for pack in (True, False):
        module = build(args, pack=pack, **settings).train()
        values = module(batch(b), 0)
        found.append((values["loss"].item(), torch.cat([g.flatten() for g in gradients(module, values["loss"])])))
    (ours, our_gradient), (theirs, their_gradient) = found
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert (our_gradient - their_gradient).norm() <= 1e-6 * their_gradient.norm()


def test_in_bf16_the_packed_gradient_is_as_near_to_that_of_float32_as_the_other():
    module = build({}).train()
    exact = torch.cat([g.flatten() for g in gradients(module, module(batch(), 0)["loss"])])
    errors = {}
    for pack in (True, False):
        module = build({}, pack=pack).train()
        choose_attention(module, torch.device("cpu"), "bf16")
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(batch(), 0)["loss"]
        errors[pack] = (torch.cat([g.flatten() for g in gradients(module, loss)]) - exact).norm() / exact.norm()
    assert errors[True] < 1.2 * errors[False] < 0.1


def test_the_student_runs_each_layer_once_over_all_tokens():
    module, seen = build({}, pack=True), []
    for block in module.student.encoder.model.blocks:
        block.mlp.register_forward_hook(lambda m, x, y: seen.append(tuple(y.shape)))
    module.train()(batch(), 0)
    assert seen == [(2 * 5 * 17 + 3 * 5 * 5, 48), (5 * 5, 48)]  # in the last block the class tokens alone


@pytest.mark.parametrize(
    ("args", "name", "settings", "sentence"),
    [
        (None, "resnet18", {"local_crop_size": 32}, "cannot pack crops for resnet18: ResNet is not a plain ViT"),
        ({"attn_drop_rate": 0.1}, "vit_tiny_patch16_224", {}, "or drop attention weights. Leave it out"),
        ({}, "vit_tiny_patch16_224", {"local_crops": 0}, "local_crops=0 leaves one: leave it out"),
    ],
)
def test_what_cannot_be_packed_is_refused(args, name, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        build(args, name, pack=True, **settings)
    build(args, name, **settings)


def test_it_is_off_by_default_and_a_run_may_go_on_with_it(cli, images, tmp_path):
    assert not config.load(["method=dino"]).objective.pack
    run = words("dino", f"out={tmp_path / 'run'}", "epochs=2")
    assert cli("pretrain", images, *run)[0] == 0
    status, printed, _ = cli("pretrain", images, *run, "epochs=3", "pack=true")
    assert status == 0
    assert "Resuming" in printed


@pytest.mark.slow  # the compiler takes most of a minute
def test_compiled_packed_blocks_give_what_plain_ones_give_and_share_their_graphs():
    module = build({"depth": 4}, pack=True, drop_path=0.3).train()
    plain = module(batch(), 0)["loss"]
    expected = torch.cat([g.flatten() for g in gradients(module, plain)])
    for block in module.student.encoder.model.blocks:
        block.compile(dynamic=False)
    counters.clear()
    compiled = module(batch(), 0)["loss"]
    assert compiled.item() == pytest.approx(plain.item(), rel=1e-5)
    ours = torch.cat([g.flatten() for g in gradients(module, compiled)])
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # with and without drop path
