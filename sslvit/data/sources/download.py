"""http:// and https://: a file is fetched once into data.download_dir and then opened as any local one."""

import hashlib
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path

from ... import __version__
from ...distributed import say
from ...errors import UserError
from ..config import Config
from . import ENDINGS, PACKED
from .files import unfinished
from .several import open_paths
from .source import Source
from .syntax import expanded

SAY_EVERY = 10.0  # seconds
TIMEOUT = 60.0  # seconds without a byte


def open_url(spec: str, config: Config) -> Source:
    """`https://host/images.zip`, `https://host/shards/{000..012}.tar`. Braces are the only pattern, because a server
    does not list its files."""
    folder = Path(config.download_dir).expanduser() / "urls"
    urls = expanded(spec)
    endings = [Path(_file_name(url)).suffix.lower() for url in urls]
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
        request = urllib.request.Request(url, headers={"User-Agent": f"sslvit/{__version__}"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, part.open("wb") as file:
            length = int(answer.headers.get("Content-Length") or 0)
            free = shutil.disk_usage(folder).free
            if length > free:
                raise UserError(f"data: {url} has {_size(length)} and {folder} has {_size(free)} left.")
            done, last = 0, time.monotonic()
            say(f"fetching {url} ({which}, {_size(length) if length else 'size unknown'}) into {folder}")
            while block := answer.read(2**20):
                file.write(block)
                done += len(block)
                if time.monotonic() - last > SAY_EVERY:
                    last = time.monotonic()
                    say(f"  {_size(done)}{f' of {_size(length)}, {done / length:.0%}' if length else ''}")
        if length and done != length:
            raise UserError(f"data: {url} broke off after {_size(done)} of {_size(length)}: start the command again.")
        os.replace(part, path)
    except UserError:
        raise
    except urllib.error.HTTPError as error:
        raise UserError(f"data: {url} cannot be fetched: the server answers {error.code} {error.reason}.") from error
    except (OSError, ValueError, HTTPException) as error:  # URLError and time-outs are OSErrors
        reason = getattr(error, "reason", None) or error
        raise UserError(f"data: {url} cannot be fetched: {reason}.") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _file_name(url: str) -> str:
    return os.path.basename(urllib.parse.unquote(urllib.parse.urlsplit(url).path)) or "index"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
