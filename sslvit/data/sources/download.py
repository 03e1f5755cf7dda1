"""http:// and https://: a file is fetched once into data.download_dir and then opened as any local one."""

import contextlib
import hashlib
import os
import queue
import re
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO

from ... import __version__
from ...distributed import say
from ...errors import UserError
from ..config import Config
from . import ENDINGS, PACKED
from .files import unfinished
from .limits import limit, size_text
from .several import open_paths
from .source import Source
from .syntax import expanded

SAY_EVERY = 10.0  # seconds
TIMEOUT = 60.0  # seconds without a byte, and until a server begins to answer
SLOWEST, SLOW_SECONDS = 1024, 60.0  # bytes a second, of the last so many seconds; a slower download is given up
MAX_GIB = limit("SSLVIT_MAX_DOWNLOAD_GIB", 256)  # of one file
MAX_HOURS = limit("SSLVIT_MAX_DOWNLOAD_HOURS", 24)  # for one file
RESERVE = 2**30  # bytes of the disk that a download leaves free
MAX_NAME = 100  # characters of a local name
BY_HAND = "Fetch it with another program and give the file's path"


def open_url(spec: str, config: Config) -> Source:
    """`https://host/images.zip`, `https://host/shards/{000..012}.tar`. Braces are the only pattern, because a server
    does not list its files."""
    folder = Path(config.download_dir).expanduser() / "urls"
    urls = expanded(spec)
    try:
        endings = [os.path.splitext(_file_name(url))[1].lower() for url in urls]
    except ValueError as error:
        raise UserError(f"data: {spec} is no address: {error}.") from error
    for url, ending in zip(urls, endings, strict=True):
        if ending not in ENDINGS or ending in PACKED:
            raise UserError(f"data: {url} must end in .tar, .zip, .parquet, .npy, .h5 or .tif to be read in place.")
    return open_paths([str(fetch(url, folder, f"{i + 1} of {len(urls)}")) for i, url in enumerate(urls)], config)


def fetch(url: str, folder: Path, which: str) -> Path:
    """The path of the local copy. It is fetched once: remove the copy to fetch it again. Raises UserError."""
    path = folder / hashlib.sha256(url.encode()).hexdigest()[:16] / _file_name(url)
    if path.exists():
        return path
    part = unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file, contextlib.closing(_received(url)) as blocks:
            length = next(blocks)
            say(f"fetching {url} ({which}, {size_text(length) if length else 'size unknown'}) into {folder}")
            done = _copy(blocks, file, length, url, folder)
        if length and done != length:
            raise UserError(
                f"data: {url} broke off after {size_text(done)} of {size_text(length)}: start the command again."
            )
        os.replace(part, path)
    except UserError:
        raise
    except urllib.error.HTTPError as error:
        answer = " ".join(f"{error.code} {error.reason}".split())
        raise UserError(f"data: {url} cannot be fetched: the server answers {answer}.") from error
    except (OSError, ValueError, HTTPException) as error:  # URLError and time-outs are OSErrors
        reason = getattr(error, "reason", None) or error
        raise UserError(f"data: {url} cannot be fetched: {reason}.") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _received(url: str) -> Generator[Any, None, None]:
    """The number of bytes that the server announces (0: it does not), then blocks of bytes, the last of which is empty.

    Redirections may lead to http and https only. Another thread reads, because a server that sends its headers byte by
    byte would hold this one for ever: each byte ends a time-out of the socket. Raises OSError, ValueError and others.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.UnknownHandler, urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler, urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):  # fmt: skip
        opener.add_handler(handler())
    request = urllib.request.Request(url, headers={"User-Agent": f"sslvit/{__version__}"})
    items: queue.Queue[Any] = queue.Queue(maxsize=4)
    ended = threading.Event()

    def put(item: Any) -> None:
        while not ended.is_set():
            try:
                items.put(item, timeout=1)
                break
            except queue.Full:
                continue

    def work() -> None:
        try:
            with opener.open(request, timeout=TIMEOUT) as answer:
                put(max(0, int(answer.headers.get("Content-Length") or 0)))
                while not ended.is_set():
                    block = answer.read1(2**20)  # what there is; `read` would wait until it has all of it
                    put(block)
                    if not block:
                        break
        except Exception as error:
            put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            try:
                item = items.get(timeout=2 * TIMEOUT)
            except queue.Empty:
                raise TimeoutError(f"nothing has come in {2 * TIMEOUT:.0f} seconds") from None
            if isinstance(item, Exception):
                raise item
            yield item
            if item == b"":
                return
    finally:
        ended.set()


def _copy(blocks: Iterator[bytes], file: BinaryIO, length: int, url: str, folder: Path) -> int:
    """Write the blocks to the file and return their bytes. Raises UserError as soon as they reach one of the limits."""
    began = last = slow_since = time.monotonic()
    done = slow_done = 0
    while True:
        free = shutil.disk_usage(folder).free
        if max(0, length - done) + RESERVE > free:
            more = f"{size_text(length)}" if length else f"{size_text(done)} or more"
            raise UserError(
                f"data: {url} has {more} and {folder} has {size_text(free)} left, of which {size_text(RESERVE)} stay "
                "free: make room or set data.download_dir."
            )
        if max(length, done) > MAX_GIB * 2**30:
            raise UserError(
                f"data: {url} has more than {MAX_GIB} GiB: raise SSLVIT_MAX_DOWNLOAD_GIB in the environment if this "
                "is right."
            )
        block = next(blocks)
        if not block:
            return done
        file.write(block)
        done, now = done + len(block), time.monotonic()
        if now - began > 3600 * MAX_HOURS:
            raise UserError(
                f"data: {url} has not come in {MAX_HOURS} hours, only {size_text(done)}: raise "
                f"SSLVIT_MAX_DOWNLOAD_HOURS in the environment. {BY_HAND}."
            )
        if now - slow_since > SLOW_SECONDS:
            if done - slow_done < SLOWEST * SLOW_SECONDS:
                raise UserError(
                    f"data: {url} comes too slowly, {done - slow_done:,} bytes in {now - slow_since:.0f} seconds. "
                    f"{BY_HAND}."
                )
            slow_since, slow_done = now, done
        if now - last > SAY_EVERY:
            last = now
            say(f"  {size_text(done)}{f' of {size_text(length)}, {done / length:.0%}' if length else ''}")


def _file_name(url: str) -> str:
    """The last part of the address, as a name that any file system takes: no control characters, and not too long."""
    name = os.path.basename(urllib.parse.unquote(urllib.parse.urlsplit(url).path)) or "index"
    return re.sub(r"[\0-\x1f\x7f]", "_", name)[-MAX_NAME:]
