"""What files of somebody else can and cannot do: a test for each sentence of the README's paragraph on trust.

Archives, images, downloads, links and damaged checkpoints have their own tests (data/, checkpoints/, test_run.py).
"""

import json
import pickle
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sslvit import arguments, config, pretrained, report
from sslvit.errors import UserError
from sslvit.export import timm_folder
from sslvit.model import factory

from .conftest import words

METHOD = """
from pathlib import Path
Path({mark!r}).touch()
from sslvit.objectives.mae import *
from sslvit.objectives.mae import Config, DEFAULTS, build, views
"""


class Payload:
    """Code that runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.fixture
def run(colour_run, tmp_path) -> Path:
    """A copy of a run, to change its files as a stranger would."""
    return Path(shutil.copytree(colour_run, tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard")))


@pytest.fixture(scope="module")
def export(colour_run, tmp_path_factory) -> Path:
    return timm_folder.export(pretrained.load(str(colour_run)), tmp_path_factory.mktemp("export") / "exported")


@pytest.fixture
def exported(export, tmp_path) -> Path:
    """A copy of an exported folder."""
    return Path(shutil.copytree(export, tmp_path / "exported"))


@pytest.fixture
def theirs(tmp_path, monkeypatch) -> Path:
    """`their_method.py`, a method on the Python path that makes a file when its code runs: that file."""
    mark = tmp_path / "their_code_ran"
    (tmp_path / "their_method.py").write_text(METHOD.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    sys.modules.pop("their_method", None)


def change(run: Path, **changes: object) -> None:
    """Change keys of a run's config.yaml; a dictionary is merged into its section."""
    stored = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in changes.items():
        stored[key] = stored[key] | value if isinstance(value, dict) else value
    (run / "config.yaml").write_text(yaml.safe_dump(stored))


def change_json(folder: Path, args: dict | None = None, **changes: object) -> None:
    stored = json.loads((folder / "config.json").read_text())
    stored["model_args"] |= args or {}
    stored["pretrained_cfg"] |= changes.pop("cfg", {})
    (folder / "config.json").write_text(json.dumps(stored | changes))


def refused(name: str, **more: object) -> str:
    """What `pretrained.load` says; within seconds of its own."""
    begin = time.process_time()
    with pytest.raises(UserError) as error:
        pretrained.load(name, **more)
    assert time.process_time() - begin < 10
    return str(error.value)


# Files run no code.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("checkpoint_path", "evil.pth"), ("checkpoint_path", "whole.safetensors"), ("pretrained", True),
        ("pretrained_cfg", {"file": "evil.pth"}), ("pretrained_cfg_overlay", {"file": "evil.pth"}),
        ("cache_dir", "cache"), ("features_only", True), ("pruned", True), ("device", "meta"), ("dtype", "float16"),
        ("norm_layer", "os.system"), ("norm_layer", "../norm"), ("depth", {"a": 2}),
    ],
)  # fmt: skip
def test_arguments_of_a_model_are_plain_values_and_name_no_file_no_place_and_no_code(
    run, exported, tmp_path, monkeypatch, key, value
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    shutil.copy(exported / "model.safetensors", tmp_path / "whole.safetensors")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": {"args": {key: value}}}))
    change(run, model={"args": {key: value}})
    change_json(exported, args={key: value})
    for name in (str(run), f"untrained:{run}", str(exported)):
        said = refused(name)
        assert f"has {key}=" in said
        assert "may be given here" in said or "a plain word" in said
    loaded = config.load([str(tmp_path / "recipe.yaml")])
    with pytest.raises(UserError, match=f"model.args has {key}="):
        factory.create(loaded.model, (32, 32))
    assert not (tmp_path / "ran").exists()


def test_weights_are_read_from_safetensors_only(exported, tmp_path):
    weights = load_file(exported / "model.safetensors")
    (exported / "model.safetensors").unlink()
    torch.save(weights, exported / "pytorch_model.bin")
    assert "has no model.safetensors, the only kind of weights that cannot hold code" in refused(str(exported))
    (exported / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert "has no model.safetensors" in refused(str(exported))
    (exported / "model.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert "SafetensorError" in refused(str(exported))
    assert not (tmp_path / "ran").exists()


def test_a_file_beside_the_weights_of_an_export_is_never_read(exported, tmp_path):
    expected = pretrained.load(str(exported)).encoder.state_dict()
    (exported / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    save_file({"x": torch.zeros(1)}, exported / "another.safetensors")
    change_json(exported, cfg={"file": str(tmp_path / "evil.pth"), "url": "http://127.0.0.1:9/x", "custom_load": True})
    got = pretrained.load(str(exported)).encoder.state_dict()
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["hf-hub:timm/vit_tiny_patch16_224", "local-dir:{folder}", "{folder}", "../x", "os.system"]
)
def test_the_name_of_a_model_is_one_of_timms_own(run, exported, name):
    other = name.format(folder=exported)
    change(run, model={"name": other})
    assert "is not a model of timm" in refused(str(run))
    change_json(exported, architecture=other)
    assert "is not a model of timm" in refused(str(exported))


# Files choose no modules.


def test_a_recipe_cannot_choose_code_and_the_command_line_can(cli, fails, images, tmp_path, theirs):
    recipe, out = tmp_path / "theirs.yaml", tmp_path / "out"
    recipe.write_text("method: their_method\n")
    length = [word for word in words("mae", "steps=1", "warmup_epochs=0") if word != "method=mae"]
    command = ["pretrain", str(recipe), str(images), *length, f"out={out}"]
    said = fails(*command)
    assert (
        "theirs.yaml has method=their_method, which is not one of dino, distill, mae, and a file cannot choose code"
        in said
    )
    assert "type method=their_method as well" in said
    assert not theirs.exists()
    status, printed, _ = cli(*command, "method=their_method")
    assert status == 0
    assert theirs.exists()
    assert printed.count(f"method=their_method is the code in {tmp_path / 'their_method.py'}.") == 1
    assert "type method=their_method as well" in fails(*command, "steps=2")  # when the run goes on too
    assert cli(*command, "steps=2", "method=their_method")[0] == 0


def test_reading_a_run_does_not_run_its_method_unless_the_user_allows_it(run, theirs):
    change(run, method="their_method")
    assert pretrained.load(str(run)).encoder.width == 48
    said = refused(f"untrained:{run}")
    assert f"{run / 'config.yaml'} has method=their_method" in said
    assert "type allow_method=their_method as well" in said
    assert "type allow_method=their_method as well" in refused(f"untrained:{run}", allow_method="another")
    assert not theirs.exists()
    assert pretrained.load(f"untrained:{run}", allow_method="their_method").encoder.width == 48
    assert theirs.exists()
    assert "leave it out" in refused(str(run), allow_method="their_method")


def test_allow_method_is_a_key_of_what_reads_runs(cli, fails, labelled, run, theirs, tmp_path):
    change(run, method="their_method")
    sets = [f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"]
    for command in (["knn", *sets], ["export", f"out={tmp_path / 'out'}"]):
        assert "type allow_method=their_method" in fails(*command, f"run=untrained:{run}")
        assert cli(*command, f"run=untrained:{run}", "allow_method=their_method")[0] == 0


# Files read neither the environment nor other files.


@pytest.mark.parametrize(
    "text", ["${oc.env:SECRET}", "https://127.0.0.1:9/${oc.env:SECRET}.zip", "${seed}", "${oc.decode:1}"]
)
def test_a_file_cannot_refer_to_the_environment_or_to_other_values(fails, run, tmp_path, monkeypatch, text):
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": {"train": text}}))
    said = fails("pretrain", str(tmp_path / "recipe.yaml"))
    assert "a file cannot refer to other values or to the environment" in said
    assert "hunter2" not in said
    for section in ({"data": {"train": text}}, {"model": {"args": {"norm_layer": [text]}}}):
        change(run, **section)
        for name in (str(run), f"untrained:{run}"):
            assert "a file cannot refer to" in refused(name)


def test_the_command_line_may_refer_to_the_environment(monkeypatch):
    monkeypatch.setenv("PLACE", "somewhere")
    assert config.load(["data.train=${oc.env:PLACE}"]).data.train == "somewhere"


# Files describe no model without limits.

LARGE = [{"depth": 1000000}, {"embed_dim": 60000, "mlp_ratio": 60000}, {"embed_dim": 10**9}, {"reg_tokens": 10**8}]


@pytest.mark.parametrize("args", LARGE)
def test_a_model_has_a_limit_of_parameters_that_the_message_names(run, exported, tmp_path, args):
    change(run, model={"args": args | {"num_heads": 1}})
    change_json(exported, args=args | {"num_heads": 1})
    for name in (str(run), str(exported)):
        assert "above the limit of" in (said := refused(name)) or "is larger than its weights" in said
    said = refused(f"untrained:{run}")
    assert "SSLVIT_MODEL_LIMITS=2" in said
    assert "above the limit of" in said or "more than 4,000,000,000 parameters" in said


@pytest.mark.parametrize("size", [20000, [20000, 20000], [1, 10**9]])
def test_images_of_an_encoder_have_a_limit_that_the_message_names(run, exported, size):
    change(run, data={"image_size": size})
    h, w = size if isinstance(size, list) else (size, size)
    change_json(exported, cfg={"input_size": [3, h, w]})
    for name in (str(run), f"untrained:{run}", str(exported)):
        said = refused(name)
        assert f"{h}x{w} does not have 1 to 16,777,216 pixels" in said
        assert "SSLVIT_MODEL_LIMITS=2" in said


def test_heads_and_decoders_have_the_limit_too(run):
    change(run, objective={"decoder_depth": 10**6})
    assert "more than 4,000,000,000 parameters or 10,000 tensors" in refused(f"untrained:{run}")
    change(run, objective={"decoder_depth": 1, "decoder_width": 10**8, "decoder_heads": 1})
    assert "more than 4,000,000,000 parameters or 10,000 tensors" in refused(f"untrained:{run}")


def test_the_limits_can_be_raised(monkeypatch):
    name = "vit_tiny_patch16_224"
    tiny = {"patch_size": 16, "embed_dim": 12, "num_heads": 1}
    with pytest.raises(UserError, match="depth=300, above the limit of 256"):
        factory.create(factory.Config(name, tiny | {"depth": 300}), (32, 32))
    monkeypatch.setenv("SSLVIT_MODEL_LIMITS", "2")
    assert len(factory.create(factory.Config(name, tiny | {"depth": 300}), (32, 32)).model.blocks) == 300
    monkeypatch.setenv("SSLVIT_MODEL_LIMITS", "lots")
    with pytest.raises(UserError, match="SSLVIT_MODEL_LIMITS=lots is not a number"):
        factory.create(factory.Config(name, tiny), (32, 32))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "levit_128"])
def test_tables_of_relative_positions_count(name):
    with pytest.raises(UserError, match="more than 4,000,000,000 parameters or 10,000 tensors"):
        factory.create(factory.Config(name), (2800, 2800))


def test_no_model_of_timm_has_an_argument_that_names_a_file():
    """The names that are let through, by the words that files, places and code have."""
    for name in (
        "vit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "mobilevitv2_050",
        "resnet18",
        "eva02_tiny_patch14_224",
    ):
        known = factory._model_arguments(name)
        assert {"drop_rate", "global_pool"} <= known
        assert not {key for key in known for word in ("path", "file", "url", "cfg_", "dir", "hub", "pretrained")
                    if word in key and not key.startswith(("drop_path", "pretrained_window"))}  # fmt: skip


def test_files_of_settings_have_a_limit_of_size(fails, exported, tmp_path):
    (tmp_path / "large.yaml").write_text("seed: 1\n" + "#" * arguments.YAML_BYTES)
    assert "larger than 262,144 bytes, the limit of a file of settings" in fails(
        "pretrain", str(tmp_path / "large.yaml")
    )
    (exported / "config.json").write_text(" " * pretrained.JSON_BYTES + "{}")
    assert "larger than 16,777,216 bytes" in refused(str(exported))


@pytest.mark.parametrize("mean", ["text", ["a", "b", "c"], [0.5], 3, None, [[0.5], 0.5, 0.5]])
def test_a_mean_that_is_no_list_of_numbers_is_a_sentence(exported, mean):
    change_json(exported, cfg={"mean": mean})
    refused(str(exported))


def test_images_that_the_run_of_somebody_else_names_are_not_shown(run, images, tmp_path):
    """A page that is mailed back would tell what lies on this machine."""
    out = tmp_path / "report.html"
    report.report([str(run)], report.Config(out=str(out)))
    text = out.read_text()
    assert "<img" not in text
    assert "may be somebody else&#x27;s" in text
    assert "000.png" not in text
    report.report([str(run)], report.Config(out=str(out), data=str(images)))
    assert out.read_text().count("<img") > 50
