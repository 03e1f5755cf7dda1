"""When settings are chosen, and what is done with them."""

import numpy as np
import pytest
from PIL import Image

from sslvit import config, settings
from sslvit.__main__ import main
from sslvit.arguments import read_yaml
from sslvit.errors import UserError
from sslvit.settings import look, resolve

from ..conftest import TINY, write_images


def load(*words: str) -> config.RunConfig:
    return settings.load(list(words), 0.0)


def test_a_folder_is_enough_and_the_same_command_goes_on(images, tmp_path, capsys):
    command = ["pretrain", str(images), "minutes=0.02", f"out={tmp_path / 'run'}", *TINY[:2], "log.tensorboard=false"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "37 images of" in printed
    assert "image_size 32: the images are 36 x 40 pixels (measured on CIFAR-10)" in printed
    assert "patch" not in printed.split("mae: vit_tiny")[0].replace("patches", "")  # it is given
    stored = read_yaml(tmp_path / "run" / "config.yaml")
    assert (stored["settings"], stored["minutes"], stored["method"]) == ("auto", 0.02, "mae")
    assert stored["model"]["args"]["depth"] == 2
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "goes on with the settings of its first start" in printed
    assert f"Resuming {tmp_path / 'run'} at step {stored['steps']} of {stored['steps']}" in printed


def test_a_recipe_with_a_time_changes_only_its_length(images, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: mae\nepochs: 100\nglobal_batch_size: 8\noptim: {warmup_epochs: 10, base_lr: 1e-3}\n")
    loaded = load(str(recipe), str(images), "minutes=0.2", f"out={tmp_path / 'run'}", *TINY, "workers=0")
    assert (loaded.minutes, loaded.epochs, loaded.optim.base_lr) == (0.2, None, 1e-3)
    assert loaded.optim.warmup_epochs == pytest.approx(10 * loaded.steps / 400)
    assert "in place of 400; the warm-up keeps its share" in capsys.readouterr().out


@pytest.mark.parametrize("more", [["epochs=3"], ["steps=3", "method=dino"], ["settings=paper"]])
def test_a_length_or_the_papers_settings_change_nothing(images, more):
    assert load(str(images), *more) == config.load([str(images), *more])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "data.train is missing: name the images to train on"),
        (["minutes=5"], "data.train is missing"),
        (["{images}", "minutes=5", "hours=1"], "Give minutes=5 or hours=1, not both"),
        (["{images}", "minutes=soon"], "minutes must be a number above 0, not soon"),
        (["{images}", "minutes=-1"], "minutes must be a number above 0, not -1"),
        (["{images}", "minutes=5", "settings=paper", "epochs=3"], "not both"),
        (["{images}", "settings=best"], "settings must be auto or paper, not best"),
        (
            ["{images}", "minutes=5", "method=mae", "mask_ratio=1.5"],
            "objective.mask_ratio=1.5 must lie between 0 and 1",
        ),
        (["{images}", "mask_rato=1"], "Did you mean objective.mask_ratio"),
    ],
)
def test_mistakes_get_a_sentence_before_anything_is_measured(words, expected, images):
    with pytest.raises(UserError, match=expected):
        load(*[word.format(images=images) for word in words])


def test_facts_of_deep_scans_with_broken_ones(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(20):
        values = generator.integers(0, 4096, (50 + i, 60), dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "00.png").read_bytes()[:300])
    facts = look.look(config.load([str(tmp_path), "workers=0"]))
    assert (facts.count, facts.channels, facts.deep, facts.value_range) == (21, 1, True, (0.0, 4095.0))
    assert facts.broken == pytest.approx(1 / 21)
    assert facts.mean[0] == pytest.approx(0.5, abs=0.02)


def test_facts_of_arrays_of_five_channels(tmp_path):
    np.save(tmp_path / "cells.npy", np.random.default_rng(0).integers(0, 256, (9, 40, 40, 5), dtype=np.uint8))
    facts = look.look(config.load([str(tmp_path / "cells.npy"), "workers=0"]))
    assert (facts.count, facts.channels, facts.height, facts.deep, len(facts.mean)) == (9, 5, 40, False, 5)


def test_a_run_is_named_after_its_images(tmp_path):
    assert resolve._name("data/my scans/") == "my_scans"
    assert resolve._name("fractals:train,count=10") == "fractals"
    assert resolve._name("[a/left,a/right]") == "left"
    write_images(tmp_path / "x", 1)
    assert resolve._name(str(tmp_path / "x")) == "x"
