"""Runs that are asked to stop: they save, say so, and go on as if they had not stopped."""

import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from sslvit import distributed, pretraining, stopping
from sslvit.__main__ import main
from sslvit.checkpoints import state
from sslvit.data.workers import _take, compute
from sslvit.errors import UserError
from sslvit.evaluation import features

from . import processes
from .conftest import words
from .processes import assert_same_run


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 0)])
def test_a_signal_saves_after_the_step_and_the_run_goes_on(tmp_path, images, number, workers):
    """Sent to every process of the run, loader processes too, as a scheduler does."""
    arguments = ["pretrain", images, *words("mae", f"workers={workers}", "epochs=20", "save.every_minutes=60")]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    processes.finish(processes.start([*arguments, f"out={whole}"], tmp_path / "log"), tmp_path / "log")
    process = processes.start([*arguments, f"out={broken}"], tmp_path / "log2")
    processes.wait_for_step(process, broken, 4)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(number)
    os.kill(process.pid, number)
    printed = processes.finish(process, tmp_path / "log2", status=75)
    step = state.steps_saved(broken)[-1]
    assert 4 <= step < 80
    assert f"Stopped by {number.name} after step {step}, which is saved in {broken}" in printed
    assert "Traceback" not in printed
    processes.finish(processes.start([*arguments, f"out={broken}"], tmp_path / "log3"), tmp_path / "log3")
    assert_same_run(whole, broken)


def test_a_run_that_is_interrupted_within_a_step_saves_the_last_whole_one(tmp_path, images):
    """Ctrl-C, while a step of four micro-batches runs: it is left, and taken again by the run that goes on."""
    arguments = ["pretrain", images, *words("dino", "batch_size=2", "workers=0", "epochs=4", "every_minutes=60")]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    processes.finish(processes.start([*arguments, f"out={whole}"], tmp_path / "log"), tmp_path / "log")
    process = processes.start([*arguments, f"out={broken}"], tmp_path / "log2")
    processes.wait_for_step(process, broken, 4)
    os.kill(process.pid, signal.SIGINT)
    printed = processes.finish(process, tmp_path / "log2", status=75)
    step = state.steps_saved(broken)[-1]
    assert "Ctrl-C: saving as soon as this micro-batch is done. Ctrl-C again leaves at once." in printed
    assert f"Stopped by Ctrl-C after step {step}, which is saved in {broken}. Start the same command" in printed
    assert 4 <= step < 16
    processes.finish(processes.start([*arguments, f"out={broken}"], tmp_path / "log3"), tmp_path / "log3")
    assert_same_run(whole, broken)


@pytest.mark.parametrize("calls", [5, 6, 7, 8])
def test_a_step_is_left_between_any_two_micro_batches(cli, images, tmp_path, monkeypatch, calls):
    """Three calls a step between its four micro-batches and one after it: the second step is left, or whole."""
    asked = stopping.StopRequest.reason_at

    def reason_at(self, step):
        self.calls = getattr(self, "calls", 0) + 1
        self.reason = "SIGTERM" if self.calls >= calls else None
        return asked(self, step)

    arguments = ["pretrain", images, *words("mae", "batch_size=2", "workers=0", f"out={tmp_path / 'run'}")]
    with monkeypatch.context() as patch:
        patch.setattr(stopping.StopRequest, "reason_at", reason_at)
        status, printed, _ = cli(*arguments)
    assert status == 75
    assert f"Stopped by SIGTERM after step {1 if calls < 8 else 2}, which is saved" in printed
    assert cli(*arguments)[0] == 0
    assert cli("pretrain", images, *words("mae", "batch_size=2", "workers=0", f"out={tmp_path / 'whole'}"))[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_run_that_was_never_saved_is_saved_after_five_minutes(cli, images, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "FIRST_SAVE", 0.0)
    saved = []
    monkeypatch.setattr(pretraining.Saver, "save", lambda self, model, optimizer, run, extra: saved.append(run.step))
    assert cli("pretrain", images, *words("mae", "workers=0", f"out={tmp_path / 'run'}", "every_minutes=null"))[0] == 0
    assert saved == [1, 8]  # the first, and the last as ever


def hang_in_c(ready: str) -> int:
    """A run with a loader process, whose main thread waits in C for ever, as for a process that never answers."""
    stopping.FORWARDED = 0.5
    with stopping.stop_requests(None):
        results = compute(os.getpid, range(3), 1)
        os.mkdir(ready)
        lock = ctypes.create_string_buffer(256)
        for _ in range(2):  # it is its own owner
            ctypes.CDLL(None).pthread_mutex_lock(lock)
        next(results)
    return 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_run_whatever_it_waits_for(tmp_path, number):
    process = processes.begin(hang_in_c, str(tmp_path / "ready"), output=tmp_path / "log")
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (child,) = psutil.Process(process.pid).children()
    for pause in (0.1, 2, 0):  # the second one comes too soon to be another request
        os.kill(process.pid, number)
        time.sleep(pause)
    printed = processes.finish(process, tmp_path / "log", seconds=30, status=128 + number)
    assert printed == f"Ended at once by a second signal, {number.name}. The last checkpoint is whole.\n"
    assert not psutil.wait_procs([child], timeout=5)[1]


def test_a_loader_process_that_is_killed_ends_the_run_with_a_sentence(tmp_path, images):
    out, log = tmp_path / "run", tmp_path / "log"
    process = processes.start(["pretrain", images, *words("mae", f"out={out}", "epochs=2000", "workers=2")], log)
    processes.wait_for_step(process, out, 2)
    loaders = psutil.Process(process.pid).children()
    assert len(loaders) == 2
    loaders[0].kill()
    printed = processes.finish(process, log, seconds=30, status=2)
    assert "sslvit pretrain: A loader process was killed (SIGKILL), as the system does when memory runs out" in printed
    assert "Traceback" not in printed
    assert not psutil.wait_procs(loaders, timeout=5)[1]


@pytest.mark.parametrize("kind", [ConnectionResetError, EOFError, FileNotFoundError])
def test_a_loader_process_that_is_killed_while_it_hands_a_result_over_is_named_too(kind):
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()

    class Running:  # as torch's iterator
        _workers = (process,)

        def __next__(self):
            process.kill()
            raise kind

    with pytest.raises(UserError, match=r"A loader process was killed \(SIGKILL\)"):
        next(_take(Running(), 1.0))


@pytest.mark.slow  # waits ten seconds
def test_a_run_whose_loader_process_hangs_stops_when_it_is_asked_to(tmp_path, images):
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = ["pretrain", images, *words("mae", f"out={out}", "epochs=2000", "workers=1", "save.every_steps=2")]
    process = processes.start(arguments, log)
    processes.wait_for_step(process, out, 5)
    (loader,) = psutil.Process(process.pid).children()
    loader.suspend()
    time.sleep(1)
    os.kill(process.pid, signal.SIGTERM)
    printed = processes.finish(process, log, seconds=30, status=75)
    assert "Stopped by SIGTERM while no images came for" in printed
    assert "Traceback" not in printed
    assert not psutil.wait_procs([loader], timeout=5)[1]


@pytest.mark.slow  # eight seconds of writing, on purpose
def test_no_process_ends_before_the_save_is_written_and_a_second_signal_does_not_break_it(tmp_path, images):
    """Under torchrun, which ends all processes when one has ended, with a slow disk and SIGTERM to everything twice."""
    slow = (
        "import sys, time; from sslvit.checkpoints import state; from sslvit.__main__ import main; old = state.write; "
        "state.write = lambda *a: (time.sleep(8), old(*a))[1]; sys.exit(main(sys.argv[1:]))"
    )
    (tmp_path / "slow.py").write_text(slow)
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "slow.py")]
    command += ["pretrain", str(images), *words("mae", f"out={out}", "epochs=2000", "save.every_minutes=60")]
    launcher = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not any(line["step"] >= 4 for line in processes.lines(out)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(2):
        for child in psutil.Process(launcher.pid).children(recursive=True):
            child.send_signal(signal.SIGTERM)
        time.sleep(3)
    launcher.wait(timeout=120)
    assert state.steps_saved(out)
    assert not any(path.suffix == ".part" for path in (out / "checkpoints").iterdir())


def test_an_evaluation_that_a_stop_prevents_is_made_up_for(cli, labelled, tmp_path):
    arguments = ["pretrain", labelled / "train", *words("mae", f"out={tmp_path / 'run'}", "steps=8", "k=5"),
                 f"eval.train={labelled / 'train'}", f"eval.test={labelled / 'test'}", "every_epochs=0.25"]  # fmt: skip
    assert cli(*arguments, "max_hours=0")[0] == 75
    assert cli(*arguments)[0] == 0
    measured = [line["step"] for line in processes.lines(tmp_path / "run") if "knn/top1" in line]
    assert measured == list(range(9))


def test_two_processes_stop_at_the_same_step_when_the_time_is_over(tmp_path, images):
    out, log = tmp_path / "run", tmp_path / "log"
    printed = processes.launch(
        ["pretrain", images, *words("mae", f"out={out}", "epochs=60", "max_hours=0")], log, 2, status=75
    )
    assert printed.count("Stopped by max_hours after step 10,") == 1
    assert state.steps_saved(out) == [10]


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_process_ends_the_others_with_a_message(tmp_path, images, victim):
    out, log = tmp_path / "run", tmp_path / "log"
    # Without loader processes: that of the killed one may print what it thinks of its parent's death.
    arguments = ["pretrain", images, *words("mae", f"out={out}", "epochs=2000", "save.every_steps=2", "workers=0")]
    both = processes.start_several(arguments, log, 2)
    processes.wait_for_step(both[victim], out, 5)
    both[victim].kill()
    printed = processes.finish(both[1 - victim], log, seconds=30, status=2)
    assert f"Another of the 2 processes has ended, so process {1 - victim} ends too" in printed
    assert "Traceback" not in printed
    state.latest(out, state.MODEL, state.OPTIMIZER)


@pytest.mark.slow  # waits six seconds
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_stopped_is_named_and_the_others_end(tmp_path, images, victim):
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = ["pretrain", images, *words("mae", f"out={out}", "epochs=2000", "save.every_steps=2", "workers=1")]
    several = [{**one, "SSLVIT_SILENT_SECONDS": "6"} for one in processes.environments(3)]
    all_three = [processes.start([*arguments, "global_batch_size=9"], log, one) for one in several]
    processes.wait_for_step(all_three[victim], out, 5)
    os.kill(all_three[victim].pid, signal.SIGSTOP)
    others = [process for process in all_three if process is not all_three[victim]]
    loaders = [child for process in others for child in psutil.Process(process.pid).children()]
    printed = [processes.finish(process, log, seconds=30, status=2) for process in others][-1]
    all_three[victim].kill()
    assert f"Process {victim} of 3 has not answered for 6 s: it is stopped, or its machine hangs" in printed
    assert "Traceback" not in printed
    assert not psutil.wait_procs(loaders, timeout=5)[1]
    state.latest(out, state.MODEL, state.OPTIMIZER)


def watch(own: int) -> int:
    """The first process or the second, whose peer is alive and says nothing any more."""
    distributed.BEAT = 0.05
    ours, theirs = socket.socketpair()
    theirs.sendall(b".")
    distributed._watch({1 - own: ours}, 0.3, own, 2)
    theirs.close()
    return 0


@pytest.mark.parametrize("own", [0, 1])
def test_a_silent_process_is_named(tmp_path, own):
    process = processes.begin(watch, own, output=tmp_path / "log")
    printed = processes.finish(process, tmp_path / "log", seconds=30, status=2)
    assert printed.startswith(f"Process {1 - own} of 2 has not answered for 0 s: it is stopped, or its machine hangs.")
    assert "SSLVIT_SILENT_SECONDS= waits longer" in printed


def test_the_first_process_goes_on_alone_when_others_have_ended(monkeypatch):
    monkeypatch.setattr(distributed, "BEAT", 0.05)
    ours, theirs = socket.socketpair()
    theirs.close()
    distributed._watch({1: ours}, 0.3, 0, 2)  # or it would have ended this process


def test_a_wait_for_a_process_that_does_not_come_is_another_sentence_than_one_that_has_ended():
    late = distributed.explain_lost_process(RuntimeError("[gloo] Timed out waiting 1800000ms for recv operation"))
    lost = distributed.explain_lost_process(RuntimeError("[gloo] Connection closed by peer"))
    assert late is not None
    assert "has waited too long for another one, which lives but does not come" in late
    assert "SSLVIT_WAIT_SECONDS= waits longer than 1800" in late
    assert lost is not None
    assert "has ended" in lost
    assert distributed.explain_lost_process(RuntimeError("something else")) is None


def evaluate_and_die(arguments: list[str]) -> int:
    """`sslvit`, whose second process is killed when it should compute features."""
    if os.environ["RANK"] == "1":
        features.share = lambda source: os.kill(os.getpid(), signal.SIGKILL)
    return main(arguments)


def test_the_death_of_one_process_ends_an_evaluation_with_a_message(tmp_path, colour_run, labelled):
    log, sets = tmp_path / "log", [f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"]
    arguments = ["knn", f"run={colour_run}", *sets, "cache=false", "workers=0", f"out={tmp_path / 'knn.json'}"]
    both = [
        processes.begin(evaluate_and_die, arguments, output=log, environment=one) for one in processes.environments(2)
    ]
    printed = processes.finish(both[0], log, seconds=60, status=2)
    assert "sslvit knn: Another of the 2 processes has ended, so process 0 ends too" in printed
    assert "Traceback" not in printed


@pytest.mark.slow  # starts a launcher
def test_torchrun_ends_when_one_of_its_processes_is_killed(tmp_path, images):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "sslvit", "pretrain"]
    command += [str(images), *words("mae", f"out={out}", "epochs=20000", "save.every_steps=5")]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        )
    deadline = time.monotonic() + 120
    while not any(line["step"] >= 12 for line in processes.lines(out)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ours = [child for child in psutil.Process(launcher.pid).children() if "sslvit" in child.cmdline()]
    assert len(ours) == 2
    ours[1].kill()
    assert launcher.wait(timeout=60) == 1
    printed = (tmp_path / "log").read_text()
    assert "Another of the 2 processes has ended" in printed or "Signal 9 (SIGKILL)" in printed
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in ours)
    state.latest(out, state.MODEL, state.OPTIMIZER)
