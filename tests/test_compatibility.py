"""Runs of older versions go on and are evaluated."""

from pathlib import Path

import pytest

from sslvit import compatibility, config, pretrained
from sslvit.errors import UserError

from .conftest import words


def make_old(run: Path, pack: bool = False) -> None:
    """Give a DINO run the settings file that an older version would have written."""
    lines = (run / "config.yaml").read_text().splitlines()
    lines = [line.replace("lr_schedule: linspace_cosine", "lr_schedule: dino") for line in lines]
    lines = [f"  pack: {str(pack).lower()}" if "position_resampling:" in line else line for line in lines]
    (run / "config.yaml").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def old_run(images, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of an older version, and the words of its command."""
    from sslvit.__main__ import main

    out = tmp_path_factory.mktemp("old") / "run"
    command = [str(images), *words("dino", f"out={out}", "epochs=1", "save.every_steps=2", "warmup_epochs=0")]
    assert main(["pretrain", *command, "position_resampling=timm"]) == 0
    make_old(out)
    return out, command


def test_an_older_run_is_evaluated_and_goes_on_as_it_began(cli, old_run):
    out, command = old_run
    assert pretrained.load(str(out)).encoder.width == 48
    assert pretrained.load(f"untrained:{out}").encoder.width == 48
    assert config.load(["method=dino"]).objective.position_resampling == "published"
    status, printed, _ = cli("pretrain", *command, "epochs=2")
    assert status == 0
    assert "Resuming" in printed
    stored = (out / "config.yaml").read_text()
    assert "position_resampling: timm" in stored
    assert "lr_schedule: linspace_cosine" in stored
    assert "pack" not in stored


def test_an_older_run_is_not_continued_in_another_way(fails, old_run):
    out, command = old_run
    make_old(out)
    assert "position_resampling was timm and is published" in fails(
        "pretrain", *command, "epochs=2", "position_resampling=published"
    )


def test_a_removed_key_is_refused_unless_it_did_nothing():
    values = {"objective.pack": False, "objective.momentum": 0.9, "optim.lr_schedule": "mae"}
    expected = {"objective.momentum": 0.9, "optim.lr_schedule": "warmup_cosine"}
    assert compatibility.modernise(values, "here") == expected
    assert compatibility.modernise({"objective": None, "seed": 0}, "here") == {"objective": None, "seed": 0}
    with pytest.raises(UserError, match=r"here: objective\.pack=True is no longer supported: leave it out"):
        compatibility.modernise({"objective.pack": True}, "here")


def test_an_older_recipe_is_read(tmp_path):
    (tmp_path / "old.yaml").write_text("method: dino\nobjective: {pack: false}\noptim: {lr_schedule: mae}\n")
    assert config.load([str(tmp_path / "old.yaml")]).optim.lr_schedule == "warmup_cosine"
    assert config.load(["method=mae", "optim.lr_schedule=dino"]).optim.lr_schedule == "linspace_cosine"
