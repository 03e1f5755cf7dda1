"""Checkpoints written beside the training, which of them are kept, and what happens when the disk is full."""

import fcntl
import json
import os
import shutil
import struct
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sslvit import data
from sslvit.checkpoints import journal, state
from sslvit.checkpoints.saving import Saver, disk_space_warning
from sslvit.errors import UserError
from sslvit.run import BadImages

from .. import processes
from ..conftest import words
from ..processes import assert_same_run
from .test_state import trained


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path, monkeypatch):
    go_on, write = threading.Event(), state.write
    monkeypatch.setattr(state, "write", lambda *a: go_on.wait(20) and write(*a))
    module, optimizer = trained(2)
    expected = {key: value.clone() for key, value in module.state_dict().items()}
    moments = {key: value.clone() for key, value in state.optimizer_tensors(module, optimizer).items()}
    with Saver(tmp_path, state.Config()) as saver:
        saver.save(module, optimizer, state.RunState(2), {})
        assert state.steps_saved(tmp_path) == []
        module(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        saver.check()  # nothing to say yet
        go_on.set()
    _, (weights, stored) = state.read(state.folder_of(tmp_path, 2), state.MODEL, state.OPTIMIZER)
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
    assert all(torch.equal(stored[key], value) for key, value in moments.items())


def test_what_fails_while_a_checkpoint_is_written_is_the_runs_own_error(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with Saver(tmp_path, state.Config()) as saver:
        saver.save(*trained(2), state.RunState(2), {})
        with pytest.raises(UserError, match="The checkpoint of step 2 cannot be written"):
            saver.save(*trained(3), state.RunState(3), {})


def test_checkpoints_at_multiples_and_the_best_are_kept(cli, fails, labelled, tmp_path):
    out = tmp_path / "run"
    arguments = ["pretrain", labelled / "train", *words("mae", f"out={out}", "steps=20", "k=5", "base_lr=0.1")]
    sets = [f"eval.train={labelled / 'train'}", f"eval.test={labelled / 'test'}", "every_epochs=0.25"]
    assert "give eval.train" in fails(*arguments, "keep_best=true")
    assert cli(*arguments, *sets, "keep_every=8", "keep_last=1", "keep_best=true")[0] == 0
    measured = {line["step"]: line["knn/top1"] for line in processes.lines(out) if "knn/top1" in line}
    best = max((step for step in measured if step), key=lambda step: (measured[step], -step))
    assert state.steps_saved(out) == sorted({8, 16, 20, best})
    record = json.loads((state.folder_of(out, best) / state.STATE).read_text())
    assert (record["best_step"], record["best_knn"]) == (best, pytest.approx(measured[best], rel=1e-6))


def test_a_run_that_goes_on_still_knows_its_best(cli, labelled, tmp_path):
    out = tmp_path / "run"
    more = [f"out={out}", "k=5", "every_epochs=0.5", "keep_best=true", "base_lr=0.1"]
    sets = [f"eval.train={labelled / 'train'}", f"eval.test={labelled / 'test'}"]
    for steps in (6, 16):
        assert cli("pretrain", labelled / "train", *words("mae", *more, f"steps={steps}"), *sets)[0] == 0
    measured = {line["step"]: line["knn/top1"] for line in processes.lines(out) if "knn/top1" in line}
    best = max((step for step in measured if step), key=lambda step: (measured[step], -step))
    assert best in state.steps_saved(out)


@pytest.fixture
def disk(tmp_path):
    """A function that makes a file system of so many bytes, or changes its size; a folder on it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size: int):
        again = ["remount,"] if folder.is_mount() else [""]
        command = ["mount", "-t", "tmpfs", "-o", f"{again[0]}size={size}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.strip()}")
        return folder

    yield sized
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)


FILLERS = (100_000, 16)


def fill(folder: Path) -> None:
    """Until not a byte more can be written."""
    for block in FILLERS:
        with (folder / f"filler{block}").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(block))


def test_a_full_disk_ends_the_run_in_one_sentence_and_it_goes_on_when_there_is_room(cli, images, disk, tmp_path):
    arguments = ["pretrain", images, *words("mae", "epochs=3", "save.every_steps=3")]
    whole = tmp_path / "whole"
    _, printed, _ = cli(*arguments, f"out={whole}")
    assert "Warning" not in printed
    one = sum(path.stat().st_size for path in state.folder_of(whole, 12).iterdir())
    out = disk(int(2.7 * one)) / "run"
    status, printed, error = cli(*arguments, f"out={out}")
    assert status == 2
    assert f"Warning: {out} has" in printed  # before the first step
    assert "3 x" in printed
    assert error.count("\n") == 1, error
    assert f"The checkpoint of step 9 cannot be written to {out} (" in error
    assert "The checkpoint of step 6 is whole: make room" in error
    assert state.steps_saved(out) == [3, 6]
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step_000000003", "step_000000006"}
    state.latest(out, state.MODEL, state.OPTIMIZER)
    disk(8 * one)
    assert cli(*arguments, f"out={out}")[0] == 0
    assert_same_run(whole, out)


@pytest.mark.parametrize("tensorboard", ["true", "false"])
def test_a_disk_that_fills_up_while_lines_are_written(images, disk, tmp_path, tensorboard):
    arguments = [
        "pretrain",
        images,
        *words("mae", "epochs=300", "save.every_steps=4", f"log.tensorboard={tensorboard}"),
    ]
    out = disk(40_000_000) / "run"
    process = processes.start([*arguments, f"out={out}"], tmp_path / "log")
    processes.wait_for_step(process, out, 9)
    fill(out.parent)
    printed = processes.finish(process, tmp_path / "log", status=2)
    assert "No space left on device" in printed
    assert printed.count("make room") == 1
    saved = state.steps_saved(out)
    assert saved
    state.latest(out, state.MODEL, state.OPTIMIZER)
    for block in FILLERS:
        (out.parent / f"filler{block}").unlink()
    last = saved[-1] // 4 + 2
    more = [*arguments, f"epochs={last}"]
    processes.finish(processes.start([*more, f"out={out}"], tmp_path / "log2"), tmp_path / "log2")
    assert [line["step"] for line in processes.lines(out)] == list(range(1, 4 * last + 1))


SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2  # ioctl of ext4: as if the power went, with what is not yet in its journal


@pytest.fixture
def ext4(tmp_path):
    """A folder on an ext4 file system of its own, and a function that cuts its power and starts it again."""
    image, folder = tmp_path / "ext4.img", tmp_path / "ext4"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * 2**20)
    for command in (["mkfs.ext4", "-q", image], ["mount", "-o", "loop", image, folder]):
        if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("an ext4 file system of its own is not permitted here")

    def cut() -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        os.close(descriptor)

    def again() -> None:
        subprocess.run(["umount", folder], check=True)
        subprocess.run(["mount", "-o", "loop", image, folder], check=True)

    yield folder, cut, again
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("step", [5, 14])
def test_a_run_goes_on_after_its_disk_was_cut_off(ext4, images, tmp_path, step):
    """Before its first checkpoint, and after it: the settings and starts are whole, as the checkpoints are."""
    folder, cut, again = ext4
    command, log = ["pretrain", images, *words("mae", "epochs=10", "save.every_steps=6", "workers=0")], tmp_path / "log"
    whole = processes.start([*command, f"out={tmp_path / 'whole'}"], log)
    process = processes.start([*command, f"out={folder / 'run'}"], log)
    processes.wait_for_step(process, folder / "run", step)
    cut()
    assert "Traceback" not in processes.finish(process, log, status=2)
    processes.finish(whole, log)
    again()
    for name in ("config.yaml", "starts.jsonl"):
        assert (folder / "run" / name).stat().st_size > 100
    processes.finish(processes.start([*command, f"out={folder / 'run'}"], log), log)
    assert_same_run(tmp_path / "whole", folder / "run")


def test_a_list_of_bad_images_that_cannot_be_written_ends_the_run_in_one_sentence(disk):
    folder = disk(4096 * 8)
    fill(folder)
    source = SimpleNamespace(name=lambda index: f"image {index}")
    bad = BadImages(folder, data.Config(), source)
    bad.note({"bad": [(3, "it is no image")]})
    with pytest.raises(UserError, match="No space left on device; 0 bytes are free"):
        bad.report(8)


def test_room_is_counted_for_what_the_run_will_keep(tmp_path, monkeypatch):
    module, _ = trained(0)
    one = state.size(module.state_dict()) + 2 * sum(p.nbytes for p in module.parameters() if p.requires_grad)
    for config, count in ((state.Config(), 3), (state.Config(keep_last=4, keep_every=10, keep_best=True), 16)):
        for free, expected in ((count * one, None), (count * one - 1, f"{count} x")):
            monkeypatch.setattr("sslvit.checkpoints.saving.free_space", lambda run_dir, free=free: free)
            message = disk_space_warning(tmp_path, config, module, steps=100)
            assert message == expected if expected is None else expected in message


def test_lines_written_after_a_checkpoint_are_cut_off_and_those_of_its_own_step_are_not(tmp_path):
    metrics = tmp_path / journal.METRICS
    metrics.write_text('{"step": 1}\n{"step": 2}\n')
    kept = journal.lengths(tmp_path)
    metrics.write_text(metrics.read_text() + '{"step": 2, "knn/top1": 3}\n{"st')
    (tmp_path / journal.BAD_IMAGES).write_text("a.png\tbroken\n")
    journal.rewind(tmp_path, kept, 2)
    assert metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / journal.BAD_IMAGES).read_text() == ""
    journal.rewind(tmp_path, {journal.METRICS: 14}, 1)  # somebody has edited the file: no line ends there
    assert metrics.read_text() == '{"step": 1}\n'
    journal.rewind(tmp_path, None, 0)  # a checkpoint of an earlier version
    assert metrics.read_text() == ""


@pytest.mark.slow
def test_the_hold_up_of_a_save_is_that_of_a_copy(tmp_path):
    """13 million parameters: the copy takes a small part of what writing, checksums and syncing take."""
    module = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(12)])
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(2, 1024)).sum().backward()
    optimizer.step()
    began = time.perf_counter()
    state.save(tmp_path, module, optimizer, state.RunState(1), {})
    whole = time.perf_counter() - began
    with Saver(tmp_path, state.Config()) as saver:
        began = time.perf_counter()
        saver.save(module, optimizer, state.RunState(2), {})
        assert time.perf_counter() - began < whole / 2
