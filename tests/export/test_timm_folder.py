import json
import resource
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from sslvit import pretrained
from sslvit.__main__ import main
from sslvit.checkpoints import exported, timm_format
from sslvit.errors import UserError
from sslvit.export import timm_folder

from ..conftest import TINY_MODEL, words

ELSEWHERE = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
for folder, x, y in zip(*[iter(sys.argv[1:])] * 3):
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    with torch.inference_mode():
        features = model(load_file(x)["x"]).contiguous()
    head = timm.create_model("local-dir:" + folder, pretrained=True, num_classes=7)
    logits = head(torch.zeros(1, *config["input_size"])).detach()
    save_file({"features": features, "mean": torch.tensor(config["mean"]), "logits": logits}, y)
assert "sslvit" not in sys.modules
"""
ODD = ["model.args.reg_tokens=2", "in_chans=1", "image_size=[16,48]", "mean=[0.3]", "std=[0.2]"]
EXTRA = {"mae": ODD, "dino": []}


@pytest.fixture(scope="module")
def elsewhere(images, tmp_path_factory):
    """{method: (run, exported folder, images, what timm makes of them in one process that has no sslvit)}."""
    found, command = {}, [sys.executable, "-c", ELSEWHERE]
    for method, extra in EXTRA.items():
        root = tmp_path_factory.mktemp(method)
        out, folder = root / "run", root / "exported"
        assert main(["pretrain", str(images), *words(method, f"out={out}", "steps=2", "warmup_epochs=0", *extra)]) == 0
        printed = StringIO()
        with redirect_stdout(printed):
            assert main(["export", f"run={out}", "to=timm", f"out={folder}"]) == 0
        assert "no missing or unexpected weight, equal features (largest difference " in printed.getvalue()
        encoder = pretrained.load(str(out)).encoder
        x = torch.randn(3, encoder.in_chans, *encoder.image_size)
        save_file({"x": x}, root / "x.safetensors")
        command += map(str, [folder, root / "x.safetensors", root / "y.safetensors"])
        found[method] = out, folder, x, root / "y.safetensors"
    subprocess.run(command, check=True, cwd=root)
    return found


@pytest.mark.parametrize("method", EXTRA)
def test_timm_loads_it_elsewhere_with_equal_features(elsewhere, method):
    out, folder, x, made = elsewhere[method]
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    subject, theirs = pretrained.load(str(out)), load_file(made)
    with torch.inference_mode():
        assert torch.allclose(theirs["features"], subject.encoder.features(x), atol=1e-5)
    assert theirs["mean"].tolist() == pytest.approx(subject.mean)
    assert theirs["logits"].shape == (1, 7)
    config = json.loads((folder / "config.json").read_text())
    assert config["global_pool"] == {"mae": "avg", "dino": "token"}[method]

    again = pretrained.load(str(folder))
    assert again.encoder.pool == {"mae": "mean", "dino": "cls"}[method]
    assert (again.mean, again.std) == (subject.mean, subject.std)


def test_an_export_reads_deep_images_as_the_run_did_and_anybody_may_load_it(cli, images, tmp_path):
    run, out = tmp_path / "run", tmp_path / "encoder"
    assert (
        cli("pretrain", images, *words("mae", f"out={run}", "epochs=1", "warmup_epochs=0", "value_range=[0,4095]"))[0]
        == 0
    )
    assert cli("export", f"run={run}", "to=timm", f"out={out}")[0] == 0
    assert pretrained.load(str(out)).data_config.value_range == (0.0, 4095.0)
    modes = {path.name: path.stat().st_mode for path in out.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


@pytest.mark.parametrize(("pool", "theirs"), [("cls", {"global_pool": "token"}), ("mean", {"global_pool": "avg"})])
def test_the_config_of_an_export_says_what_its_images_must_be(pool, theirs):
    subject = pretrained.load("random:vit_tiny_patch16_224", (16, 48), TINY_MODEL | {"in_chans": 1})
    subject.mean, subject.std, subject.value_range, subject.encoder.pool = (0.3,), (0.2,), (0.0, 4095.0), pool
    config = timm_folder.timm_config(subject)
    images = {"mean": [0.3], "std": [0.2], "input_size": [1, 16, 48], "fixed_input_size": False, "num_classes": 0}
    assert config["pretrained_cfg"].items() >= images.items()
    assert config["value_range"] == [0, 4095]
    assert config["num_features"] == 48
    assert config["model_args"].items() >= (TINY_MODEL | theirs | {"in_chans": 1}).items()
    assert config["model_args"].get("fc_norm") is (False if pool == "mean" else None)  # timm's own is never trained


def test_dino_exports_its_teacher(cli, images, tmp_path, real_python):
    out = tmp_path / "run"
    assert cli("pretrain", images, *words("dino", f"out={out}", "base_lr=0.01", "momentum=0.5"))[0] == 0
    assert cli("export", f"run={out}")[0] == 0
    weights = load_file(out / "export" / "timm" / "model.safetensors")
    stored = load_file(next((out / "checkpoints").glob("step_*")) / "model.safetensors")
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(weights[name], stored[f"teacher.encoder.model.{name}"])
    assert not torch.equal(weights[name], stored[f"student.encoder.model.{name}"])


def test_other_families_are_exported_too(cli, tmp_path):
    torch.manual_seed(0)
    subject = pretrained.load("random:mobilevitv2_050", image_size=64)
    folder = timm_folder.export(subject, tmp_path / "exported")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(model(x), subject.encoder.features(x), atol=1e-5)


def test_models_that_pool_in_their_own_way_are_measured_and_exported_as_timm_does(tmp_path):
    """DeiT's distilled ViT has two tokens; and timm's own folders may have a norm after the mean."""
    x = torch.randn(2, 3, 32, 32)
    args = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 2}
    distilled = pretrained.load("random:deit_tiny_distilled_patch16_224", image_size=32, model_args=args)
    folder = timm_folder.export(distilled, tmp_path / "exported")
    torch.manual_seed(0)
    foreign = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, global_pool="avg", fc_norm=True, **args
    ).eval()
    torch.nn.init.normal_(foreign.fc_norm.weight)
    timm.models.save_for_hf(
        foreign, tmp_path / "foreign", model_args={"img_size": 32, "global_pool": "avg", "fc_norm": True, **args},
        model_config={"input_size": [3, 32, 32]}, safe_serialization=True,
    )  # fmt: skip
    with torch.inference_mode():
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x)
        assert torch.allclose(distilled.encoder.features(x), theirs, atol=1e-5)
        again = pretrained.load(str(tmp_path / "foreign")).encoder
        assert again.pool == "pooled"
        assert torch.allclose(again.features(x), foreign(x), atol=1e-5)


def test_an_export_that_is_not_the_encoder_fails_loudly(colour_run, tmp_path):
    subject = pretrained.load(str(colour_run))
    folder = timm_folder.export(subject, tmp_path / "exported")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "norm.bias": weights["norm.bias"] + 1}, folder / "model.safetensors", {"format": "pt"})
    images, features = timm_folder.example(subject.encoder)
    load = timm_format.LOAD
    with pytest.raises(UserError, match="timm's features of the exported vit_tiny differ from the encoder's by"):
        exported.check(folder, load, "timm vit_tiny", [images], [features])
    del weights["norm.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="timm does not load vit_tiny as it was exported: "):
        exported.check(folder, load, "timm vit_tiny", [images], [features])


def test_a_folder_with_other_things_is_left_alone(fails, colour_run, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    assert "holds other things" in fails("export", f"run={colour_run}", f"out={tmp_path}")
    assert "out= is missing" in fails("export", "run=random:resnet18")
    assert "run= is missing" in fails("export")
    assert (tmp_path / "precious.txt").exists()


def test_a_damaged_newest_checkpoint_is_said_first_and_the_one_before_it_is_exported_by_its_path(
    cli, labelled, tmp_path
):
    run, sets = tmp_path / "run", [f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"]
    more = ["steps=2", "warmup_epochs=0", "save.every_steps=1"]
    assert cli("pretrain", labelled / "train", *words("mae", f"out={run}", *more))[0] == 0
    older, newest = sorted((run / "checkpoints").iterdir())
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    sentence = (
        f"The checkpoint {newest} is damaged (model.safetensors is not what was written). The one before it is taken."
    )
    status, printed, _ = cli("knn", f"run={run}", *sets, "k=[1]")
    assert (status, printed.splitlines()[0]) == (0, sentence)
    assert json.loads((run / "eval" / "knn.json").read_text())["notes"] == [sentence]
    assert f"{run}, knn: {sentence}" in cli("compare", run)[1]

    status, printed, error = cli("export", f"run={run}")
    assert (status, printed) == (2, f"{sentence}\n")
    assert f"to export the one before it, give run={older}." in error
    assert not (run / "export").exists()
    assert cli("export", f"run={older}")[0] == 0
    source = json.loads((run / "export" / "timm" / "config.json").read_text())["source"]
    assert source == {"checkpoint": str(older), "step": 1, "images_seen": 8, "notes": []}


def test_an_export_follows_no_link_and_what_cannot_be_written_gets_a_sentence(cli, fails, colour_run, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.json").write_text("mine")
    run = tmp_path / "run"
    shutil.copytree(colour_run, run)
    (run / "export").symlink_to(home)
    assert "run/export is a link, and links are not followed: give another" in fails("export", f"run={run}")
    (run / "export").unlink()
    (run / "export").mkdir()
    (run / "export" / "timm").symlink_to(home)
    assert "export/timm is a link, and links are not followed: give a new" in fails("export", f"run={run}")
    (run / "export" / "timm").unlink()
    (run / "export" / ".timm.writing").symlink_to(home)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # bytes of a file, as on a full disk
    try:
        assert "cannot be written: " in fails("export", f"run={run}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((run / "export").iterdir()) == []
    assert cli("export", f"run={run}")[0] == 0
    assert [path.name for path in (run / "export").iterdir()] == ["timm"]
    assert [(path.name, path.read_text()) for path in home.iterdir()] == [("config.json", "mine")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", ["a", "b", "c"]),
        ("mean", "0.5"),
        ("mean", [0.5]),
        ("std", [0, 0, 0]),
        ("std", [float("nan")] * 3),
        ("mean", None),
    ],
)
def test_impossible_numbers_for_the_pixels_of_an_export_get_a_sentence(
    fails, colour_run, labelled, tmp_path, key, value
):
    subject = pretrained.load(str(colour_run))
    config = timm_folder.timm_config(subject)
    config["pretrained_cfg"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(subject.encoder.model.state_dict(), tmp_path / "model.safetensors")
    error = fails("knn", f"run={tmp_path}", f"data.train={labelled / 'train'}", "workers=0")
    assert f"{key}=" in error or f"data.{key} has 1 numbers" in error
