"""Features are kept in files that others may read too, and are read from there without a copy in memory."""

import json
import os
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from sslvit import data
from sslvit.data.augment import Normalize
from sslvit.evaluation import feature_cache, features, linear, probes, protocol
from sslvit.evaluation.features import Features
from sslvit.hardware import start_accelerator
from sslvit.model import factory
from tests import processes
from tests.conftest import TINY_MODEL


class Labels:
    """What is asked of a source of which nothing is read."""

    def __init__(self, part: Features) -> None:
        self.labels, self.classes = part.labels.numpy(), part.classes

    def __len__(self) -> int:
        return len(self.labels)


def random_features(count: int, width: int) -> Features:
    generator = torch.Generator().manual_seed(0)
    values, labels = torch.randn(count, width, generator=generator), torch.arange(count) % 4
    return Features(values, labels, list("abcd"), torch.arange(count))


def written(folder: Path, name: str, part: Features) -> Features:
    """What is read from the file that it was written to."""
    folder.mkdir(exist_ok=True)
    content = {"width": str(part.values.shape[1])}
    feature_cache._write(folder, name, content, part)
    return feature_cache._read(folder, name, content, Labels(part))


def test_kept_features_are_what_was_computed_and_have_the_mode_of_other_files(tmp_path):
    part = random_features(37, 5)
    before = os.umask(0o027)
    try:
        again = written(tmp_path / "features", "x", part)
    finally:
        os.umask(before)
    assert torch.equal(again.values, part.values)
    assert torch.equal(again.labels, part.labels)
    (path,) = (tmp_path / "features").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_changed_bit_or_an_impossible_number_of_an_image_is_not_read(tmp_path):
    part, content = random_features(37, 5), {"width": "5"}
    written(tmp_path, "x", part)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for place in range(0, len(whole), 53):
        changed = bytearray(whole)
        changed[place] ^= 4
        path.write_bytes(changed)
        assert feature_cache._read(tmp_path, "x", content, Labels(part)) is None, place
    path.write_bytes(whole)
    assert feature_cache._read(tmp_path, "x", content, Labels(part)) is not None
    wrong = [
        part.index + 1,
        part.index - 1,
        part.index.flip(0),
        part.index.clamp(max=35),
        part.index[:36],
        part.index[None],
    ]
    for index in [*wrong, part.index.int()]:  # with the right checksum
        feature_cache._write(tmp_path, "x", content, replace(part, index=index))
        assert feature_cache._read(tmp_path, "x", content, Labels(part)) is None, index
    for values in (part.values[:, :4], part.values.half(), part.values[0]):
        feature_cache._write(tmp_path, "x", content, replace(part, values=values))
        assert feature_cache._read(tmp_path, "x", content, Labels(part)) is None, values.shape
    path.unlink()
    os.mkfifo(path)  # nobody will write to it
    assert feature_cache._read(tmp_path, "x", content, Labels(part)) is None


def test_other_pixels_of_the_same_size_and_time_are_not_taken_for_the_old_ones(cli, labelled, colour_run, tmp_path):
    run, images = tmp_path / "run", tmp_path / "images"
    shutil.copytree(colour_run, run, ignore=shutil.ignore_patterns("eval"))
    pixels = {path.parent.name: np.array(Image.open(path)) for path in labelled.glob("train/class?/0.png")}
    colours = [pixels[name] for name in sorted(pixels)]

    def accuracy(order: tuple[int, int, int]) -> float:
        """After images of one size were written, of this colour in the first, second and third of each class."""
        for c in range(3):
            (images / f"class{c}").mkdir(parents=True, exist_ok=True)
            for i, shift in enumerate(order):
                Image.fromarray(colours[(c + shift) % 3]).save(images / f"class{c}" / f"{i}.bmp")
                os.utime(images / f"class{c}" / f"{i}.bmp", (1, 1))
        assert cli("knn", f"run={run}", f"data.train={images}", "k=[1]", "workers=0")[0] == 0
        return json.loads((run / "eval" / "knn.json").read_text())["results"]["neighbours"][0]["top1"]

    assert accuracy((0, 0, 0)) == 100
    assert accuracy((0, 1, 2)) == 0  # the nearest image has the colour, and is of another class


@pytest.mark.parametrize("folder", ["there", None])
def test_room_for_features_is_in_a_nameless_file_or_in_memory(tmp_path, folder):
    folder = folder and tmp_path / folder
    if folder:
        folder.mkdir()
    room = features.room_for(7, 3, folder)
    room.copy_(torch.arange(21.0).view(7, 3))
    assert torch.equal(room[5:], torch.arange(15.0, 21.0).view(2, 3))
    assert not folder or not list(folder.iterdir())
    assert features.room_for(0, 3, folder).shape == (0, 3)
    assert features.room_for(2, 3, Path("/dev/null/x")).shape == (2, 3)  # where nothing can be written: in memory


@pytest.mark.parametrize("training", [True, False])
def test_features_are_those_of_evaluation_mode_and_the_encoder_goes_on_in_its_own(images, training):
    model = factory.Config("vit_tiny_patch16_224", TINY_MODEL | {"patch_size": 4, "proj_drop_rate": 0.5})
    encoder, source = factory.create(model, (40, 36), 3).train(training), data.open_source(str(images), data.Config())
    normalize = Normalize((0.5,) * 3, (0.25,) * 3)
    accelerator = start_accelerator("float32")  # Accelerator() takes the precision of an earlier test
    found = features.extract(encoder, source, normalize, accelerator, ("mean",), workers=0)["mean"].values
    assert all(module.training == training for module in encoder.modules())
    x = normalize(torch.stack([source.read(i) for i in range(len(source))]).float() / 255)
    with torch.no_grad():
        assert torch.allclose(found, encoder.eval().features(x, "mean"), atol=1e-5)


def unbacked() -> int:
    """Bytes of this process that are in memory and in no file."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def choose(folder: str) -> None:
    """Prints how many of three ways of pooling are in memory while the heads of each are trained; of 46 MiB each, as
    above 32 malloc gives back what is freed."""
    count, width, found = 60_000, 200, []

    def untrained(x: torch.Tensor, labels: torch.Tensor, settings: list) -> torch.Tensor:
        found.append(unbacked())
        return torch.zeros(len(settings), x.shape[1] + 1, 4)

    sets = {}
    for pool in ("cls", "mean", "last4"):
        train = written(Path(folder), pool, random_features(count, width))
        sets[pool] = (train, replace(random_features(100, width), classes=train.classes))
    before = unbacked()
    frozen: Any = SimpleNamespace(encoder=SimpleNamespace(pool="mean"))
    task = protocol.Task(frozen, "linear", list("abcd"), sets, {})
    probes.choose_and_test(linear.Config(), task, [{"lr": 0.1}], untrained)
    print(json.dumps([(now - before) / (4 * count * width) for now in found]))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what Linux says of memory")
def test_a_probe_has_one_copy_of_one_way_of_pooling_in_memory(tmp_path):
    """In a process of its own: in this one a training before may have told malloc to keep what is freed."""
    log = tmp_path / "log"
    printed = processes.finish(processes.begin(choose, str(tmp_path), output=log), log)
    assert json.loads(printed.splitlines()[-1]) == pytest.approx([0.9, 0.9, 0.9, 1.0], abs=0.4)  # a copy is 1


@pytest.mark.parametrize("command", ["linear", "logistic"])
def test_two_processes_choose_what_one_does_and_their_features_serve_it(cli, labelled, colour_run, tmp_path, command):
    """Of the same held-out images; the one process reads the features from the files of both, and computes the same."""
    run = tmp_path / "run"
    shutil.copytree(colour_run, run, ignore=shutil.ignore_patterns("eval"))
    few = {"linear": ["epochs=5", "probe_batch_size=8", "lr=[0.1,1]"], "logistic": ["l2=[1e-3,1e-1]"]}[command]
    arguments = [
        command, f"run={run}", f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}", "holdout=0.3",
        "pools=[mean,last4]", "workers=0", "precision=float32", *few,
    ]  # fmt: skip
    processes.launch([*arguments, f"out={tmp_path / 'two.json'}"], tmp_path / "log", world_size=2)
    two = json.loads((tmp_path / "two.json").read_text())["results"]
    assert two["holdout_images"] == 12  # 4 of each class of 12
    assert len(list((run / "eval" / "features").iterdir())) == 8  # two sets, two ways of pooling, two processes
    for more in ([], ["cache=false"]):
        status, printed, _ = cli(*arguments, *more, f"out={tmp_path / 'one.json'}")
        assert status == 0
        assert printed.count("as computed before") == (0 if more else 2)
        one = json.loads((tmp_path / "one.json").read_text())["results"]
        assert [one[name] for name in ("pool", "setting", "right")] == [
            two[name] for name in ("pool", "setting", "right")
        ]
        for ours, theirs in zip(one["sweep"], two["sweep"], strict=True):
            assert ours == {**theirs, "holdout_loss": pytest.approx(theirs["holdout_loss"], abs=2e-4)}  # other threads


def gather(rank: int, folder: Path) -> None:
    """In a process of its own: the even images, of which one is missing, or the odd ones, passed on five at a time."""
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    whole, features.BLOCK = random_features(23, 3), 5
    rows = torch.arange(23)[rank::2]
    rows = rows[rows != 4]
    part = Features(whole.values[rows], whole.labels[rows], whole.classes, whole.index[rows], 1)
    for everywhere in (True, False):
        found = features.gather_features(part, everywhere)
        if not everywhere and rank:
            assert len(found) == len(found.labels) == len(found.index) == 0
            continue
        others = torch.arange(23) != 4
        for name in ("values", "labels", "index"):
            assert torch.equal(getattr(found, name), getattr(whole, name)[others])
        assert found.unreadable == 1


def test_the_shares_of_two_processes_are_put_together_in_the_order_of_the_images(tmp_path):
    both = [processes.CONTEXT.Process(target=gather, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
