"""Whole runs: what they leave behind, and that being interrupted or dealt out in another way changes nothing."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from sslvit import data, energy, hardware, progress, run
from sslvit.checkpoints import state

from . import processes
from .conftest import METHODS, words, write_images
from .processes import assert_same_run, final_weights, learned


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_its_record(cli, images, tmp_path, method):
    out = tmp_path / "run"
    status, printed, _ = cli("pretrain", images, *words(method, f"out={out}", "precision=float32"))
    assert status == 0
    assert "step 8/8  epoch 2.00/2  loss" in printed
    assert "images/s" in printed
    assert "Done: 64 images" in printed
    names = {".lock", "config.yaml", "starts.jsonl", "metrics.jsonl", "checkpoints"}
    assert {path.name for path in out.iterdir()} == names
    start = json.loads((out / "starts.jsonl").read_text())
    assert (
        start["versions"]["torch"] == torch.__version__.split("+")[0] or start["versions"]["torch"] in torch.__version__
    )
    lines = processes.lines(out)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["images"] == 64
    assert lines[0]["lr"] == 0
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and 0 <= line["data_wait"] <= 1 for line in lines)
    assert state.steps_saved(out) == [8]


def test_what_a_run_notices_on_the_way_is_asked_for_and_said(cli, images, tmp_path, monkeypatch):
    """Once for each micro-batch: counters of energy, and how long it will take. With each line: other processes."""
    polls, totals = [], []
    monkeypatch.setattr(energy.Meter, "poll", lambda self: polls.append(1))
    monkeypatch.setattr(hardware.OtherProcesses, "sentence", lambda self: "Others are busy.")
    monkeypatch.setattr(progress.LongRun, "note", lambda self: totals.append(self.total) or ["It is long."])
    status, printed, _ = cli("pretrain", images, *words("mae", f"out={tmp_path / 'run'}", "batch_size=4"))
    assert status == 0
    assert printed.count("Others are busy.") == 8
    assert printed.count("It is long.") == len(polls) == 16
    assert totals == [16] * 16


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, images, method, workers):
    """SIGKILL at some moment after step 7, then the same command: equal weights, moments and log, by torch.equal. (The
    save of step 6 waits for that of step 3.)"""
    arguments = ["pretrain", images, *words(method, "save.every_steps=3", f"workers={workers}", "epochs=3")]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    processes.finish(processes.start([*arguments, f"out={whole}"], tmp_path / "log"), tmp_path / "log")
    processes.kill_at(processes.start([*arguments, f"out={broken}"], tmp_path / "log"), broken, step=7)
    assert state.steps_saved(broken)[-1] < 12
    printed = processes.finish(processes.start([*arguments, f"out={broken}"], tmp_path / "log2"), tmp_path / "log2")
    assert f"Resuming {broken} at step" in printed
    assert_same_run(whole, broken)
    assert [line["step"] for line in learned(broken)] == list(range(1, 13))


def test_a_line_of_the_log_that_a_kill_interrupts_is_the_same_line(cli, images, tmp_path):
    """Lines are means over five steps, and checkpoints come at other steps."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = ["pretrain", images, *words("dino", "save.every_steps=3", "keep_last=9", "log.every_steps=5")]
    assert cli(*arguments, f"out={whole}")[0] == 0
    shutil.copytree(whole, resumed)
    for step in (6, 8):
        shutil.rmtree(state.folder_of(resumed, step))
    assert cli(*arguments, f"out={resumed}")[0] == 0
    assert_same_run(whole, resumed)


@pytest.mark.parametrize("method", METHODS)
def test_where_images_are_kept_does_not_change_a_run(cli, images, tmp_path, method):
    """But for the rounding of crops, by a level of 255; and a run goes on with them elsewhere."""
    arguments = ["pretrain", images, *words(method, "precision=float32", "save.every_steps=4", "workers=1")]
    status, printed, _ = cli(*arguments, f"out={tmp_path / 'ram'}")
    assert "1 loader process, images stay in memory, writing" in printed
    status, printed, _ = cli(*arguments, f"out={tmp_path / 'device'}", "cache=device")
    assert "0 loader processes, images on the device (156 KiB), writing" in printed
    assert status == 0
    assert torch.allclose(losses(tmp_path / "ram"), losses(tmp_path / "device"), rtol=2e-3)
    shutil.copytree(tmp_path / "device", tmp_path / "both")
    shutil.rmtree(state.folder_of(tmp_path / "both", 8))
    assert cli(*arguments, f"out={tmp_path / 'both'}", "cache=ram")[0] == 0
    assert torch.allclose(losses(tmp_path / "both"), losses(tmp_path / "device"), rtol=2e-3)


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def losses(run_dir: Path) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in processes.lines(run_dir) if "loss" in line])


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_and_processes_do_not_change_a_run(tmp_path, images, method):
    """One batch of 8 = 2 x 4 = 4 x 2 = two processes with 2 x 2: losses and weights within 1e-5."""
    arguments = ["pretrain", images, *words(method, "precision=float32", "base_lr=1e-3")]
    log = tmp_path / "log"
    runs = {name: tmp_path / name for name in ("whole", "halves", "quarters", "processes")}
    started = [
        processes.start([*arguments, f"out={runs['whole']}"], log),
        processes.start([*arguments, f"out={runs['halves']}", "batch_size=4"], log),
        processes.start([*arguments, f"out={runs['quarters']}", "batch_size=2"], log),
    ]
    for process in started:
        processes.finish(process, log)
    printed = processes.launch(
        [*arguments, f"out={runs['processes']}", "batch_size=2"], tmp_path / "log2", world_size=2
    )
    assert "2 x 2 micro-batches x 2 processes" in printed
    expected, weights = losses(runs["whole"]), final_weights(runs["whole"])
    for name in ("halves", "quarters", "processes"):
        assert torch.allclose(losses(runs[name]), expected, atol=1e-5), name
        for key, value in final_weights(runs[name]).items():
            if not key.endswith("qkv.bias"):  # a key's bias has no gradient but rounding, which Adam blows up
                assert torch.allclose(value, weights[key], atol=1e-5), (name, key)


def test_a_run_may_go_on_with_two_processes_and_then_with_one_again(cli, tmp_path, images):
    """1 -> 2 -> 1: losses of every step within 1e-5 of the uninterrupted run's."""
    own = ["precision=float32", "base_lr=1e-3", "batch_size=2", "epochs=3", "save.every_steps=4", "keep_last=9"]
    arguments = ["pretrain", images, *words("dino", *own)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli(*arguments, f"out={whole}")[0] == 0
    shutil.copytree(whole, parts)
    for step in (8, 12):
        shutil.rmtree(state.folder_of(parts, step))
    assert "at step 4 of 12" in processes.launch([*arguments, f"out={parts}"], tmp_path / "log", world_size=2)
    assert state.steps_saved(parts) == [4, 8, 12]
    shutil.rmtree(state.folder_of(parts, 12))
    assert "at step 8 of 12" in cli(*arguments, f"out={parts}")[1]
    assert [line["step"] for line in learned(parts)] == list(range(1, 13))
    assert torch.allclose(losses(parts), losses(whole), atol=1e-5)


def test_a_finished_run_is_extended(cli, images, tmp_path):
    out = tmp_path / "run"
    assert cli("pretrain", images, *words("mae", f"out={out}"))[0] == 0
    status, printed, _ = cli("pretrain", images, *words("mae", f"out={out}", "epochs=3"))
    assert status == 0
    assert "Resuming" in printed
    lines = processes.lines(out)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[8]["lr"] > lines[7]["lr"]  # the schedule is that of the longer run from here on
    status, printed, _ = cli("pretrain", images, *words("mae", f"out={out}", "epochs=3"))
    assert status == 0
    assert len(processes.lines(out)) == 12


def test_other_settings_are_refused_by_name_and_nothing_is_touched(cli, fails, images, tmp_path):
    out = tmp_path / "run"
    assert cli("pretrain", images, *words("mae", f"out={out}"))[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    message = fails("pretrain", images, *words("mae", f"out={out}", "mask_ratio=0.5", "base_lr=1e-3"))
    assert "objective.mask_ratio was 0.75 and is 0.5" in message
    assert "optim.base_lr was" in message
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert (
        cli("pretrain", images, *words("mae", f"out={out}", "batch_size=4", "workers=0", "log.every_steps=2"))[0] == 0
    )


def test_a_directory_with_other_things_is_not_written_to(fails, images, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    assert "holds files that are not of a run" in fails("pretrain", images, *words("mae", f"out={tmp_path}"))
    assert "is a file" in fails("pretrain", images, *words("mae", f"out={tmp_path / 'precious.txt'}"))
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("mistake", ["data.train=/no/such/folder", "out=/proc/nowhere", "image_size=30"])
def test_a_mistake_ends_all_processes(tmp_path, images, mistake):
    """None of them waits for one that has failed."""
    arguments = ["pretrain", *words("mae", f"data.train={images}", f"out={tmp_path / 'run'}", mistake)]
    printed = processes.launch(arguments, tmp_path / "log", world_size=2, seconds=40, status=2)
    assert printed.count("sslvit pretrain: ") == 2
    assert "Traceback" not in printed


def test_a_folder_that_only_looks_like_a_run_is_not_written_to(fails, images, tmp_path):
    (tmp_path / "config.yaml").write_text("my: own settings\n")
    (tmp_path / "metrics.jsonl").write_text("my own lines\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert "holds files that are not of a run" in fails("pretrain", images, *words("mae", f"out={tmp_path}"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_killed_in_its_first_moment_is_begun_again(cli, images, tmp_path):
    for name in (".lock", "starts.jsonl", "config.yaml.tmp"):
        (tmp_path / name).touch()
    assert cli("pretrain", images, *words("mae", f"out={tmp_path}"))[0] == 0


def test_two_processes_do_not_train_in_one_directory(fails, images, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = ["pretrain", images, *words("mae", f"out={out}", "epochs=500")]
    first = processes.start(arguments, log)
    try:
        processes.wait_for_step(first, out, 4)
        assert "Another process is training in" in fails(*arguments)
    finally:
        first.kill()
        first.join()


def test_a_config_that_cannot_be_read_gets_a_sentence(cli, fails, images, tmp_path):
    out = tmp_path / "run"
    assert cli("pretrain", images, *words("mae", f"out={out}"))[0] == 0
    (out / "config.yaml").write_text("method: [mae\n")
    assert "config.yaml line 2 cannot be read" in fails("pretrain", images, *words("mae", f"out={out}", "epochs=3"))


def test_other_images_are_refused_and_the_same_elsewhere_are_not(cli, fails, images, tmp_path):
    moved, out, whole = tmp_path / "moved", tmp_path / "run", tmp_path / "whole"
    shutil.copytree(images, moved)
    assert cli("pretrain", images, *words("mae", f"out={whole}", "save.every_steps=3", "keep_last=9"))[0] == 0
    shutil.copytree(whole, out)
    for step in (6, 8):
        shutil.rmtree(state.folder_of(out, step))
    assert cli("pretrain", moved, *words("mae", f"out={out}", "save.every_steps=3", "keep_last=9"))[0] == 0
    assert_same_run(whole, out)
    (moved / "000.png").rename(moved / "zzz.png")
    message = fails("pretrain", moved, *words("mae", f"out={out}", "epochs=3"))
    assert "holds 37 images, which are not the 37 images that this run began with" in message


def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(cli, fails, images, tmp_path):
    out = tmp_path / "run"
    assert cli("pretrain", images, *words("mae", f"out={out}", "base_lr=1e18", "steps=1", "warmup_epochs=0"))[0] == 0
    assert cli("pretrain", images, *words("mae", f"out={tmp_path / 'sane'}", "steps=1", "warmup_epochs=0"))[0] == 0
    before = final_weights(out)
    message = fails("pretrain", images, *words("mae", f"out={out}", "base_lr=1e18", "steps=9", "warmup_epochs=0",
                                                  "max_nonfinite=3"))  # fmt: skip
    assert "The run has diverged" in message
    assert "The last checkpoint, of step 1, is from before" in message
    assert state.steps_saved(out) == [1]
    assert all(torch.equal(value, before[name]) for name, value in final_weights(out).items())
    assert "NaN" not in (out / "metrics.jsonl").read_text()


FAST = ["epochs=20", "warmup_epochs=0", "base_lr=0.05", "momentum=0.5"]
EVEN = ["teacher_temp=5", "teacher_temp_start=5"]
ONE = ["teacher_temp=0.002", "teacher_temp_start=0.002", "center_momentum=1"]


def test_a_collapse_is_said_once_in_plain_words_and_early(cli, images, tmp_path):
    printed = cli("pretrain", images, *words("dino", *FAST, *EVEN, f"out={tmp_path / 'run'}"))[1]
    step = int(re.search(r"Warning at step (\d+): DINO has collapsed to one even answer", printed).group(1))
    assert step <= 8  # a tenth of the run
    assert printed.count("Warning at step") == 1


@pytest.mark.parametrize(
    ("knobs", "expected"), [(EVEN, "collapsed to one even answer"), (ONE, "collapsed to one prototype")]
)
def test_a_collapse_can_stop_the_run(fails, images, tmp_path, knobs, expected):
    stopped = fails("pretrain", images, *words("dino", *FAST, *knobs, f"out={tmp_path / 'run'}", "on_collapse=stop"))
    assert expected in stopped
    assert int(re.search(r"stops at step (\d+)", stopped).group(1)) <= 8


def test_a_healthy_run_raises_no_alarm(cli, images, tmp_path):
    assert "Warning" not in cli("pretrain", images, *words("dino", f"out={tmp_path / 'run'}", "epochs=5"))[1]


def test_broken_images_are_skipped_counted_and_named_once(cli, tmp_path):
    folder = write_images(tmp_path / "images", 37)
    (folder / "003.png").write_bytes(b"no image")
    (folder / "017.png").write_bytes((folder / "016.png").read_bytes()[:80])
    out = tmp_path / "run"
    status, printed, _ = cli("pretrain", folder, *words("mae", f"out={out}", "bad_ratio=0.1", "epochs=4"))
    assert status == 0
    assert printed.count("Cannot read") == 2
    names = [line.split("\t")[0] for line in (out / "bad_images.txt").read_text().splitlines()]
    assert sorted(names) == [str(folder / "003.png"), str(folder / "017.png")]


def test_too_many_broken_images_stop_the_run(fails, tmp_path):
    folder = write_images(tmp_path / "images", 37)
    for i in range(0, 37, 3):
        (folder / f"{i:03d}.png").write_bytes(b"")
    message = fails("pretrain", folder, *words("mae", f"out={tmp_path / 'run'}", "bad_ratio=0.002"))
    assert "images cannot be read" in message
    assert "data.bad_ratio=0.002" in message
    for path in folder.iterdir():
        path.write_bytes(b"")
    message = fails("pretrain", folder, *words("mae", f"out={tmp_path / 'run2'}"))
    assert "in a row cannot be read" in message
    named = message.split("The last is ")[1].split(": ")[0]
    assert named in (tmp_path / "run2" / "bad_images.txt").read_text()


def test_knn_during_the_run_is_logged_and_reported(cli, labelled, tmp_path):
    out = tmp_path / "run"
    status, printed, _ = cli(
        "pretrain", labelled / "train", *words("mae", f"out={out}", "eval.k=5", "eval.every_epochs=1"),
        f"eval.train={labelled / 'train'}", f"eval.test={labelled / 'test'}",
    )  # fmt: skip
    assert status == 0
    measured = [(line["step"], line["knn/top1"]) for line in processes.lines(out) if "knn/top1" in line]
    assert [step for step, _ in measured] == [0, 4, 8]
    assert measured[-1][1] > 90  # three colours
    again = cli(
        "pretrain", labelled / "train", *words("mae", f"out={out}", "eval.k=5", "eval.every_epochs=1"),
        f"eval.train={labelled / 'train'}", f"eval.test={labelled / 'test'}",
    )  # fmt: skip
    assert again[1].splitlines()[-1] == printed.splitlines()[-1]  # a finished run tells its result, and repeats nothing
    assert [line["step"] for line in processes.lines(out) if "knn/top1" in line] == [0, 4, 8]
    assert f"untrained encoder {measured[0][1]:.1f}%, trained encoder {measured[-1][1]:.1f}%" in printed


def test_accelerate_launches_it(images, tmp_path, capfd, monkeypatch):
    """`accelerate launch`, in this process, and the process that it starts."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    run = ["-m", "sslvit", "pretrain", str(images), *words("dino", f"out={tmp_path / 'run'}")]
    launch_command(launch_command_parser().parse_args(["--cpu", *run]))
    printed = capfd.readouterr().out
    assert printed.count("step 8/8") == 1
    assert "8 x 1 micro-batches x 1 processes" in printed
    assert state.steps_saved(tmp_path / "run") == [8]


@pytest.mark.slow  # starts Python three times
@pytest.mark.parametrize("launcher", [["accelerate.commands.launch", "--cpu"], TORCHRUN])
def test_the_launchers_start_it(images, tmp_path, launcher):
    out = tmp_path / "run"
    command = [sys.executable, "-m", *launcher, "-m", "sslvit", "pretrain", str(images), *words("dino", f"out={out}")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 8/8") == 1
    layout = "4 x 1 micro-batches x 2 processes" if "2" in launcher else "8 x 1 micro-batches x 1 processes"
    assert layout in done.stdout
    assert state.steps_saved(out) == [8]


@pytest.mark.slow  # four processes on two cores
def test_two_machines_train_as_one(images, tmp_path):
    """Two torchruns that meet, as the recipe for several machines starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    run = ["-m", "sslvit", "pretrain", str(images), *words("dino", "precision=float32")]
    meet = ["--master_addr", "127.0.0.1", "--master_port", port]
    started = []
    for node in range(2):
        machine = ["--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "2", *meet]
        command = [sys.executable, "-m", "torch.distributed.run", *machine, *run, f"out={tmp_path / 'two'}"]
        started.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path))
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    command = [sys.executable, *run, f"out={tmp_path / 'one'}"]
    subprocess.run(command, check=True, cwd=tmp_path)
    ours, theirs = final_weights(tmp_path / "two"), final_weights(tmp_path / "one")
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)


@pytest.mark.slow  # the compiler takes most of a minute for each
@pytest.mark.parametrize("method", METHODS)
def test_compiled_blocks_train_as_plain_ones_and_say_what_they_cost(cli, images, tmp_path, method):
    more = ["precision=float32", "steps=5", "batch_size=4", *(["drop_path=0.5"] if method == "dino" else [])]
    for name in ("plain", "compiled"):
        chosen = ["compile=true"] if name == "compiled" else []
        status, printed, _ = cli("pretrain", images, *words(method, f"out={tmp_path / name}", *more, *chosen))
        assert status == 0
    assert re.search(r"Compiled \d blocks in \d+ s", printed)
    ours, theirs = final_weights(tmp_path / "compiled"), final_weights(tmp_path / "plain")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)


def test_other_images_under_the_same_names_are_refused_and_repaired_ones_are_not(cli, fails, images, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    command = ["pretrain", folder, *words("mae", f"out={tmp_path / 'run'}", "workers=0")]
    assert cli(*command, "epochs=2")[0] == 0
    paths = sorted(folder.iterdir())
    for path in paths[:7]:
        Image.new("RGB", (9, 9)).save(path)
    assert cli(*command, "epochs=3")[0] == 0
    for path in paths:
        Image.new("RGB", (9, 9)).save(path)
    assert "their names are the same, their contents are not" in fails(*command, "epochs=4")
    record = state.latest(tmp_path / "run")[1]
    del record["images"]["sample"]  # as older versions wrote it
    run.check_images(record, data.open_source(str(folder), data.Config()), str(folder))


def test_a_finished_run_that_is_asked_for_less_says_so(cli, images, tmp_path):
    command = ["pretrain", images, *words("mae", f"out={tmp_path / 'run'}", "workers=0")]
    assert cli(*command, "epochs=2")[0] == 0
    printed = cli(*command, "epochs=1.5")[1]
    assert "has 8 steps already, and these settings ask for 6: nothing is trained." in printed


def test_images_that_are_all_the_same_are_noticed(cli, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(9):
        Image.new("RGB", (32, 32), "red").save(tmp_path / "images" / f"{number}.png")
    printed = cli("pretrain", tmp_path / "images", *words("mae", f"out={tmp_path / 'run'}", "steps=2", "workers=0"))[1]
    assert "Warning: an encoder learns from how images differ, and all 9 that were looked at are the same." in printed
