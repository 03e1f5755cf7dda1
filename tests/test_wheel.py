"""What pip installs from a wheel: everything that the first page of the README does."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_wheel_has_every_folder_of_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("sslvit/**/*.py")}
    assert set(settings["packages"]) == folders | {"sslvit.configs"}


def test_recipes_are_found_by_name(cli, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = cli("recipes")[1]
    assert {line.split()[0] for line in printed.splitlines()} == {path.stem for path in ROOT.glob("configs/*.yaml")}
    assert "  quickstart                      Quickstart: DINO on fractals" in printed
    assert "`quickstart` alone is the recipe that comes with sslvit" in fails("pretrain", "configs/quickstart.yaml")
    assert "Did you mean quickstart?" in fails("pretrain", "quikstart")
    few = ["images=128", "data.train=fractals:train,count=100", "eval.train=", "eval.test=", "workers=0"]
    assert "Done: 128 images" in cli("pretrain", "quickstart", *few)[1]
    assert (tmp_path / "runs" / "quickstart" / "config.yaml").exists()
    (tmp_path / "quickstart").mkdir()  # images of this name win
    assert "no images in quickstart" in fails("pretrain", "quickstart")


@pytest.mark.slow  # builds and installs: half a minute
def test_a_wheel_in_an_empty_environment_runs_the_quickstart(tmp_path):
    """The packages that it needs are those of this environment, without this clone."""

    def run(*command: object) -> str:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clone = tmp_path / "clone"  # setuptools leaves folders where it builds
    for folder in ("sslvit", "configs"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, clone)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, clone)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    (wheel,) = tmp_path.glob("sslvit-*.whl")
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel)
    (folder,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (folder / "others.pth").write_text(sysconfig.get_path("purelib"))
    assert str(folder) in run(python, "-c", "import sslvit; print(sslvit.__file__)")
    sslvit = tmp_path / "env" / "bin" / "sslvit"
    assert "quickstart" in run(sslvit, "recipes")
    few = ["images=640", "data.train=fractals:train,count=200", "eval.train=fractals:train,count=200"]
    printed = run(sslvit, "pretrain", "quickstart", *few, "eval.test=fractals:test,count=100")
    assert "Done: 640 images" in printed
    assert "k-NN accuracy on images it never trained on" in printed
