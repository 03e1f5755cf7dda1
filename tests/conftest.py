"""What the tests share: a tiny encoder, 37 images (a prime), the published numbers, and the command line in-process.

Imported by the process that deals out the tests too, which must not wait for torch: fixtures import what needs it.
"""

import gc
import json
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores, so one thread each; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from sslvit.__main__ import main

from .forked_python import Interpreter

OFFICIAL = Path(__file__).parent / "golden" / "official"
TINY_MODEL = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
TINY = [
    "model.name=vit_tiny_patch16_224",
    "model.args={patch_size: 8, embed_dim: 48, depth: 2, num_heads: 2}",
    "image_size=32",
    "log.tensorboard=false",
    "log.report=false",
]
# Every file in sslvit/objectives/, and methods of your own by their dotted names.
METHODS = sorted(path.stem for path in (Path(__file__).parent.parent / "sslvit" / "objectives").glob("[!_]*.py"))
METHODS += os.environ.get("SSLVIT_METHODS", "").split()


def pytest_collection_finish() -> None:
    """What has been imported stays: the collector of garbage need not look at it again, for half a second each time."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def words(method: str, *more: str) -> list[str]:
    """The arguments of a run that takes a second: 37 images in steps of 8."""
    from sslvit import objectives

    length = [] if any(word.startswith(("steps=", "epochs=")) for word in more) else ["epochs=2"]
    small = [f"objective.{key}={value}" for key, value in getattr(objectives.find(method), "SMALL", {}).items()]
    fixed = [f"method={method}", *small, "global_batch_size=8", *length, "warmup_epochs=1", "log.every_steps=1"]
    return [*TINY, *fixed, *more]


def read_official(name: str) -> tuple[dict, dict]:
    """(settings, tensors) of the published code's numbers."""
    from safetensors.torch import load_file

    return json.loads((OFFICIAL / f"{name}.json").read_text()), load_file(OFFICIAL / f"{name}.safetensors")


@pytest.fixture(scope="session")
def official():
    return read_official


def write_images(folder: Path, count: int, size: tuple[int, int] = (40, 36), seed: int = 0) -> Path:
    """PNG files of smooth random colours, (h, w) pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A flat folder of 37 images without labels."""
    return write_images(tmp_path_factory.mktemp("images"), 37)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    """train/ and test/ with three class folders each; the classes differ in colour."""
    root = tmp_path_factory.mktemp("labelled")
    generator = np.random.default_rng(1)
    for split, count in (("train", 12), ("test", 6)):
        for c, colour in enumerate(((200, 40, 40), (40, 200, 40), (40, 40, 200))):
            folder = root / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                noise = generator.integers(-30, 30, (32, 32, 3))
                Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def colour_run(labelled, tmp_path_factory) -> Path:
    """A finished MAE run on the three colours."""
    out = tmp_path_factory.mktemp("runs") / "colours"
    assert main(["pretrain", str(labelled / "train"), *words("mae", "log.report=true", f"out={out}")]) == 0
    return out


@pytest.fixture(scope="session", autouse=True)
def quick_python():
    """What is exported is tried in processes that start at once. `real_python` has the real thing."""
    from sslvit.checkpoints import exported

    interpreter = Interpreter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exported, "sys", interpreter)
        yield interpreter
    interpreter.close()


@pytest.fixture
def real_python(monkeypatch):
    from sslvit.checkpoints import exported

    monkeypatch.setattr(exported, "sys", sys)


@pytest.fixture
def cli(capsys):
    """Run a command in this process: (exit status, standard output, standard error)."""

    def run(*argv: str) -> tuple[int, str, str]:
        status = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def fails(cli):
    """Run a command that must end with one sentence and no traceback; returns the sentence."""

    def run(*argv: str) -> str:
        status, _, error = cli(*argv)
        assert status == 2
        assert error.count("\n") == 1, error
        assert "Traceback" not in error
        return error

    return run
