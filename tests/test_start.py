"""model.init=: what others and this package save begins a run. The published numbers are in test_parity.py."""

import io
import json
import re
import shutil
import struct
import threading
import zipfile
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from sslvit import data, objectives, optim, pretrained, start
from sslvit.__main__ import main
from sslvit.checkpoints.named import open_weights
from sslvit.errors import UserError
from sslvit.model import factory, lora, weights
from sslvit.objectives import Objective
from sslvit.pretraining import Result, summary

from .conftest import words

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
VIT = "vit_tiny_patch16_224"
SWIN = "swin_tiny_patch4_window7_224", {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
MAE = {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}


def make(method: str, args: dict | None = None, name: str = VIT, size: object = 32, chans: int = 3) -> Objective:
    module = objectives.find(method)
    small = MAE if method == "mae" else module.SMALL | {"local_crops": 0, "drop_path": 0.0}
    torch.manual_seed(5)
    config = module.Config(**small)
    model = factory.Config(name, SMALL if args is None else args)
    return module.build(config, model, data.Config(image_size=size, in_chans=chans), 2, 4)


def like_timm(name: str = VIT, args: dict | None = None, size: object = 32, **more: object) -> nn.Module:
    """A model of timm with random values everywhere."""
    model = factory.create(factory.Config(name, SMALL if args is None else args), data.pair(size), **more).model
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def official(model: nn.Module, *rules: tuple[str, str]) -> dict[str, Tensor]:
    """The weights of a model of timm by other names."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    for pattern, replacement in rules:
        tensors = {re.sub(pattern, replacement, name): value for name, value in tensors.items()}
    return tensors


@torch.no_grad()
def features(model: nn.Module, chans: int = 3, size: object = 32) -> Tensor:
    images = torch.randn(2, chans, *data.pair(size), generator=torch.Generator().manual_seed(2))
    return model.eval().forward_features(images)


def same(objective: Objective, model: nn.Module, **more: object) -> None:
    """All encoders give what the model gives."""
    for name, encoder in objective.named_modules():
        if hasattr(encoder, "feature_dim"):
            assert torch.equal(features(encoder.model, **more), features(model, **more)), name


def saved(path: Path, stored: object) -> str:
    torch.save(stored, path)
    return str(path)


# What the released codes save.

CHUNKS = (r"^blocks\.(\d+)\.", r"blocks.0.\1.")
LAST = (r"^", "backbone.")
DINOV2 = {**SMALL, "init_values": 1.0, "reg_tokens": 4, "no_embed_class": True}


def head(prefix: str, seed: int = 3) -> dict[str, Tensor]:
    """A head of DINO, as all of its codes name it."""
    shapes = {"mlp.0.weight": (32, 32), "mlp.0.bias": (32,), "mlp.2.weight": (32, 32), "mlp.2.bias": (32,)}
    shapes |= {"mlp.4.weight": (16, 32), "mlp.4.bias": (16,), "last_layer.weight_v": (64, 16)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {prefix + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {prefix + "last_layer.weight_g": torch.ones(64, 1)}


def test_a_teacher_checkpoint_of_dinov2_gives_both_networks_their_weights(tmp_path):
    model = like_timm(args=DINOV2)
    stored = official(model, CHUNKS, (r"^reg_token", "register_tokens"), LAST)
    # Its position of the class token is added to the token, and timm has stored the sum.
    stored["backbone.pos_embed"] = torch.cat([torch.ones(1, 1, 32), stored["backbone.pos_embed"]], dim=1)
    stored["backbone.cls_token"] -= 1
    stored |= {"backbone.mask_token": torch.zeros(1, 32), **head("dino_head."), **head("ibot_head.", 4)}
    objective = make("dino", DINOV2)
    said = start.load(objective, saved(tmp_path / "teacher_checkpoint.pth", {"teacher": stored}))
    assert torch.allclose(features(objective.teacher.encoder.model), features(model), atol=1e-5)
    for part in (objective.student, objective.teacher):
        assert torch.equal(part.head.mlp[4].weight, head("")["mlp.4.weight"])
        assert torch.equal(part.head.last_layer.weight_v, head("")["last_layer.weight_v"])
    assert "a checkpoint of DINO, iBOT, DINOv2 or DINOv3: 70 of 70 tensors of the encoder, 16 of 17 others." in said[0]
    assert said[1] == "  not in it, begin as in a new run (1): center"
    assert (
        said[2]
        == "  in it, not used (9): teacher.mask_token, teacher.ibot_head.mlp.0.weight, teacher.ibot_head.mlp.0.bias ..."
    )


def test_a_checkpoint_of_ibot_keeps_student_and_teacher_apart_and_brings_its_center(tmp_path):
    student, teacher = like_timm(), like_timm(size=32)
    for parameter in teacher.parameters():
        parameter.data += 0.1
    center = torch.randn(1, 64)
    both = {
        name: official(model, LAST) | head("head.", seed) | {"backbone.masked_embed": torch.zeros(1, 32)}
        for seed, (name, model) in enumerate([("student", student), ("teacher", teacher)])
    }
    both["student"] = {f"module.{name}": value for name, value in both["student"].items()}
    objective = make("dino")
    losses = {"ibot_loss": {"center": center, "center2": torch.zeros(1, 1, 64)}, "args": Namespace(arch="vit_small")}
    said = start.load(objective, saved(tmp_path / "checkpoint.pth", both | losses))
    assert torch.equal(features(objective.student.encoder.model), features(student))
    assert torch.equal(features(objective.teacher.encoder.model), features(teacher))
    assert torch.equal(objective.student.head.mlp[0].weight, head("", 0)["mlp.0.weight"])
    assert torch.equal(objective.center, center)
    assert said[1:] == ["  in it, not used (3): student.masked_embed, teacher.masked_embed, ibot_loss.center2"]


@pytest.mark.parametrize("bias", [True, False])
def test_dinov3_has_another_family_in_timm(tmp_path, bias):
    name = "vit_small_patch16_dinov3_qkvb" if bias else "vit_small_patch16_dinov3"
    model = like_timm(name)
    stored = official(
        model, (r"gamma_([12])$", r"ls\1.gamma"), (r"^reg_token", "storage_tokens"), LAST,
    )  # fmt: skip
    stored["backbone.rope_embed.periods"] = torch.ones(4)
    for i in range(2):
        q, v = (stored.pop(f"backbone.blocks.{i}.attn.{part}_bias", torch.zeros(32)) for part in "qv")
        stored[f"backbone.blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.zeros(32), v])
        stored[f"backbone.blocks.{i}.attn.qkv.bias_mask"] = torch.ones(96)
    objective = make("dino", name=name)
    said = start.load(objective, saved(tmp_path / "teacher.pth", {"teacher": stored}))
    same(objective, model)
    assert "not used" not in "".join(said)
    if bias:
        with pytest.raises(
            UserError, match=r"rotary positions\. It does not .* model\.name=vit_base_patch16_dinov3_qkvb"
        ):
            start.load(make("dino", name="vit_small_patch16_dinov3"), str(tmp_path / "teacher.pth"))


def test_simmim_brings_its_swin(tmp_path):
    model = like_timm(*SWIN)
    stored = official(model, (r"^layers\.1\.downsample", "layers.0.downsample"), (r"^", "encoder."))
    stored |= {"encoder.mask_token": torch.zeros(1, 1, 16), "decoder.0.weight": torch.zeros(8, 8, 1, 1)}
    stored |= {
        "decoder.0.bias": torch.zeros(8),
        "encoder.layers.0.blocks.0.attn.relative_position_index": torch.ones(9),
    }
    objective = make("dino", SWIN[1], SWIN[0])
    path = saved(tmp_path / "ckpt_epoch_99.pth", {"model": stored, "lr_scheduler": {}, "max_accuracy": 0.0})
    said = start.load(objective, path)
    same(objective, model)
    assert said[-1] == "  in it, not used (3): mask_token, decoder.0.weight, decoder.0.bias"


def test_a_whole_checkpoint_of_microsofts_configuration_class_is_read_without_that_class(tmp_path, monkeypatch):
    """Its code stores a `yacs.config.CfgNode` beside the weights."""
    module = type(yaml)("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    for name, one in (("yacs", type(yaml)("yacs")), ("yacs.config", module)):
        monkeypatch.setitem(__import__("sys").modules, name, one)
    config = module.CfgNode(MODEL=module.CfgNode(TYPE="vit"))
    config.__dict__["__immutable__"] = True
    path = saved(tmp_path / "a.pth", {"model": official(like_timm()), "config": config})
    monkeypatch.undo()
    objective = make("mae")
    start.load(objective, path)
    same(objective, like_timm())


# Hugging Face's own classes, as transformers writes them now and as version 4 wrote them.

HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "layer_norm_eps": 1e-6}
DINO_HF = {**HF, "patch_size": 8, "mlp_ratio": 4}
OF_HF = {
    "ViTModel": ({**HF, "patch_size": 8, "intermediate_size": 128}, VIT, SMALL),
    "Dinov2Model": (DINO_HF, VIT, {**SMALL, "init_values": 1.0}),
    "Dinov2WithRegistersModel": ({**DINO_HF, "num_register_tokens": 4}, VIT, DINOV2),
    "DINOv3ViTModel": (
        {**HF, "patch_size": 8, "intermediate_size": 128, "num_register_tokens": 4, "layer_norm_eps": 1e-5,
         "rope_theta": 100.0}, "vit_small_patch16_dinov3_qkvb", SMALL,
    ),
    "SwinModel": (
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        SWIN[0], {**SWIN[1], "window_size": 4},
    ),
}  # fmt: skip


def of_hf(kind: str, config: dict, folder: Path, version: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**config)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.2
    model.save_pretrained(folder, save_original_format=version == 4)
    return model


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("kind", OF_HF)
def test_models_of_hugging_face_give_the_same_features_here(tmp_path, kind, version):
    config, name, args = OF_HF[kind]
    theirs = of_hf(kind, config, tmp_path, version)
    objective = make("dino", args, name)
    said = start.load(objective, str(tmp_path))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = objective.eval().teacher.encoder.model.forward_features(images)
        expected = theirs(images).last_hidden_state
    assert torch.allclose(ours.flatten(1, -2), expected, atol=2e-5)
    assert re.search(r"(\d+) of \1 tensors of the encoder", said[0]), said


@pytest.mark.parametrize("version", [4, 5])
def test_vitmae_of_hugging_face_brings_its_decoder(tmp_path, version):
    decoder = {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    more = {"patch_size": 8, "intermediate_size": 128, "decoder_intermediate_size": 96, "norm_pix_loss": True}
    theirs = of_hf("ViTMAEForPreTraining", {**HF, **decoder, **more}, tmp_path, version)
    objective = make("mae")
    said = start.load(objective, str(tmp_path))
    assert len(said) == 1, said
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        loss = objective.loss(images, noise.argsort(dim=1))["loss"]
        assert loss.item() == pytest.approx(theirs(images, noise=noise).loss.item(), rel=1e-5)


def test_another_number_of_heads_is_refused_where_the_file_says_it(tmp_path):
    of_hf("ViTModel", OF_HF["ViTModel"][0], tmp_path, 5)
    with pytest.raises(UserError, match=r"differs: 2 attention heads, not 4.*num_heads: 2"):
        start.load(make("dino", {**SMALL, "num_heads": 4}), str(tmp_path))


# This package and timm.


@pytest.mark.parametrize("part", ["", "checkpoints/step_000000008", "checkpoints/step_000000008/model.safetensors"])
def test_a_run_brings_all_that_it_has(colour_run, part):
    objective = make("mae", {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2})
    said = start.load(objective, str(colour_run / part))
    stored = load_file(colour_run / "checkpoints" / "step_000000008" / "model.safetensors")
    own = objective.state_dict()
    assert all(torch.equal(own[name], value) for name, value in stored.items() if own[name].shape == value.shape)
    assert "a checkpoint of this package: 30 of 30 tensors of the encoder" in said[0]


def test_a_run_of_one_method_begins_another(colour_run):
    objective = make("dino", {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2})
    start.load(objective, str(colour_run))
    same(objective, pretrained.load(str(colour_run)).encoder.model)


def test_a_folder_that_timm_saved(tmp_path):
    model = timm.create_model(VIT, num_classes=7, img_size=32, **SMALL)
    timm.models.save_for_hf(model, tmp_path, model_args={**SMALL, "img_size": 32}, safe_serialization="both")
    objective = make("mae")
    said = start.load(objective, str(tmp_path))
    assert said[-1] == "  in it, not used (2): head.bias, head.weight"
    said = start.load(objective, str(tmp_path), data.normalization(data.Config()))
    assert said[-1].endswith("another way: data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5] does the same")
    assert len(start.load(objective, str(tmp_path), ((0.5,) * 3, (0.5,) * 3))) == len(said) - 1
    model.reset_classifier(0)
    same(objective, model)
    (tmp_path / "model.safetensors").unlink()
    objective = make("mae")
    start.load(objective, str(tmp_path))  # pytorch_model.bin
    same(objective, model)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224.fb_in1k", "timm:deit_tiny_patch16_224.fb_in1k"])
def test_a_pretrained_name_of_timm(tmp_path, monkeypatch, name):
    """What its download would bring lies in a file here."""
    theirs = timm.create_model("deit_tiny_patch16_224", num_classes=1000)
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    configs = timm.models._registry._model_pretrained_cfgs
    monkeypatch.setattr(configs["deit_tiny_patch16_224.fb_in1k"], "file", str(tmp_path / "weights.safetensors"))
    objective = make("mae", {"patch_size": 8})
    said = start.load(objective, name)
    changed = "patches of 16x16 pixels became 8x8; positions of 14x14 patches became 4x4"
    assert set(changed.split("; ")) == set(said[1].removeprefix("  changed to fit: ").split("; "))
    own, vit = theirs.state_dict(), objective.encoder.model
    assert torch.allclose(vit.patch_embed.proj.weight, resample_patch_embed(own["patch_embed.proj.weight"], [8, 8]))
    assert torch.allclose(vit.pos_embed, resample_abs_pos_embed(own["pos_embed"], [4, 4], num_prefix_tokens=1))
    assert torch.equal(vit.blocks[3].mlp.fc1.weight, own["blocks.3.mlp.fc1.weight"])


# What is changed to fit.


@pytest.mark.parametrize("chans", [1, 2, 3, 5, 6])
def test_channels_become_what_timm_makes_of_three(chans):
    weight = torch.randn(4, 3, 8, 8)
    assert torch.allclose(weights.fit_channels(weight, chans), adapt_input_conv(chans, weight), atol=1e-6)


@pytest.mark.parametrize(("stored", "wanted"), [(5, 1), (1, 3), (2, 4)])
def test_an_image_of_equal_channels_looks_the_same_with_other_channels(tmp_path, stored, wanted):
    model = like_timm(in_chans=stored)
    objective = make("mae", chans=wanted)
    said = start.load(objective, saved(tmp_path / "a.pth", model.state_dict()))
    gray = torch.randn(2, 1, 32, 32)
    ours, theirs = (
        one.patch_embed(gray.expand(-1, number, -1, -1))
        for one, number in ((objective.encoder.model, wanted), (model, stored))
    )
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert f"{stored} channels became {wanted}" in said[1]


@pytest.mark.parametrize(
    "has", [{}, {"no_embed_class": True}, {"reg_tokens": 3}, {"reg_tokens": 3, "no_embed_class": True}]
)
@pytest.mark.parametrize("wants", [False, True])
def test_positions_of_prefix_tokens_are_kept_in_the_other_form(tmp_path, has, wants):
    model = like_timm(args=SMALL | has)
    objective = make("dino", SMALL | has | {"no_embed_class": wants})
    start.load(objective, saved(tmp_path / "a.pth", model.state_dict()))
    assert torch.allclose(features(objective.teacher.encoder.model), features(model), atol=1e-5)


def test_positions_of_a_run_on_images_that_are_not_square(tmp_path):
    model = like_timm(size=(32, 64))
    found = weights.Weights("w", "x", {f"encoder.model.{k}": v for k, v in model.state_dict().items()}, grid=(4, 8))
    objective = make("mae", size=(64, 32))
    fitted, said = weights.fit(objective.encoder, model.state_dict(), found)
    assert said == ["positions of 4x8 patches became 8x4"]
    wanted = resample_abs_pos_embed(model.pos_embed, [8, 4], [4, 8], num_prefix_tokens=1)
    assert torch.allclose(fitted["pos_embed"], wanted)
    objective = make("mae", size=48)
    with pytest.raises(UserError, match="differs: pos_embed"):
        start.load(objective, saved(tmp_path / "a.pth", model.state_dict()))


def test_the_decoder_goes_on_with_a_larger_image(colour_run):
    objective = objectives.find("mae").build(
        objectives.find("mae").Config(**objectives.find("mae").SMALL),
        factory.Config(VIT, {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}),
        data.Config(image_size=48), 2, 4,
    )  # fmt: skip
    said = start.load(objective, str(colour_run))
    assert "20 of 20 others" in said[0]
    assert "positions of 4x4 patches became 6x6" in said[1]


# Wrong files: one sentence each, nothing run, nothing written.


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def wrong_files(folder: Path) -> dict[str, tuple[object, str]]:
    """{name: (bytes or what torch.save gets, what the sentence says)}."""
    weights = official(like_timm())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 10**6)
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    lora = {f"base_model.blocks.{i}.attn.qkv.lora_{part}.weight": torch.zeros(2, 2) for i in range(2) for part in "AB"}
    wide = official(like_timm(args={**SMALL, "embed_dim": 64, "num_heads": 4})) | {"head.weight": torch.zeros(9, 64)}
    resnet = {"conv1.weight": torch.zeros(8, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(8, 8, 3, 3)}
    return {
        "wide.pth": (wide, "a ViT of width 64, 2 blocks, patches of 8x8 pixels, a class token. It does not fit"),
        "deep.pth": (official(like_timm(args={**SMALL, "depth": 3})), "differs: blocks.2.norm1.weight"),
        "scale.pth": (official(like_timm(args={**SMALL, "init_values": 1.0})), "init_values: 1e-05"),
        "resnet.pth": (resnet, "does not fit this model"),
        "lora.pth": (lora, "adapters (LoRA), which hold only differences"),
        "heads.pth": ({"a.b": torch.zeros(3), "c": torch.zeros(4)}, "2 tensors of no kind that is known here (a.b [3]"),
        "nothing.pth": ({"epoch": 3}, "holds 0 weights"),
        "code.pth": (weights | {"more": Payload(folder / "ran")}, "needs code to be read ("),
        "nan.pth": (weights | {"norm.weight": torch.full((32,), float("nan"))}, "values that are not finite"),
        "endless.pth": ({"patch_embed.proj.weight": torch.zeros(1).expand(10**12)}, "holds 0 weights"),
        "crooked.pth": (weights | {"cls_token": torch.zeros(())}, "do not fit together"),
        "code.bin": (__import__("pickle").dumps(Payload(folder / "ran")), "neither safetensors nor"),
        "text.pth": (b"hello, these are no weights\n", "neither safetensors nor"),
        "empty.pth": (b"", "neither safetensors nor"),
        "emptyzip.pth": (empty.getvalue(), "is damaged or no file of weights"),
        "packed.pth": (packed.getvalue(), "is compressed or has too many names"),
        "text.safetensors": (b"hello, these are no weights\n", "is damaged or no file of weights"),
        "header.safetensors": (struct.pack("<Q", 2**60) + b"{}", "is damaged or no file of weights"),
    }


@pytest.fixture(scope="module")
def wrong(tmp_path_factory) -> tuple[Path, dict[str, tuple[object, str]]]:
    folder = tmp_path_factory.mktemp("wrong")
    files = wrong_files(folder)
    for name, (content, _) in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            torch.save(content, folder / name)
    return folder, files


NAMES = [
    "wide.pth", "deep.pth", "scale.pth", "resnet.pth", "lora.pth", "heads.pth", "nothing.pth", "code.pth", "nan.pth",
    "endless.pth", "crooked.pth", "code.bin", "text.pth", "empty.pth", "emptyzip.pth", "packed.pth",
    "text.safetensors", "header.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_file_is_refused_in_a_sentence_and_runs_nothing(wrong, name):
    folder, files = wrong
    assert set(files) == set(NAMES)
    objective = make("mae")
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    with pytest.raises(UserError) as error:
        start.load(objective, str(folder / name))
    said = str(error.value)
    assert said.startswith(f"model.init={folder / name} ") or "not finite" in said
    assert files[name][1] in said
    assert "\n" not in said
    assert not (folder / "ran").exists()
    assert all(torch.equal(before[key], value) for key, value in objective.state_dict().items())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{tmp}/none.pth", "does not exist: give a file, a folder, a run, hf:<name>, or a model of timm."),
        ("vit_smal_patch16", "does not exist"),
        ("{tmp}", "is a folder without model.safetensors or pytorch_model.bin"),
        ("timm:vit_tiny_patch16_999", "is not a model of timm"),
        ("hf:no such/name", "cannot be fetched (HFValidationError"),
    ],
)
def test_a_name_of_nothing_is_refused(cli, fails, images, tmp_path, name, said):
    out = tmp_path / "out"
    answer = fails("pretrain", images, *words("mae", f"out={out}"), f"model.init={name.format(tmp=tmp_path)}")
    assert said in answer
    assert not out.exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a download needs."""

    def do_GET(self) -> None:
        files, name = self.server.files, self.path.rsplit("/", 1)[1]
        if "/resolve/" in self.path:
            return self._answer(files[name])
        found = [{"type": "file", "path": file, "size": len(files[file]), "oid": file} for file in files]
        named = {"id": "me/encoder", "sha": "0" * 40, "siblings": [{"rfilename": file} for file in files]}
        return self._answer(json.dumps(found if "/tree/" in self.path else named).encode())

    do_HEAD = do_GET

    def _answer(self, content: bytes) -> None:
        self.server.asked.append(self.path.rsplit("/", 1)[1])
        self.send_response(200)
        for key, value in {
            "X-Repo-Commit": "0" * 40,
            "ETag": f'"{len(content)}"',
            "Content-Length": len(content),
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_a_model_of_the_hub_is_fetched_without_its_code_and_then_read_without_a_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    save_file(like_timm().state_dict(), tmp_path / "model.safetensors")
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    files = {"config.json": b'{"num_attention_heads": 2}', "preprocessor_config.json": json.dumps(processor).encode()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = files | {"model.safetensors": (tmp_path / "model.safetensors").read_bytes(), "modeling.py": b"1 / 0"}
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {"ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    wanted = load_file(tmp_path / "model.safetensors")
    for is_up in (True, False):
        objective = make("mae")
        start.load(objective, "hf:me/encoder")
        assert torch.equal(
            objective.state_dict()["encoder.model.blocks.0.attn.qkv.weight"], wanted["blocks.0.attn.qkv.weight"]
        )
        if is_up:
            assert {"config.json", "preprocessor_config.json", "model.safetensors"} <= set(server.asked)
            assert "modeling.py" not in server.asked
            server.shutdown(), server.server_close()


# In a run.


def test_a_run_says_what_it_began_with_and_goes_on_when_the_file_is_gone(cli, fails, images, colour_run, tmp_path):
    file, out = tmp_path / "begin.safetensors", tmp_path / "run"
    save_file(pretrained.load(str(colour_run)).encoder.model.state_dict(), file)
    command = ["pretrain", images, *words("dino", f"out={out}", "steps=3", "warmup_epochs=0.2"), f"model.init={file}"]
    status, printed, _ = cli(*command)
    assert status == 0
    assert f"Starting from {file}, an encoder of timm, MAE, DINO or DINOv2: 60 of 60 tensors of the encoder" in printed
    assert yaml.safe_load((out / "config.yaml").read_text())["model"]["init"] == str(file)
    assert "model.init" in fails("knn", f"run=untrained:{out}", f"data.train={images}", f"data.test={images}")
    file.unlink()
    assert "model.init was" in fails(*command[:-1], "model.init=")
    shutil.rmtree(out / "checkpoints" / "step_000000003")
    for steps, begin in ((3, 0), (4, 3)):
        status, printed, _ = cli(*command, f"steps={steps}")
        assert (status, f"at step {begin} of {steps}" in printed, "Starting from" in printed) == (0, True, False)


@pytest.fixture(scope="module")
def continued(labelled, colour_run, tmp_path_factory) -> dict[str, Path]:
    """Runs that begin with `colour_run`: one that destroys its weights, and one whose encoder is frozen at first."""
    folder = tmp_path_factory.mktemp("continued")
    sets = [str(labelled / "train"), f"eval.train={labelled / 'train'}", f"eval.test={labelled / 'test'}", "eval.k=5"]
    more = [f"model.init={colour_run}", "eval.every_epochs=0.5", "save.keep_best=true", "save.keep_last=1", "seed=3"]
    found = {}
    for name, own in {
        "destroyed": ["optim.base_lr=300", "optim.clip=null"],
        "frozen": ["optim.freeze_epochs=1", "optim.layer_decay=0.5", "save.every_steps=1", "save.keep_last=99"],
    }.items():
        found[name] = folder / name
        assert main(["pretrain", *sets, *words("mae", *more, *own, f"out={found[name]}")]) == 0
    return found


def test_a_run_that_makes_its_weights_worse_says_so_and_stands_for_them(continued, colour_run):
    run = continued["destroyed"]
    record = json.loads((run / "checkpoints" / "step_000000008" / "state.json").read_text())
    assert record["best_step"] == 0
    assert record["knn_after"] <= record["knn_before"] == record["best_knn"]
    begun, now = (pretrained.load(str(path)).encoder.model.state_dict() for path in (colour_run, run))
    assert all(torch.equal(now[name], value) for name, value in begun.items())
    newest = pretrained.load(str(run / "checkpoints" / "step_000000008")).encoder.model.state_dict()
    assert not torch.equal(newest["norm.bias"], begun["norm.bias"])
    said = summary(Result(run, 8, 64, 1.0, 80.0, 60.0, None, (0, 80.0), "begin.pth"))
    assert said[1].endswith("the start 80.0%, trained encoder 60.0% (-20.0 points).")
    assert said[2].startswith("Training made these weights worse: no step had a k-NN above the start's 80.0%. So")


def test_the_encoder_is_frozen_while_the_decoder_warms_up_then_lower_blocks_learn_slower(continued, colour_run):
    def at(step: int) -> dict[str, Tensor]:
        return load_file(continued["frozen"] / "checkpoints" / f"step_{step:09d}" / "model.safetensors")

    begin, warm, end = at(0), at(4), at(8)
    of_encoder = [name for name in begin if name.startswith("encoder.") and "pos_embed" not in name]
    assert all(torch.equal(begin[name], warm[name]) for name in of_encoder)
    assert not torch.equal(begin["decoder_pred.weight"], warm["decoder_pred.weight"])
    moved = [
        (end[f"encoder.model.blocks.{i}.mlp.fc1.weight"] - warm[f"encoder.model.blocks.{i}.mlp.fc1.weight"]).abs().max()
        for i in (0, 1)
    ]
    assert 0 < moved[0] < 0.7 * moved[1]


def test_layers_of_an_encoder_have_learning_rates_of_their_own():
    objective = make("dino")
    groups = optim.layer_groups(objective, 0.5)
    names = {parameter: name for name, parameter in objective.named_parameters()}
    rates = {names[p]: (group.get("scale"), group["decayed"]) for group in groups for p in group["params"]}
    assert len(rates) == sum(p.requires_grad for p in objective.parameters())
    prefix = "student.encoder.model."
    assert rates[prefix + "patch_embed.proj.weight"] == (0.25, True)
    assert rates[prefix + "blocks.0.attn.qkv.weight"] == (0.5, True)
    assert rates[prefix + "blocks.1.attn.qkv.bias"] == (1.0, False)
    assert rates[prefix + "norm.weight"] == (1.0, False)
    assert rates["student.head.mlp.0.weight"] == (None, True)
    optimizer = optim.make_optimizer(optim.Config(layer_decay=0.5), objective)
    schedule = optim.Schedule(optim.Config(base_lr=0.1), 256, 0, 10, freeze_steps=3)
    optim.set_schedule(optimizer, schedule, 2)
    assert {group["lr"] > 0 for group in optimizer.param_groups if "scale" in group} == {False}
    assert all(group["lr"] > 0 for group in optimizer.param_groups if "scale" not in group)
    optim.set_schedule(optimizer, schedule, 3)
    assert {group["lr"] / schedule.lr(3) for group in optimizer.param_groups} == {0.25, 0.5, 1.0}


def test_init_alone_is_still_dinos_own_key(fails, images):
    assert "init belongs to method=dino" in fails("pretrain", images, *words("mae"), "init=x.pth")
    assert "objective.init must be vit or mae, not x.pth" in fails("pretrain", images, *words("dino"), "init=x.pth")


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_a_run_with_low_rank_matrices_and_an_anchor_resumes_exactly(cli, fails, labelled, colour_run, tmp_path, method):
    file, out = tmp_path / "begin.safetensors", tmp_path / "run"
    begin = pretrained.load(str(colour_run)).encoder.model.state_dict()
    save_file(begin, file)
    more = ["model.lora_rank=2", "model.anchor=0.5", "steps=4", "warmup_epochs=0.2", "optim.base_lr=0.1"]
    more += [f"model.init={file}", f"out={out}", "save.every_steps=2", "save.keep_last=2"]
    more += ["objective.drop_path=0"] * (method == "dino")
    command = ["pretrain", labelled / "train", *words(method, *more)]
    assert cli(*command)[0] == 0
    folder = out / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [f"step_00000000{step}" for step in (0, 2, 4)]
    first, *_, last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert abs(first["anchor"]) < 1e-5 < last["anchor"]
    # The encoder that leaves the run has plain names, sums of rank 2, and all else as it was.
    end = pretrained.load(str(out)).encoder.model.state_dict()
    changed = {name for name in begin if not torch.equal(begin[name], end[name])}
    assert changed == {name for name in begin if re.search(r"blocks.*(qkv|proj|fc1|fc2).weight", name)}
    assert torch.linalg.svdvals(end["blocks.0.attn.qkv.weight"] - begin["blocks.0.attn.qkv.weight"])[2] < 1e-5
    assert not any("parametrizations" in name for name in open_weights(str(out), "").tensors)
    # The second half again, without the file that the run began with.
    whole = load_file(folder / "step_000000004" / "model.safetensors")
    file.unlink()
    shutil.rmtree(folder / "step_000000004")
    assert cli(*command)[0] == 0
    again = load_file(folder / "step_000000004" / "model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    shutil.rmtree(folder / "step_000000000")
    assert "model.anchor needs the weights that the run began with" in fails(*command)


@pytest.mark.parametrize(("name", "args"), [(VIT, SMALL), SWIN])
def test_low_rank_matrices_change_nothing_at_first_and_merge(name, args):
    encoder, images = factory.create(factory.Config(name, args), (32, 32)).eval(), torch.randn(2, 3, 32, 32)
    plain, before = encoder.model.state_dict(), encoder.features(images)
    lora.add(encoder, 2, seed=0)
    assert torch.equal(encoder.features(images), before)
    assert all(torch.equal(plain[key], value) for key, value in lora.merge(encoder.model.state_dict()).items())
    learning = {key for key, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert {key.rsplit(".", 1)[1] for key in learning} == {"up", "down"}
    for key in learning:
        nn.init.normal_(encoder.get_parameter(key), std=0.1)
    after = encoder.features(images)
    assert not torch.allclose(after, before, atol=1e-3)
    merged = factory.create(factory.Config(name, args), (32, 32)).eval()
    pretrained.load_weights(merged, lora.merge(encoder.model.state_dict()), "merged")
    assert torch.allclose(merged.features(images), after, rtol=0, atol=1e-6)


def test_low_rank_matrices_and_an_anchor_need_weights_to_begin_with(fails, images):
    for key in ("model.lora_rank=2", "model.anchor=1"):
        assert "need model.init=" in fails("pretrain", images, *words("mae", key))
