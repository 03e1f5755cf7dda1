"""method=distill: the teacher is any encoder that exists, and nothing but the student learns."""

import hashlib
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from sslvit import data, optim
from sslvit.errors import UserError
from sslvit.model import factory
from sslvit.objectives import distill
from tests.conftest import TINY_MODEL, words
from tests.processes import final_weights, learned

VIT = "vit_tiny_patch16_224"
STUDENT = factory.Config(VIT, TINY_MODEL | {"embed_dim": 16})
WIDE = {"patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2}


def build(
    teacher: str = "random:test_vit", model: factory.Config = STUDENT, size: int = 32, chans: int = 3, **settings
):
    torch.manual_seed(0)
    config = distill.Config(teacher=teacher, **settings)
    return distill.build(config, model, data.Config(image_size=size, in_chans=chans), 2, 4)


def batch(size: int = 32, chans: int = 3) -> dict[str, torch.Tensor]:
    return {"key": torch.arange(5), "image": torch.randn(1, 5, chans, size, size)}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A model of timm with patches of 16 pixels, for images of mean and deviation 0.5, and its folder."""
    torch.manual_seed(1)
    model = timm.create_model(VIT, num_classes=0, img_size=64, **WIDE).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("teacher")
    timm.models.save_for_hf(
        model, folder, model_args={**WIDE, "img_size": 64}, model_config={"input_size": [3, 64, 64]}
    )
    return model, folder


def saved(path: Path, model: torch.nn.Module) -> str:
    save_file(model.state_dict(), path)
    return str(path)


def test_the_loss_is_the_share_of_the_teachers_variance_that_the_student_does_not_explain():
    """By hand, in float64, after statistics of two steps."""
    objective, seen = build(patch_weight=0.5), [batch(), batch()]
    with torch.no_grad():
        for parameter in objective.teacher.encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # so that its images differ
        for step, one in enumerate(seen):
            objective(one, step)
            objective.after_step(step)
    last, vit = batch(), objective.teacher.encoder.model
    with torch.no_grad():
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in data.normalization(data.Config()))
        pixels = [one["image"][0] * std + mean for one in [*seen, last]]
        found = [vit.forward_features((one - 0.5) / 0.5).double() for one in pixels]  # [5, 1 + 4, 64], in timm's way
        own = objective.encoder.model.forward_features(last["image"][0])
    expected = {}
    for name, part in (("feature", slice(0, 1)), ("patches", slice(1, None))):
        parts = [tokens[:, part] for tokens in found]
        if name == "patches":  # 2 x 2 patches of 16 pixels become 4 x 4 of 8
            maps = [tokens.transpose(1, 2).unflatten(2, (2, 2)) for tokens in parts]
            maps = [torch.nn.functional.interpolate(one, (4, 4), mode="bilinear") for one in maps]
            parts = [one.flatten(2).transpose(1, 2) for one in maps]
        rows = [one.flatten(0, 1) for one in parts]
        mean = (rows[0].mean(0) + rows[1].mean(0)) / 2
        variance = (rows[0].var(0, correction=0).mean() + rows[1].var(0, correction=0).mean()) / 2
        target = (rows[2] - mean) / variance.sqrt()
        predicted = objective.projections[name](own[:, part]).double().flatten(0, 1)
        expected[name] = (predicted - target).square().mean().item()
    values = objective(last, 2)
    assert values["feature_loss"].item() == pytest.approx(expected["feature"], rel=1e-3)
    assert values["patch_loss"].item() == pytest.approx(expected["patches"], rel=1e-3)
    assert values["loss"].item() == pytest.approx(expected["feature"] + 0.5 * expected["patches"], rel=1e-3)


def test_the_student_and_its_projections_learn_and_the_teacher_stays():
    objective, one = build(), batch()
    optimizer = optim.make_optimizer(optim.Config(base_lr=0.01), objective)
    encoder = objective.teacher.encoder
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    began = {name: parameter.clone() for name, parameter in objective.named_parameters()}
    objective.train()
    assert not any(module.training for module in encoder.modules())
    for step in range(2):
        objective(one, step)["loss"].backward()
        optimizer.step()
        objective.after_step(step)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert not any(torch.equal(parameter, began[name]) for name, parameter in objective.named_parameters())
    assert not any(name.startswith("teacher.") for name in objective.state_dict())


def test_a_student_learns_to_explain_its_teacher():
    objective, one = build(), batch()
    optimizer = torch.optim.AdamW(objective.parameters(), 3e-3)
    losses = []
    for step in range(40):
        values = objective(one, step)
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
        objective.after_step(step)
        losses.append(values["loss"].item())
    assert losses[1] == pytest.approx(2.0, abs=0.3)
    assert losses[-1] < 0.5 * losses[1]


def test_a_teacher_sees_its_own_normalisation_size_and_patches(theirs):
    model, folder = theirs
    objective = build(str(folder), teacher_size=(48, 64))
    pixels = torch.rand(5, 3, 32, 32)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in data.normalization(data.Config()))
    feature, tokens = objective.teacher((pixels - mean) / std)
    enlarged = torch.nn.functional.interpolate((pixels - 0.5) / 0.5, (48, 64), mode="bicubic", antialias=True)
    again = timm.create_model(VIT, num_classes=0, img_size=64, dynamic_img_size=True, **WIDE).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted = again.forward_features(enlarged)
    assert torch.allclose(feature, wanted[:, 0], atol=1e-3)
    assert torch.allclose(tokens.flatten(1, 2), wanted[:, 1:], atol=1e-3)
    assert objective({"image": pixels.unsqueeze(0)}, 0)["loss"].isfinite()


def test_a_gray_image_has_the_channels_that_the_teacher_knows(theirs):
    _, folder = theirs
    gray, colours = build(str(folder), chans=1, teacher_size=64), build(str(folder), teacher_size=64)
    pixels = torch.rand(5, 1, 32, 32)
    seen = []
    for one, chans in ((gray, 1), (colours, 3)):
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in data.normalization(data.Config(in_chans=chans)))
        seen.append(one.teacher((pixels.expand(-1, chans, -1, -1) - mean) / std)[0])
    assert torch.allclose(seen[0], seen[1], atol=1e-3)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "safetensors", "pth"])
def test_a_run_says_which_model_it_is_and_bare_weights_of_an_odd_width_do_not(kind, colour_run, tmp_path):
    checkpoint = next((colour_run / "checkpoints").glob("step_*"))
    stored = load_file(checkpoint / "model.safetensors")
    weights = {key[14:]: value for key, value in stored.items() if key.startswith("encoder.model.")}
    if kind in ("safetensors", "pth"):
        file = tmp_path / f"a.{kind}"
        save_file(weights, file) if kind == "safetensors" else torch.save({"model": weights}, file)
        with pytest.raises(UserError, match=r"width 48, .*does not say how many attention heads it has: give a run"):
            build(str(file))
        return
    encoder = build(str(colour_run if kind == "run" else checkpoint)).teacher.encoder
    assert all(torch.equal(value, weights[name]) for name, value in encoder.model.state_dict().items())
    assert encoder.pool == "mean"


def test_a_file_with_nothing_but_weights_is_recognised(tmp_path):
    torch.manual_seed(3)
    model = timm.create_model(VIT, num_classes=0, img_size=32, patch_size=8, depth=1).eval()
    encoder = build(saved(tmp_path / "a.safetensors", model)).teacher.encoder
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(images).prefix[:, 0], model(images))


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}, 32),
        ("mobilevitv2_050", {}, 64),
        ("vit_small_patch16_dinov3", {"embed_dim": 32, "depth": 1, "num_heads": 2}, 32),
    ],
)
def test_other_families_are_students_and_teachers(name, args, size):
    objective, one = build(model=factory.Config(name, args), size=size, teacher=f"random:{name}"), batch(size)
    objective(one, 0)["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in objective.parameters() if parameter.requires_grad)
    assert objective.encoder.pool == "pooled"


def test_a_model_that_cannot_take_the_images_is_one_sentence():
    encoder = build().encoder
    encoder.image_size = (30, 32)
    with pytest.raises(UserError, match=f"{VIT}, the student, cannot take images of 30x32 pixels \\(Input height"):
        distill.output_widths(encoder, "the student")
    assert encoder.training


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


WRONG = {
    "": "objective.teacher is missing: give the encoder to learn from, as in teacher=runs/mae",
    "nowhere.pth": "objective.teacher=nowhere.pth does not exist: give a file, a folder, a run, hf:<name>",
    "timm:vit_tiny_patch16_999": "is not a model of timm",
    "random:vit_tinny_patch16_224": "is not a model of timm",
    "{tmp}/text.pth": "objective.teacher={tmp}/text.pth is neither safetensors nor what torch.save has written",
    "{tmp}/code.pth": "objective.teacher={tmp}/code.pth needs code to be read (",
    "{tmp}/part.safetensors": "It is not the whole of vit_tiny_patch16_224 (differs: blocks.0.norm1.weight",
    "{tmp}/nan.safetensors": "has values that are not finite",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_teacher_that_cannot_be_is_one_sentence_and_nothing_is_written(name, fails, images, tmp_path):
    model = timm.create_model(VIT, num_classes=0, img_size=32, patch_size=8, depth=1)
    (tmp_path / "text.pth").write_text("hello\n")
    weights = model.state_dict()
    torch.save(weights | {"more": Payload(tmp_path / "ran")}, tmp_path / "code.pth")
    save_file({key: value for key, value in weights.items() if "norm1" not in key}, tmp_path / "part.safetensors")
    save_file(weights | {"norm.bias": weights["norm.bias"] * float("nan")}, tmp_path / "nan.safetensors")
    given = words("distill", f"out={tmp_path / 'out'}", f"teacher={name.format(tmp=tmp_path)}")
    said = fails("pretrain", images, *given)
    assert WRONG[name].format(tmp=tmp_path) in said
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()


def test_a_run_goes_on_bit_for_bit_with_its_teacher_only_and_its_student_is_exported(
    cli, fails, images, colour_run, tmp_path
):
    teacher, whole, parts = tmp_path / "teacher", tmp_path / "whole", tmp_path / "parts"
    shutil.copytree(colour_run, teacher)
    run = [
        "pretrain",
        images,
        *words("distill", "workers=0", "precision=float32", "warmup_epochs=0"),
        f"teacher={teacher}",
    ]
    status, printed, _ = cli(*run, f"out={whole}")
    assert (status, f"Teacher {teacher}: {VIT}, 0.1M parameters, 32x32 pixels." in printed) == (0, True)
    assert cli(*run, f"out={parts}", "max_hours=0")[0] == 75
    gone = teacher.rename(tmp_path / "gone")
    assert f"objective.teacher={teacher} does not exist" in fails(*run, f"out={parts}")
    (newest,) = (path for path in (colour_run / "checkpoints").glob("step_*"))
    other = tmp_path / "other.safetensors"
    weights = load_file(newest / "model.safetensors")
    save_file(weights | {"encoder.model.norm.bias": weights["encoder.model.norm.bias"] + 1}, other)
    shutil.copytree(gone, teacher)
    shutil.copy(other, next((teacher / "checkpoints").glob("step_*")) / "model.safetensors")
    rewrite_checksums(teacher)
    assert "is not the teacher that this run began with: its weights differ" in fails(*run, f"out={parts}")
    assert cli(*run[:-1], f"teacher={gone}", f"out={parts}")[0] == 0  # the same one at another place
    ours, theirs = final_weights(parts), final_weights(whole)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert learned(parts) == learned(whole)

    assert cli("export", f"run={whole}", f"out={tmp_path / 'exported'}")[0] == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, theirs["encoder.model.blocks.1.mlp.fc1.weight"])
    pupil = build(str(tmp_path / "exported")).teacher.encoder  # an export is a teacher, too
    assert torch.equal(pupil.model.norm.bias, theirs["encoder.model.norm.bias"])
    assert pupil.pool == "mean"


def rewrite_checksums(run: Path) -> None:
    folder = next((run / "checkpoints").glob("step_*"))
    names = [line.split("  ")[1] for line in (folder / "sha256.txt").read_text().splitlines()]
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "sha256.txt").write_text("".join(sums))


def test_a_student_may_begin_with_weights_and_another_run_of_the_method(cli, images, tmp_path):
    """The teacher of that run is not asked for, and its projections go on."""
    run = ["pretrain", images, *words("distill", "steps=2", "warmup_epochs=0.2")]
    assert cli(*run, f"out={tmp_path / 'first'}")[0] == 0
    status, printed, _ = cli(*run, "seed=1", f"model.init={tmp_path / 'first'}", f"out={tmp_path / 'second'}")
    assert status == 0
    assert "30 of 30 tensors of the encoder, 8 of 9 others" in printed, printed


def test_a_teacher_that_sees_much_smaller_images_than_it_knows_is_a_warning(theirs, capsys):
    build(str(theirs[1]), size=16)
    assert "Warning: it was trained on 64x64 pixels and sees 16x16." in capsys.readouterr().out
