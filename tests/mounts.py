"""Runs in a mount namespace of their own: with a small /dev/shm, or on a disk whose power is cut.

The functions run in a process of `processes.begin`, as root. The mounts end with that process.
"""

import ctypes
import fcntl
import json
import os
import random
import subprocess
import time
from pathlib import Path

import yaml

from sslvit.__main__ import main
from sslvit.checkpoints import state

from .processes import assert_same_run, lines

CLONE_NEWNS = 0x20000
EXT4_IOC_SHUTDOWN, NOLOGFLUSH = 0x8004587D, 2  # _IOR('X', 125, __u32): nothing that is not on the disk yet gets there


def own_namespace() -> None:
    """Mounts of this process are seen by nobody else. Raises OSError where that is not allowed."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    mount("--make-rprivate", "/")


def mount(*words: object) -> None:
    """Raises OSError where that is not allowed."""
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.returncode, done.stderr)


def allowed(folder: Path) -> int:
    """How many of these this machine lets us mount: a tmpfs, and ext4 on a loop device. It is the exit status."""
    works = 0
    try:
        own_namespace()
        mount("-t", "tmpfs", "tmpfs", folder)
        works = 1
        make_disk(folder / "disk", folder)
        works = 2
    except OSError as error:
        print(error)
    return works


def make_disk(file: Path, folder: Path) -> None:
    """An empty ext4 file system in a file, mounted on a folder."""
    with file.open("wb") as disk:
        disk.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", file], check=True)
    mount("-o", "loop", file, folder)


def with_little_shm(size: str, full: bool, argv: list[str]) -> int:
    """`sslvit <argv>` with a /dev/shm of so many bytes, of which nothing is left if it is full."""
    own_namespace()
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm")
    if full:
        subprocess.run(["dd", "if=/dev/zero", "of=/dev/shm/full", "bs=1M"], check=False, capture_output=True)
        assert os.statvfs("/dev/shm").f_bavail == 0
    return main(argv)


def power_cut(case: int, folder: Path, arguments: list[str], seconds: float, expected: Path) -> None:
    """One run on a disk whose power is cut once or twice, at random instants. Mounted again, it goes on as if not."""
    own_namespace()
    generator, place = random.Random(case), folder / "mounted"
    place.mkdir(parents=True)
    make_disk(folder / "disk", place)
    out, kept = place / "run", []
    for _ in range(generator.choice([1, 2])):
        pid = start([*arguments, f"out={out}"], folder / "log")
        time.sleep(generator.uniform(0.1, seconds))
        before = state.steps_saved(out)
        descriptor = os.open(place, os.O_RDONLY)
        fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, NOLOGFLUSH.to_bytes(4, "little"))
        os.close(descriptor)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == 2 or lines(expected)[-1]["step"] in before, f"exit status {status} after the cut"
        subprocess.run(["umount", place], check=True)
        mount("-o", "loop", folder / "disk", place)
        for step in before[-1:]:  # a checkpoint that had its name was on the disk
            state.read(state.folder_of(out, step), state.MODEL, state.OPTIMIZER)
        if (out / "config.yaml").exists():
            assert yaml.safe_load((out / "config.yaml").read_text())["method"], "config.yaml is empty"
            starts = (out / "starts.jsonl").read_text().splitlines()
            assert starts, "starts.jsonl is empty"
            assert all(json.loads(line)["command"] for line in starts)
        kept.append(before[-1] if before else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(start([*arguments, f"out={out}"], folder / "log"), 0)[1]) == 0
    assert_same_run(expected, out)
    print(f"cut after the checkpoints of steps {kept}")


def start(argv: list[str], log: Path) -> int:
    """Begin `sslvit <argv>` in a process of its own, and return its number."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), 1)
            os.dup2(1, 2)
            status = main([str(word) for word in argv])
        finally:
            os._exit(status)
    return pid
