"""Writing text files: whole or not there, and never through a link that somebody else has put into a folder."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

NOT_FOLLOWED = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # nor does a pipe wait for its reader


def write(path: Path, content: str | bytes | Callable[[IO[bytes]], object], root: Path | None = None) -> None:
    """Write a file beside its name, sync it and rename it: so it is whole or not there, even after a power cut.

    A link of this name is replaced, not followed. content: a function gets the open file, to write what is large.
    root: a folder that the user named and that exists. Folders between it and the file are made, and may be no links.
    Default: the folder of the file. Raises OSError, whose strerror is a sentence for the user.
    """
    make_folder(path.parent, root or path.parent)
    fresh = path.with_name(f".{path.name[:200]}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOT_FOLLOWED, 0o666), "wb") as file:
            content(file) if callable(content) else file.write(
                content.encode() if isinstance(content, str) else content
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_folder(folder: Path, root: Path) -> None:
    """Make the folders from `root`, which exists, down to `folder`. Raises OSError, also if one of them is a link or a
    file."""
    if folder != root:
        make_folder(folder.parent, root)
        if folder.is_symlink():
            raise OSError(errno.ELOOP, f"{folder} is a link, and links are not followed", str(folder))
        if folder.exists() and not folder.is_dir():
            raise OSError(errno.ENOTDIR, f"{folder} is no folder", str(folder))
        folder.mkdir(exist_ok=True)


def open_to_append(path: Path) -> IO[str]:
    """A file that grows by lines. Raises OSError, also if it is a link, a pipe or a device."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{path} is a link, and links are not followed", str(path))
    file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NOT_FOLLOWED, 0o666), "a", encoding="utf-8")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, f"{path} is no regular file", str(path))
    return file


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
