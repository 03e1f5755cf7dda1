"""A lock of a folder: only one run at a time writes there."""

from collections.abc import Callable
from pathlib import Path
from typing import IO

from ..distributed import on_first_process
from ..errors import UserError


def acquire(folder: Path, key: str = "out") -> IO[str] | None:
    """Lock <folder>/.lock until the returned file is closed or the process ends. Raises UserError if it is locked."""
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
            f"Another process is training in {folder}: wait until it ends, stop it, or give another {key}=."
        ) from error
    except OSError:  # a file system without locks
        return file
    return file


def create_and_acquire(
    folder: Path, key: str, refuse: Callable[[], None] | None = None, prepare: Callable[[], None] | None = None
) -> IO[str] | None:
    """Make a folder and lock it, on the first process, which gets the lock. Raises UserError on all processes.

    key: the configuration key that names the folder. refuse, prepare: called before and after the lock is taken.
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
