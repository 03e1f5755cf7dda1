"""Completion: words and TAB are typed into each shell that is installed here."""

import os
import pty
import select
import shutil
import subprocess
import time

import pytest

# What is typed before the TAB, and the command that then stands there. In the folder are photos/ and images.parquet.
TYPED = {
    "pretr": "pretrain",
    "pretrain mae_c": "pretrain mae_cifar10",
    "pretrain mask_ra": "pretrain mask_ratio=",
    "pretrain mae.yaml objective.mask": "pretrain mae.yaml objective.mask_ratio=",
    "pretrain data.train=pho": "pretrain data.train=photos",
    "pretrain data.train=ima": "pretrain data.train=images.parquet",  # not the keys images= and image_size=
    "pretrain pho": "pretrain photos",
    "knn temp": "knn temperature=",
    "knn cluster sphe": "knn cluster sphe",  # a folder with the name of a command
    "bench sec": "bench seconds=",
    "completion z": "completion zsh",
}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_recipes_keys_and_files(shell, cli, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"this machine has no {shell}")
    (tmp_path / "script").write_text(cli("completion", shell)[1])
    (tmp_path / "images.parquet").touch()
    (tmp_path / "photos").mkdir()
    found = ask_fish(tmp_path) if shell == "fish" else type_in(shell, tmp_path)
    assert [line.removesuffix("/") for line in found] == list(TYPED.values())  # zsh takes the `/` away at Enter


def ask_fish(folder):
    """What fish offers for the last word of each line."""
    lines = ["source script", *(f"set found (complete -C 'sslvit {line}'); echo \"$found\"" for line in TYPED)]
    done = subprocess.run(["fish", "-c", "\n".join(lines)], cwd=folder, capture_output=True, text=True)
    assert done.stderr == ""
    words = [line.rpartition(" ") for line in TYPED]
    return [f"{a}{b}{offer or c}" for (a, b, c), offer in zip(words, done.stdout.splitlines(), strict=True)]


def type_in(shell, folder):
    """Type the lines in a terminal. The command writes what it was given into a file."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        own = {"HOME": str(folder), "ZDOTDIR": str(folder), "PATH": os.environ["PATH"], "TERM": "dumb"}
        os.execvpe(shell, [shell, *(["--norc", "--noprofile"] if shell == "bash" else ["-f"]), "-i"], own)
    try:
        enter(terminal, 'source ./script; sslvit() { echo "$*" >> given; }; sslvit ready', folder / "given", 1)
        for number, line in enumerate(TYPED, start=2):
            enter(terminal, f"sslvit {line}\t", folder / "given", number)
    finally:
        os.close(terminal)  # the shell ends
        os.waitpid(child, 0)
    return (folder / "given").read_text().splitlines()[1:]


def enter(terminal, line, given, count):
    """Press Enter after a line and wait until `given` has so many lines."""
    os.write(terminal, f"{line}\n".encode())
    screen, end = b"", time.monotonic() + 20
    while not given.exists() or given.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end, screen.decode(errors="replace")
        if select.select([terminal], [], [], 0.01)[0]:
            screen += os.read(terminal, 65536)


def test_another_shell_is_an_error_with_the_nearest_name(fails):
    assert "bash, zsh, fish: give one of them. Did you mean bash?" in fails("completion", "bsh")
