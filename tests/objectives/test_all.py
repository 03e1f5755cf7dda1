"""What every objective promises (sslvit/objectives/__init__.py); a new one is found here by its file."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from sslvit import config, hardware, objectives
from tests.conftest import METHODS, words
from tests.processes import final_weights

OUTSIDE = "my_simmim"  # a copy of simmim.py in a folder outside the package
# Where a method's name is a default, a value of older files, or the name of a paper's protocol, recipe or score.
PUBLIC = [
    "compatibility.py", "config.py", "evaluation/config.py", "evaluation/finetune.py",
    "evaluation/finetuning/recipe.py",
    "evaluation/linear.py", "evaluation/published.py", "evaluation/scores.py", "settings/choose.py",
]  # fmt: skip
VARIANTS = {
    "plain": [],
    "registers": ["model.args.reg_tokens=3"],
    "not square": ["image_size=[16,32]"],
    "one channel": ["in_chans=1"],
    "five channels": ["in_chans=5"],
    "patch 4": ["model.args.patch_size=4"],
    "checkpointed": ["model.grad_checkpointing=true"],
}


@pytest.fixture(scope="module", autouse=True)
def outside(tmp_path_factory):
    """A folder with my_simmim.py and my/simmim.py is on Python's path."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "my").mkdir()
    for name in (f"{OUTSIDE}.py", "my/simmim.py"):
        shutil.copy(Path(__file__).parent / "simmim.py", folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
    for name in (OUTSIDE, "my", "my.simmim"):
        sys.modules.pop(name, None)


def test_nothing_outside_the_folder_of_methods_knows_one():
    """By a name in the code or by a text that is nothing but its name."""
    root, known = Path(objectives.__file__).parent.parent, {*objectives.names(), *map(str.upper, objectives.names())}
    for path in root.rglob("*.py"):
        place = path.relative_to(root).as_posix()
        if place.startswith("objectives/") or place in PUBLIC:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            texts = {getattr(node, field, None) for field in ("id", "attr", "name", "arg", "value", "module")}
            assert not {text for text in texts if isinstance(text, str)} & known, f"{place}:{node.lineno}"


def test_a_method_of_a_package_is_found_by_its_dotted_name():
    assert objectives.find("my.simmim").Config.mask_ratio == 0.6


def build(method: str, *more: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """An objective and a random batch of 6 images for it."""
    loaded = config.load(words(method, *more))
    module = objectives.find(method)
    torch.manual_seed(0)
    objective = module.build(loaded.objective, loaded.model, loaded.data, 4, 8)
    views = module.views(loaded.objective, loaded.data)
    batch = {name: torch.randn(len(crops), 6, loaded.data.in_chans, *crops[0].size) for name, crops in views.items()}
    return objective, {"key": torch.arange(6), **batch}


def part(batch: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    return {name: value[rows] if name == "key" else value[:, rows] for name, value in batch.items()}


def gradients(objective: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    objective.zero_grad()
    for batch in batches:
        (objective(batch, 0)["loss"] / len(batches)).backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", [*METHODS, OUTSIDE])
def test_it_gives_a_loss_and_a_gradient_to_everything_that_learns(method, variant):
    objective, batch = build(method, *VARIANTS[variant])
    values = objective(batch, 0)
    assert values["loss"].shape == ()
    assert all(torch.isfinite(value) for value in values.values())
    values["loss"].backward()
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("method", [*METHODS, OUTSIDE])
def test_forward_leaves_nothing_behind_that_is_saved(method):
    objective, batch = build(method)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective(batch, 0)
    objective(batch, 1)
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())


@pytest.mark.parametrize("method", [*METHODS, OUTSIDE])
def test_micro_batches_add_up_to_the_batch(method):
    objective, batch = build(method)
    whole = gradients(objective, [batch])
    parts = gradients(objective, [part(batch, slice(0, 2)), part(batch, slice(2, 4)), part(batch, slice(4, 6))])
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert torch.allclose(gradient, parts[name], atol=1e-5), name


@pytest.mark.parametrize("method", [*METHODS, OUTSIDE])
def test_the_same_keys_give_the_same_loss_and_others_another(method):
    objective, batch = build(method)
    first, again = objective(batch, 0)["loss"], objective(batch, 0)["loss"]
    assert torch.equal(first, again)
    if hasattr(objective.config, "mask_ratio") or hasattr(objective.config, "drop_path"):  # something is drawn
        assert not torch.equal(first, objective({**batch, "key": torch.arange(10, 16)}, 0)["loss"])


@pytest.mark.parametrize("method", [*METHODS, OUTSIDE])
def test_bf16_keeps_losses_and_weights_in_float32(method):
    objective, batch = build(method)
    hardware.choose_attention(objective, torch.device("cpu"), "bf16")
    exact = objective(batch, 0)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = objective(batch, 0)
    assert all(value.dtype == torch.float32 for value in values.values())
    assert values["loss"].item() == pytest.approx(exact.item(), rel=0.02)
    values["loss"].backward()
    objective.after_step(0)
    assert all(value.dtype == torch.float32 for value in objective.state_dict().values() if value.is_floating_point())


@pytest.mark.parametrize("method", [*METHODS, OUTSIDE])
def test_its_encoder_is_found_in_the_checkpoint_and_needs_nothing_else(method):
    objective, _ = build(method)
    place = objectives.location(objective)
    stored = objective.state_dict()
    own = objective.exported_encoder().model.state_dict()
    assert {name[len(place["prefix"]) :] for name in stored if name.startswith(place["prefix"])} == set(own)
    assert place["pool"] in ("cls", "mean", "pooled")
    assert not any("mask_token" in name for name in own)  # timm would take such weights for DINOv2's


def test_a_method_outside_the_package_is_trained_resumed_exported_and_evaluated(cli, images, labelled, tmp_path):
    """SimMIM in one file: two epochs at once give what a run gives that was stopped and started again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = [
        "pretrain",
        str(images),
        *words(OUTSIDE, "warmup_epochs=0", "save.every_steps=4", "precision=float32", "workers=0"),
    ]
    run = [word for word in run if not word.startswith("epochs=")]
    assert cli(*run, f"out={whole}", "epochs=2")[0] == 0
    assert cli(*run, f"out={parts}", "epochs=2", "max_hours=0")[0] == 75
    status, printed, _ = cli(*run, f"out={parts}", "epochs=2")
    assert status == 0
    assert "Resuming" in printed
    ours, theirs = final_weights(parts), final_weights(whole)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())

    assert cli("export", f"run={whole}", f"out={tmp_path / 'exported'}")[0] == 0
    found, sets = [], [f"train={labelled / 'train'}", f"test={labelled / 'test'}", "k=[3]", "cache=false", "workers=0"]
    for where in (whole, tmp_path / "exported"):
        assert cli("knn", f"run={where}", *sets, f"out={tmp_path / 'knn.json'}")[0] == 0
        found.append(json.loads((tmp_path / "knn.json").read_text())["results"]["neighbours"][0]["top1"])
    assert found[0] == found[1] > 50  # of three classes that differ in colour
    assert "mask_size=32" in cli("pretrain", f"method={OUTSIDE}", "--help")[1]


def test_simmims_loss_is_the_papers():
    """Xie et al., section 3.4, by pixels: the mean absolute error of the hidden ones, of whole squares."""
    objective, batch = build(OUTSIDE, "mask_size=16", "in_chans=1")
    images, mask = batch["image"][0], objectives.find(OUTSIDE).hidden(objective.config, objective.encoder, batch["key"])
    squares = mask.view(6, 2, 2, 2, 2).permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(squares.any(dim=3), squares.all(dim=3))
    assert (squares.all(dim=3).sum(dim=(1, 2)) == 3).all()  # ceil(0.6 * 4)
    tokens = objective.encoder(images, replace=(mask, objective.mask_token)).patches
    predicted = torch.pixel_shuffle(objective.head(tokens).transpose(1, 2).unflatten(2, (4, 4)), 8)
    hidden = mask.view(6, 1, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    expected = (predicted - images).abs()[hidden].mean()
    assert objective(batch, 0)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_smallest_method_of_the_documentation_trains(cli, images, tmp_path, monkeypatch):
    """The example in sslvit/objectives/__init__.py: only the two functions that a method must define."""
    lines = objectives.__doc__.splitlines()
    start = next(i for i, line in enumerate(lines) if line == "    @dataclass")
    code = [line[4:] for line in lines[start:] if line.startswith("    ") or not line]
    head = ["from dataclasses import dataclass", "from sslvit import data", "from sslvit.data.crops import Crop"]
    head += ["from sslvit.model import factory", "from sslvit.objectives import Objective"]
    (tmp_path / "example").mkdir()
    (tmp_path / "example" / "pair.py").write_text("\n".join([*head, *code]))
    monkeypatch.syspath_prepend(tmp_path)
    status, printed, _ = cli("pretrain", images, *words("example.pair", f"out={tmp_path / 'run'}", "low=0.6"))
    assert status == 0
    assert "step 8/8" in printed
