"""One process at a time in a folder, and one run of several processes."""

from collections.abc import Callable
from pathlib import Path
from typing import IO

from ..distributed import on_first_process
from ..errors import UserError


def acquire(folder: Path, key: str = "out") -> IO[str] | None:
    """Hold <folder>/.lock until what is returned is closed or the process ends, however it ends. Raises UserError if
    another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = (folder / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: loader processes would inherit that
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise UserError(
            f"Another process is training in {folder}: wait for it, stop it, or give another {key}=."
        ) from error
    except OSError:  # a file system without locks
        return file
    return file


def create_and_acquire(
    folder: Path, key: str, refuse: Callable[[], None] | None = None, prepare: Callable[[], None] | None = None
) -> IO[str] | None:
    """Make a folder and take its lock on the first process: what `acquire` returns; None on the other processes.

    key: the configuration key that names the folder. refuse, prepare: called before and after the lock is taken.
    Raises UserError on all processes.
    """
    held: list[IO[str] | None] = [None]

    def work() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if refuse:
                refuse()
            held[0] = acquire(folder, key)
            if prepare:
                prepare()
        except OSError as error:
            raise UserError(f"{key}={folder} cannot be written: {error.strerror}.") from error

    on_first_process(work, all_cores=False)
    return held[0]
