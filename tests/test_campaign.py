"""Fault campaign: runs killed at random instants and checkpoints damaged at random places.

A few of each in the ordinary suite, hundreds by `python -m pytest -m slow tests/test_campaign.py`. Every case hangs on
a seed and can be repeated.
"""

import random
import shutil
import time
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

from sslvit.checkpoints import state

from . import mounts, processes
from .checkpoints.test_state import saved, trained
from .conftest import words
from .processes import assert_same_run

VARIANTS = [("dino", True), ("mae", False), ("mae", True), ("dino", False)]  # (method, with k-NN during the run)
SPREAD = [("mae", True, 2, 1), ("dino", False, 1, 2), ("dino", True, 0, 2)]  # and loader processes, processes


@pytest.fixture(scope="module")
def whole(images, labelled, tmp_path_factory):
    """(method, with k-NN ...) -> (words, the run that nobody interrupts, seconds that it takes)."""

    @cache
    def run(method: str, knn: bool, workers: int = 0, world_size: int = 1) -> tuple[list, Path, float]:
        folder = tmp_path_factory.mktemp(f"{method}{knn}")
        # On several processes, a line over steps on both sides of a checkpoint is rounded in another order.
        lines = 2 if world_size == 1 else 3
        length = ["epochs=3", "save.every_steps=3", f"log.every_steps={lines}", f"workers={workers}", "keep_last=2"]
        sets = [f"eval.train={labelled / 'train'}", f"eval.test={labelled / 'test'}", "every_epochs=0.5", "eval.k=5"]
        arguments = ["pretrain", images, *words(method, *length, *(sets if knn else []))]
        began = time.monotonic()
        processes.launch([*arguments, f"out={folder / 'whole'}"], folder / "log", world_size)
        return arguments, folder / "whole", time.monotonic() - began

    processes.finish(processes.start(["help"], tmp_path_factory.mktemp("warm") / "log"), Path("/dev/null"))
    return run


def kill_once(process, out: Path, seconds: float, during_save: bool, generator: random.Random) -> str:
    """SIGKILL at a random instant of the run, or of a save; returns what the run was doing."""
    if during_save:
        until = time.monotonic() + 2 * seconds
        before = set((out / "checkpoints").glob(".writing_*"))  # left by a kill before
        for _ in range(generator.randrange(3)):  # not always the first save
            before |= wait_for_save(process, out, before, until)
        wait_for_save(process, out, before, until)
        time.sleep(generator.uniform(0, 0.01))
    else:
        process.join(generator.uniform(0, seconds))
    alive = process.is_alive()
    process.kill()
    process.join()
    if not alive:
        return "ended"
    return "saving" if any((out / "checkpoints").glob(".writing_*")) else "other"


def wait_for_save(process, out: Path, before: set[Path], until: float) -> set[Path]:
    while process.is_alive() and time.monotonic() < until:
        found = set((out / "checkpoints").glob(".writing_*")) - before
        if found:
            return found
        time.sleep(0.0005)
    return set()


def killed(case: int, variant: tuple, whole, tmp_path: Path) -> Counter:
    """One run of the campaign: killed once to three times, finished, compared; returns what the kills met."""
    generator = random.Random(case)
    arguments, expected, seconds = whole(*variant)
    out, met, world_size = tmp_path / f"run{case}", Counter(), variant[3] if len(variant) > 2 else 1
    for _ in range(generator.choice([1, 1, 2, 3])):
        started = processes.start_several([*arguments, f"out={out}"], tmp_path / "log", world_size)
        victim, *others = generator.sample(started, world_size)
        met[kill_once(victim, out, seconds, generator.random() < 0.4, generator)] += 1
        for other in others:  # a launcher kills it too, a moment later
            other.join(generator.choice([0, 0.2, 2]))
            other.kill()
            other.join()
    processes.launch([*arguments, f"out={out}"], tmp_path / "log", world_size)
    assert_same_run(expected, out)
    assert not list((out / "checkpoints").glob(".*")), "left behind by a kill"
    assert state.steps_saved(out) == state.steps_saved(expected)
    shutil.rmtree(out)
    return met


def test_runs_killed_at_any_instant_end_as_if_they_had_not_been(whole, tmp_path):
    for case in range(2):  # four kills
        killed(case, VARIANTS[case], whole, tmp_path)


@pytest.mark.slow  # eight minutes
def test_two_hundred_runs_killed_at_any_instant_end_as_if_they_had_not_been(whole, tmp_path):
    met, different = Counter(), {}
    for case in range(1000, 1220):
        try:
            met += killed(case, VARIANTS[case % 4], whole, tmp_path)
        except AssertionError as error:
            different[case] = str(error)[:300]
    print(f"{sum(met.values())} kills: {dict(met)}; {len(different)} of 220 runs differ")
    assert different == {}
    assert met["saving"] >= 40
    assert met["saving"] + met["other"] >= 150  # the rest had ended: a machine that others use is now fast, now slow


@pytest.mark.slow
def test_runs_with_loader_processes_and_on_two_processes_end_so_too(whole, tmp_path):
    met = sum((killed(case, SPREAD[case % 3], whole, tmp_path) for case in range(2000, 2036)), Counter())
    print(f"{met.total()} kills of 36 runs: {dict(met)}; no run differs")
    assert met["saving"] + met["other"] >= 30


def damage(path: Path, generator: random.Random) -> str:
    """Do to a file what disks, copies and people do; returns what."""
    content = bytearray(path.read_bytes())
    kind = generator.choice(["bits", "bits", "cut", "cut", "zeros", "longer", "gone"])
    place = generator.randrange(len(content))
    if kind == "bits":
        for _ in range(generator.choice([1, 1, 5])):
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "zeros":  # a block that never reached the disk
        block = bytes(min(512, len(content) - place))
        content[place : place + len(block)] = block
    elif kind == "longer":
        content += generator.randbytes(1 + place % 100)
    path.unlink() if kind == "gone" else path.write_bytes(content)
    return kind


def damaged(case: int, tmp_path: Path) -> str:
    """One damaged checkpoint: it must not be taken, and the one before stays as it was; returns the kind of damage."""
    generator = random.Random(case)
    run_dir = tmp_path / f"damaged{case}"
    run_dir.mkdir()
    saved(run_dir, 2, 3)
    good, bad = (state.folder_of(run_dir, step) for step in (2, 3))
    before = {path: path.read_bytes() for path in (*good.iterdir(), *bad.iterdir())}
    name = generator.choice([state.MODEL, state.OPTIMIZER, state.STATE, state.SUMS])
    kind = damage(bad / name, generator)
    module, optimizer = trained(0)
    expected = trained(2)[0].state_dict()
    changed = not (bad / name).exists() or (bad / name).read_bytes() != before[bad / name]
    run, _, complaints = state.restore(run_dir, module, optimizer)
    assert run.step == (2 if changed else 3), f"{kind} of {name} was accepted"
    assert len(complaints) == changed
    if changed:
        assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
    assert all(path.read_bytes() == before[path] for path in good.iterdir())
    state.prune(run_dir, keep_last=1, step=run.step)
    assert run.step in state.steps_saved(run_dir), "the older one is lost"
    shutil.rmtree(run_dir)
    return f"{kind} {name}" if changed else "unchanged"


def test_damaged_checkpoints_are_refused_and_the_older_one_is_taken(tmp_path):
    for case in range(10):
        damaged(case, tmp_path)


@pytest.mark.slow
def test_five_hundred_damaged_checkpoints_are_refused_and_the_older_one_is_taken(tmp_path):
    met = Counter(damaged(case, tmp_path) for case in range(1000, 1500))
    print(f"{met.total() - met['unchanged']} damaged checkpoints: {dict(sorted(met.items()))}")
    assert met.total() - met["unchanged"] >= 400
    assert len(met) == 20  # each kind in each file


@pytest.fixture(scope="module")
def can_mount(tmp_path_factory) -> int:
    """0: not here. 1: a tmpfs. 2: also ext4 on a loop device."""
    folder = tmp_path_factory.mktemp("mount")
    process = processes.begin(mounts.allowed, folder, output=folder.parent / "mount_log")
    process.join(60)
    return process.exitcode


@pytest.mark.slow
@pytest.mark.parametrize("size", ["64m", "1m"])
def test_a_small_dev_shm_changes_nothing(can_mount, images, tmp_path, size):
    """Four batches of 36 images of 448 x 448 pixels, which two loader processes have ready, are 87 MB."""
    if can_mount < 1:
        pytest.skip("this machine lets nobody mount a tmpfs")
    sizes = [
        "image_size=448",
        "model.args.patch_size=56",
        "global_batch_size=36",
        "epochs=6",
        "workers=2",
        "cache=false",
    ]
    arguments = ["pretrain", str(images), *words("mae", *sizes, "warmup_epochs=0")]
    processes.finish(processes.start([*arguments, f"out={tmp_path / 'whole'}"], tmp_path / "log"), tmp_path / "log")
    work = size, False, [*arguments, f"out={tmp_path / 'small'}"]
    process = processes.begin(mounts.with_little_shm, *work, output=tmp_path / "log")
    processes.finish(process, tmp_path / "log", seconds=300)
    assert_same_run(tmp_path / "whole", tmp_path / "small")


@pytest.mark.slow
def test_loader_processes_that_a_full_dev_shm_does_not_let_start_are_a_sentence(can_mount, images, tmp_path):
    if can_mount < 1:
        pytest.skip("this machine lets nobody mount a tmpfs")
    for workers, status in ((2, 2), (0, 0)):
        arguments = ["pretrain", str(images), *words("mae", f"workers={workers}", f"out={tmp_path / 'run'}")]
        log = tmp_path / f"log{workers}"
        process = processes.begin(mounts.with_little_shm, "1m", True, arguments, output=log)
        printed = processes.finish(process, log, status=status)
        assert "Traceback" not in printed
        sentence = "2 loader processes cannot be started (No space left on device): lower workers=, or set workers=0."
        assert (sentence in printed) == (status == 2)


@pytest.mark.slow  # two minutes
def test_runs_on_a_disk_whose_power_is_cut_go_on_from_a_whole_checkpoint(can_mount, whole, tmp_path):
    if can_mount < 2:
        pytest.skip("this machine lets nobody mount ext4 on a loop device")
    for case in range(20):
        arguments, expected, seconds = whole(*VARIANTS[case % 4])
        folder, log = tmp_path / f"cut{case}", tmp_path / f"log{case}"
        words_of_case = [str(word) for word in arguments]
        process = processes.begin(mounts.power_cut, case, folder, words_of_case, seconds, expected, output=log)
        processes.finish(process, log, seconds=300)
        print(log.read_text())
