"""Every command reads deep images as the run did, or as value_range= says: 12-bit files give what their 8-bit copies
give."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sslvit.evaluation import commands

from ..conftest import TINY_MODEL

MODEL = "model_args=" + json.dumps({**TINY_MODEL, "in_chans": 1}).replace('"', "")
VIT = ["run=random:vit_tiny_patch16_224", MODEL, "image_size=32", "precision=float32"]
RANGE = "value_range=[0,4080]"  # 16 times the values of 8 bits
LABELLED = ["data.train={0}/train", "data.test={0}/test"]
SMALL = {  # what makes a command quick, beside its images
    "attention": ["data={0}/test", "picture={0}.png", "images=2"],
    "cluster": ["data={0}/test", "k=2"],
    "quality": ["data={0}/train", "views=2"],
    "segment": ["data.train={0}/masked/train", "data.test={0}/masked/test", "epochs=1", "lr=[0.1]"],
    "finetune": [*LABELLED, "recipe=small", "epochs=1", "warmup_epochs=0", "head_epochs=0"],
    "robustness": [*LABELLED, "corruptions=[]", "attacks=[fgsm]", "eps=[1]"],
    "linear": [*LABELLED, "epochs=5"],
    "attentive": [*LABELLED, "epochs=1"],
}


@pytest.fixture(scope="module")
def twice(tmp_path_factory) -> Path:
    """deep/ and eight/: the same gray images in 12 bits and in 8. Classes differ in brightness, masks are of halves."""
    root, generator = tmp_path_factory.mktemp("twice"), np.random.default_rng(0)
    for name in [f"{split}/{c}/{i}" for split in ("train", "test") for c in (60, 180) for i in range(7)]:
        values = (int(name.split("/")[1]) + generator.integers(-50, 50, (32, 32))).astype(np.uint16)
        split, label, number = name.split("/")
        for kind, pixels in (("deep", values * 16), ("eight", values.astype(np.uint8))):
            mask = np.repeat([[0, 1]], 16, axis=1).repeat(32, axis=0).astype(np.uint8)
            for file, what in (
                (f"{name}.png", pixels),
                (f"masked/{split}/images/{label}{number}.png", pixels),
                (f"masked/{split}/masks/{label}{number}.png", mask),
            ):
                (root / kind / file).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(what).save(root / kind / file)
    return root


@pytest.mark.parametrize("command", commands())
def test_12_bits_give_what_8_bits_give(command, twice, tmp_path, cli):
    def results(kind: str, *more: str) -> list[float]:
        words = [word.format(twice / kind) for word in SMALL.get(command, LABELLED)]
        out = tmp_path / f"{kind}.json"
        status, _, error = cli(command, *VIT, *words, *more, f"out={out}")
        assert status == 0, error
        found = json.loads(out.read_text())["results"]
        return [value for key, value in numbers(found).items() if "seconds" not in key]

    # Views and crops of 8 bits are rounded after they are resized, those of more bits are not.
    assert results("deep", RANGE) == pytest.approx(results("eight"), rel=0.02, abs=0.02)


def numbers(found: Any, key: str = "") -> dict[str, float]:
    """All numbers in a result."""
    inner = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    if isinstance(found, (int, float)):
        return {key: found}
    return {name: number for k, value in inner for name, number in numbers(value, f"{key}.{k}").items()}


def test_a_classifier_keeps_the_range_of_its_images(twice, tmp_path, cli):
    made = tmp_path / "classifier"
    words = [word.format(twice / "deep") for word in SMALL["finetune"]]
    assert cli("finetune", *VIT, *words, RANGE, f"out_model={made}", "precision=bf16")[0] == 0
    assert json.loads((made / "config.json").read_text())["value_range"] == [0, 4080]


def test_a_run_has_its_own_range(colour_run, labelled, fails):
    words = ["data.train=x", "data.test=y", RANGE]
    assert "run=" in fails("knn", f"run={colour_run}", *words)
    assert "value_range=[5,5] must be [low,high] with low below high" in fails(
        "knn", "run=pixels", *words, "value_range=[5,5]"
    )


def test_pixels_of_a_run_have_its_size_channels_and_range(tmp_path, cli, fails):
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    pattern = generator.uniform(-1, 1, (3, 8, 8, 5))
    values = 2000 + 60 * pattern[labels] + generator.normal(0, 150, (60, 8, 8, 5))
    values += generator.normal(0, 300, (60, 1, 1, 1))  # of the whole image
    images = values.clip(0, 4095).round().astype(np.uint16)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "images.labels.npy", labels)
    run, mean, std = tmp_path / "run", [0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.2, 0.1, 0.2, 0.1]
    data = {"image_size": 8, "in_chans": 5, "value_range": [0, 4095], "mean": mean, "std": std}
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps({"method": "mae", "data": data}))

    assert cli("knn", f"run=pixels:{run}", f"data.train={tmp_path / 'images.npy'}", "k=[1]")[0] == 0
    (row,) = json.loads((run / "eval" / "pixels" / "knn.json").read_text())["results"]["neighbours"]
    flat = ((images / 4095 - mean) / std).reshape(60, -1)
    flat -= flat.mean(axis=0)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    nearest = (flat @ flat.T - 9 * np.eye(60)).argmax(axis=1)
    right = 100 * (labels[nearest] == labels).mean()
    assert 45 < right < 95, "a mistake would move it"
    assert row["top1"] == pytest.approx(right, abs=1e-3)
    assert "has no config.yaml" in fails("knn", f"run=pixels:{tmp_path / 'none'}", "data.train=x")
    assert not (run / "eval" / "pixels" / "features").exists()
    for wrong, expected in (
        ({"in_chans": 0}, "data.in_chans=0 must be 1 or above"),
        ({"image_size": -3}, "image_size"),
        ({"value_range": [5, 5]}, "data.value_range=[5,5] must be [low,high]"),
    ):
        (run / "config.yaml").write_text(json.dumps({"method": "mae", "data": data | wrong}))
        assert expected in fails("knn", f"run=pixels:{run}", "data.train=x")
    error = fails("knn", f"run=pixels:{run}", "data.train=x", "image_size=16")
    assert f"run=pixels:{run} has its own: leave them out" in error
