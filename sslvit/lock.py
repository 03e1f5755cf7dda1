"""One process at a time in a folder, and one run of several processes."""

from collections.abc import Callable
from pathlib import Path
from typing import IO

from .distributed import on_first_process
from .errors import UserError


def hold(folder: Path, key: str = "out") -> IO[str] | None:
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


def open_held(
    folder: Path, key: str, refuse: Callable[[], None] | None = None, prepare: Callable[[], None] | None = None
) -> IO[str] | None:
    """Make a folder to write into and go on in, and hold it, on the first process: what `hold` gives; None on others.

    key: of the configuration, that names the folder. refuse, prepare: what is done before and after it is held. Raises
    UserError on all processes.
    """
    held: list[IO[str] | None] = [None]

    def work() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if refuse:
                refuse()
            held[0] = hold(folder, key)
            if prepare:
                prepare()
        except OSError as error:
            raise UserError(f"{key}={folder} cannot be written: {error.strerror}.") from error

    on_first_process(work, all_cores=False)
    return held[0]
