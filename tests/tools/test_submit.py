"""Jobs by submitit: refused before they are queued, or stopped, started again and ended as if nothing had happened."""

import dataclasses
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from submitit.core.submission import process_job
from submitit.helpers import DelayedSubmission
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from sslvit import config, stopping
from sslvit.arguments import flatten
from sslvit.checkpoints import state
from sslvit.stopping import Stopped
from sslvit.tools import submit

from .. import processes
from ..conftest import words
from ..processes import assert_same_run
from ..test_cli import MISTAKES

LOCAL = ["submit.cluster=local", "submit.gpus=0", "submit.cpus=1"]


@pytest.fixture
def queue(cli):
    """Submit to this machine: (what stands for the scheduler, the log of the first process)."""
    started = []

    def submit_local(*arguments) -> tuple[psutil.Process, Path]:
        status, printed, error = cli("submit", *arguments, *LOCAL)
        assert status == 0, error
        number, log = re.search(r"Job (\d+)", printed)[1], re.search(r"tail -F (.*)", printed)[1]
        started.append(psutil.Process(int(number)))
        return started[-1], Path(log)

    yield submit_local
    for process in started:
        for left in [process, *process.children()] if process.is_running() else ():
            left.kill()


def wait_for_step(run_dir: Path, step: int, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not any(line["step"] >= step for line in processes.lines(run_dir)):
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.002)


@pytest.mark.slow  # starts three processes
def test_a_job_that_must_make_room_saves_is_started_again_and_ends_as_if_it_had_not(queue, tmp_path, images):
    """SIGUSR2 to its process, as SLURM sends it before the time is over; the recipe is edited while the job waits."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 3\n")
    arguments = [recipe, images, *words("mae", "epochs=25", "workers=0")]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    reference = processes.start(["pretrain", *arguments, f"out={whole}"], tmp_path / "log")
    processes.wait_for_step(reference, whole, 1)
    scheduler, log = queue(*arguments, f"out={broken}")
    recipe.write_text("seed: 4\n")
    wait_for_step(broken, 4)
    (job,) = scheduler.children()
    job.send_signal(signal.SIGUSR2)
    assert scheduler.wait(300) == 0
    processes.finish(reference, tmp_path / "log")
    text = log.read_text()
    stopped = re.search(r"Stopped by SIGUSR2 after step (\d+), which is saved in .*\. The job is queued again", text)
    assert 4 <= int(stopped[1]) < 100
    assert f"Resuming {broken} at step {stopped[1]} of 100" in text
    assert text.count("Done:") == 1
    assert_same_run(whole, broken)
    starts = (broken / "starts.jsonl").read_text().splitlines()
    assert len(starts) == 2
    assert all(f"sslvit pretrain {broken / 'submit' / '1' / 'config.yaml'}" in start for start in starts)


def unreadable(folder: Path) -> Path:
    folder.mkdir()
    for i in range(37):
        (folder / f"{i}.png").write_bytes(b"no image")
    return folder


@pytest.mark.slow  # starts a process
def test_a_job_that_fails_is_not_started_again(queue, tmp_path):
    scheduler, log = queue(unreadable(tmp_path / "images"), *words("mae", f"out={tmp_path / 'run'}", "workers=0"))
    assert scheduler.wait(300) == 0
    text = log.read_text()
    assert text.count("Starting with") == 1
    assert re.search(r"sslvit pretrain: \d+ images in a row cannot be read", text)
    assert "Traceback" not in text


def test_a_mistake_that_shows_in_the_job_ends_it_with_a_sentence_and_a_status_that_starts_nothing(tmp_path):
    """What submitit calls in the job, with its signal handlers, in a process that has imported everything already."""
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "job"
    folder.mkdir()
    arguments = [str(unreadable(tmp_path / "images")), *words("mae", f"out={tmp_path / 'run'}", "workers=0")]
    config.save(config.load(arguments), recipe)
    DelayedSubmission(submit.Job(str(recipe), 1)).dump(folder / "1_submitted.pkl")
    environment = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1"}
    process = processes.begin(process_job, str(folder), output=tmp_path / "log", environment=environment)
    text = processes.finish(process, tmp_path / "log", status=2)
    assert LOCAL_REQUEUE_RETURN_CODE != 2
    assert re.search(r"sslvit pretrain: \d+ images in a row cannot be read", text)
    assert "Traceback" not in text


def stop_in_the_first_step(reason: str, folder: str) -> int:
    """A job whose run has nothing to save yet when it is asked to stop."""

    def pretrain(_):
        raise Stopped(f"Stopped by {reason} in the first step: there is nothing to save yet.", reason)

    submit.pretrain = pretrain
    process_job(folder)
    return 0


@pytest.mark.parametrize(
    ("reason", "status", "said"),
    [("SIGUSR2", LOCAL_REQUEUE_RETURN_CODE, "nothing to save yet. The job is queued again."),
     ("SIGTERM", stopping.EXIT_REQUEUE, "nothing to save yet. Submit it again to continue")],
)  # fmt: skip
def test_a_job_that_is_stopped_before_anything_is_saved_is_queued_again_too(tmp_path, reason, status, said):
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "job"
    folder.mkdir()
    recipe.write_text("seed: 3\n")
    job = DelayedSubmission(submit.Job(str(recipe), 1))
    job.set_timeout(60, max_num_timeout=3)
    job.dump(folder / "1_submitted.pkl")
    environment = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1"}
    process = processes.begin(
        stop_in_the_first_step, reason, str(folder), output=tmp_path / "log", environment=environment
    )
    text = processes.finish(process, tmp_path / "log", status=status)
    assert said in text
    assert "Traceback" not in text


@pytest.mark.slow  # starts five processes
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_several_processes_go_on_after_a_warning_and_end_for_good_after_sigterm(queue, tmp_path, images, number):
    out = tmp_path / "run"
    arguments = [images, *words("mae", f"out={out}", "steps=300", "workers=0")]
    scheduler, log = queue(*arguments, "processes=2")
    wait_for_step(out, 4)
    both = scheduler.children()
    assert len(both) == 2
    both[1].send_signal(number)
    if number == signal.SIGTERM:
        both[0].send_signal(number)
    assert scheduler.wait(300) == 0
    text = log.read_text()
    again = number != signal.SIGTERM
    assert text.count("Starting with") == (2 if again else 1)
    assert text.count("Done:") == (1 if again else 0)
    assert f"Stopped by {number.name} after step" in text
    assert (state.steps_saved(out)[-1] == 300) == again


@pytest.mark.slow  # and only where there is a cluster
@pytest.mark.skipif(shutil.which("sbatch") is None, reason="this machine has no SLURM")
def test_on_a_cluster_a_job_is_queued_again_and_a_cancelled_one_is_not(cli, tmp_path, images):
    """Of a cluster whose machines see the temporary folder; SLURM sets a job that goes again aside for two minutes."""
    import subprocess

    out = tmp_path / "run"
    more = ["submit.gpus=0", "submit.processes=2", "submit.cpus=1", "submit.hours=0.2", "submit.warn_minutes=5"]
    arguments = [images, *words("mae", f"out={out}", "steps=20000", "workers=0", "save.every_minutes=60"), *more]
    status, printed, error = cli("submit", *arguments)
    assert status == 0, error
    job, log = re.search(r"Job (\d+)", printed)[1], Path(re.search(r"tail -F (.*)", printed)[1])
    wait_for_step(out, 20)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    deadline = time.monotonic() + 400
    while "Resuming" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(1)
    step = state.steps_saved(out)[-1]
    wait_for_step(out, step + 20)
    subprocess.run(["scancel", job], check=True)
    while subprocess.run(["squeue", "-h", "-j", job], capture_output=True, check=False).stdout:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert "Stopped by SIGTERM after step" in log.read_text()
    assert state.steps_saved(out)[-1] > step


@pytest.mark.parametrize(("more", "expected"), MISTAKES)
def test_a_mistake_is_refused_before_anything_is_queued(fails, images, tmp_path, more, expected):
    """The sentences of pretrain."""
    out = tmp_path / "run"
    assert expected in fails("submit", images, *words("mae", f"out={out}", *more), *LOCAL)
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["submit.processes=3"], "global_batch_size=8 must be a multiple of the number of processes, 3"),
        (["submit.gpu=8"], "There is no key submit.gpu. Did you mean gpus? `sslvit submit --help`"),
        (["gpus=2", "processes=4"], "submit.processes=4 is for submit.gpus=0"),
        (["submit.hours=0"], "submit.hours=0.0 must be above 0"),
        (["submit.hours=0.05"], "submit.warn_minutes=5 is not less than submit.hours=0.05"),
        (["nodes=2"], "submit.cluster=local has one machine"),
        (["sbatch=qos=high"], "submit.sbatch: qos=high is not of the form"),
        (["batch_size=auto"], "batch_size=auto tries sizes on a GPU, and submit.gpus=0"),
        (["check_images=false", "processes=3"], "must be a multiple of the number of processes, 3"),
        (["check_images=false", "model.name=vit_tiny_patch16_244"], "Did you mean vit_tiny_patch16_224"),
    ],
)
def test_a_job_that_cannot_be_is_refused(fails, images, tmp_path, more, expected):
    out = tmp_path / "run"
    assert expected in fails("submit", images, *words("mae", f"out={out}"), *LOCAL, *more)
    assert not out.exists()


def test_a_finished_run_is_not_queued_and_other_settings_neither(fails, colour_run, labelled):
    arguments = [labelled / "train", *words("mae", f"out={colour_run}"), *LOCAL]
    assert "has done all of its 8 steps" in fails("submit", *arguments)
    assert "holds a run with other settings: seed was 0 and is 5" in fails("submit", *arguments, "seed=5")
    assert not (colour_run / "submit").exists()


def test_images_that_only_the_cluster_sees_are_not_looked_for(fails, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", fake_slurm(tmp_path, refuse=True))
    arguments = ["data.train=/scratch/images", *words("mae", f"out={tmp_path / 'run'}"), "submit.gpus=0"]
    assert "/scratch/images does not exist" in fails("submit", *arguments)
    assert "SLURM refused the job" in fails("submit", *arguments, "check_images=false")


def test_without_slurm_or_submitit_a_sentence_says_what_is_missing(fails, images, tmp_path, monkeypatch):
    arguments = [images, *words("mae", f"out={tmp_path / 'run'}")]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs sbatch and srun" in fails("submit", *arguments)
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "sslvit submit needs submitit: pip install 'sslvit[slurm]'" in fails("submit", *arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "call it without accelerate launch" in fails("submit", *arguments)


def fake_slurm(folder: Path, refuse: bool = False) -> str:
    """The PATH to an sbatch that takes or refuses a job and starts nothing."""
    said = "echo 'Submitted batch job 4711'"
    if refuse:
        said = "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1"
    for name in ("sbatch", "srun"):
        (folder / name).write_text(f"#!/bin/sh\n{said}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_the_file_of_a_slurm_job_asks_for_what_was_given(cli, fails, images, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", fake_slurm(tmp_path))
    out = tmp_path / "run"
    more = ["nodes=2", "submit.gpus=4", "hours=1.5", "partition=long", "memory=64", "warn_minutes=10"]
    more += ["submit.sbatch=--qos=high --exclusive --gpus-per-node=a100:4", "setup=module load cuda"]
    status, printed, _ = cli("submit", images, *words("mae", f"out={out}"), *more)
    assert status == 0
    assert "Job 4711: 2 machines with 4 GPUs, 1.5 hours a start" in printed
    text = (out / "submit" / "1" / "4711_submission.sh").read_text()
    asked = set(re.findall(r"#SBATCH --(.*)", text))
    assert asked >= {
        "nodes=2", "ntasks-per-node=4", "gpus-per-node=a100:4", "cpus-per-task=8", "time=90", "partition=long",
        "mem=65536M", "qos=high", "exclusive", "requeue", "signal=USR2@600", "open-mode=append", "job-name=run",
    }  # fmt: skip
    assert sum(word.startswith("gpus-per-node") for word in asked) == 1
    assert text.index("module load cuda") < text.index("\nsrun")
    assert "--cpus-per-task=8 --cpu-bind=none --kill-on-bad-exit=1" in text
    stored = config.load([str(out / "submit" / "1" / "config.yaml")])
    assert stored == config.load([str(images), *words("mae", f"out={out}")])
    assert cli("submit", images, *words("mae", f"out={out}"), "submit.gpus=4", "sbatch=--gres=gpu:4")[0] == 0
    text = (out / "submit" / "2" / "4711_submission.sh").read_text()
    assert "--gres=gpu:4" in text
    assert "--gpus-per-node" not in text
    monkeypatch.setenv("PATH", fake_slurm(tmp_path, refuse=True))
    message = fails("submit", images, *words("mae", f"out={out}"), "partition=gpu")
    assert "SLURM refused the job: invalid partition specified: gpu." in message
    assert {folder.name for folder in (out / "submit").iterdir()} == {"1", "2"}


def test_no_key_of_a_job_is_one_of_a_run_too():
    """So that each may be given by its last name alone."""
    from omegaconf import OmegaConf

    run = {key.rsplit(".", 1)[-1] for key in flatten(OmegaConf.structured(config.load(["method=dino"])))}
    run |= {key.rsplit(".", 1)[-1] for key in flatten(OmegaConf.structured(config.load(["method=mae"])))}
    run -= {"hours"}  # of a run that has to end in time, which no job is: `submit` refuses minutes= and hours= of a run
    assert run.isdisjoint(item.name for item in dataclasses.fields(submit.Config))
