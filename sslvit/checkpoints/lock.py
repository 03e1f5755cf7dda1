"""A lock of a folder: only one run at a time writes there, and only as long as it is the same folder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ..distributed import on_first_process
from ..errors import UserError
from .journal import STARTS
from .textfile import NOT_FOLLOWED

REPLACED = (
    " was deleted or moved while its run was training, or another run has taken its place. So the run ends here and "
    "writes nothing more. If it was moved, move it back or give its new place as out=, and start the same command "
    "again: the run continues from its newest checkpoint."
)


class Lock:
    """Locks <folder>/.lock until `close` or the end of the process."""

    def __init__(self, folder: Path, key: str = "out") -> None:
        """key: the configuration key that names the folder. Raises OSError, and UserError if it is locked."""
        self.folder, self.start, self._file = folder, b"", _lock(folder, key)

    def check(self) -> None:
        """Raises UserError if the folder was deleted, moved or replaced: its starts.jsonl must end with `start`, the
        line of this start. (Not by inode: on some file systems a folder gets another one.)"""
        try:
            there = (self.folder / STARTS).read_bytes().endswith(self.start)
        except OSError as error:  # of any other kind, the next write says what is wrong with the disk
            there = not isinstance(error, (FileNotFoundError, NotADirectoryError))
        if not there:
            raise UserError(f"{self.folder}{REPLACED}")

    def close(self) -> None:
        if self._file:
            self._file.close()


def _lock(folder: Path, key: str) -> IO[str] | None:
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | NOT_FOLLOWED, 0o666), "r+", encoding="utf-8")
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
    folder: Path, key: str, refuse: Callable[[], None] | None = None, prepare: Callable[[Lock], None] | None = None
) -> Lock | None:
    """Make a folder and lock it, on the first process, which gets the lock. Raises UserError on all processes.

    key: the configuration key that names the folder. refuse, prepare: called before and after the lock is taken.
    """
    held: list[Lock | None] = [None]

    def work() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if refuse:
                refuse()
            held[0] = lock = Lock(folder, key)
            if prepare:
                prepare(lock)
        except OSError as error:
            raise UserError(f"{key}={folder} cannot be written: {error.strerror}.") from error

    on_first_process(work, all_cores=False)
    return held[0]
