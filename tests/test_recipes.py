"""Every recipe loads, says what it is, holds the paper's values where it says so, and takes a step."""

from pathlib import Path

import pytest

from sslvit import config
from sslvit.arguments import flatten, read_yaml
from sslvit.config import RunConfig

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
PAPER = [path for path in RECIPES if "in1k" in path.name]


def load(path: Path, *words: str) -> RunConfig:
    return config.load([str(path), *words])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_header_is_a_lab_note(path):
    assert load(path).out == f"runs/{path.stem}"
    header = path.read_text().split("\nmethod:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    for word in ("Source", "Hardware", "Expected", f"configs/{path.name}"):
        assert word in header, word


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_takes_a_step(cli, images, tmp_path, path):
    """With its own crops and objective, on a small encoder and a small head."""
    small = ["model.args={embed_dim: 48, depth: 2, num_heads: 2}", "global_batch_size=4", "steps=1", "warmup_epochs=0"]
    head = {"dino": ["prototypes=32", "teacher_temp_warmup_epochs=0"], "distill": ["teacher=random:test_vit"]}
    words = [
        f"data.train={images}",
        f"out={tmp_path / 'run'}",
        "eval.train=",
        "eval.test=",
        "save.keep_best=false",
        *small,
        *head.get(load(path).method, []),
    ]
    status, printed, _ = cli("pretrain", path, *words)
    assert status == 0
    assert "step 1/1" in printed


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_paper_recipe_writes_out_every_value_of_the_method(path):
    """Nothing of the objective or the optimizer is left to a default that could change."""
    stored, declared = flatten(read_yaml(path)), flatten(config._defaults(load(path).method))
    later = {
        "pool",
        "global_crop_size",
        "student_keep",
        "koleo_weight",
        "init",
        "crop_wise_backward",
    }  # options that the papers do not have
    unused = {"optim.clip_mode"} if stored["optim.clip"] is None else set()
    unused |= {f"objective.{key}" for key in later} | {"optim.freeze_epochs", "optim.layer_decay"}
    assert {key for key in declared if key.startswith(("objective.", "optim."))} - unused <= set(stored)


def test_the_published_recipes_are_the_methods_defaults():
    for name, changed in (
        ("mae_vitb16_in1k_800ep", {"model.name": "vit_base_patch16_224"}),
        ("dino_vits16_in1k_100ep", {"model.name": "vit_small_patch16_224"}),
        (
            "dino_vits16_in1k_300ep_boosted",
            {
                "epochs": 300.0,
                "global_batch_size": 1024,
                "objective.teacher_temp": 0.07,
                "objective.teacher_temp_warmup_epochs": 30.0,
                "objective.norm_last_layer": False,
            },
        ),
    ):
        path = next(path for path in RECIPES if path.stem == name)
        recipe = load(path)
        values, defaults = flatten(_structured(recipe)), flatten(config._defaults(recipe.method))
        different = {key: value for key, value in values.items() if value != defaults[key] and key != "out"}
        assert different | {"model.name": recipe.model.name} == changed | {"model.name": recipe.model.name}, name


def _structured(recipe: RunConfig):
    from omegaconf import OmegaConf

    return OmegaConf.structured(recipe)
