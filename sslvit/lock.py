"""One process at a time in a folder."""

from pathlib import Path
from typing import IO

from .errors import UserError


def hold(folder: Path) -> IO[str] | None:
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
            f"Another process is training in {folder}: wait for it, stop it, or give another out=."
        ) from error
    except OSError:  # a file system without locks
        return file
    return file
