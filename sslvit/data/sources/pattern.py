"""What a pattern stands for: `scans/**/*.png`, `shards/{000..012}.tar`, `patients/*`."""

import os
import re
from pathlib import Path

from ...errors import UserError
from ..config import Config
from . import ENDINGS, open_source
from .files import EXTENSIONS, SOME_EXTENSIONS, Files, check_channels, endings_of
from .names import Names, top_folders
from .several import joined
from .source import Source
from .syntax import matching

TOGETHER = ("archive", "parquet")  # kinds of which many files are one source


def open_pattern(word: str, config: Config) -> Source:
    """The image files that match, in the order of their paths; or the archives, tables ... or folders, one after
    another."""
    paths = list(dict.fromkeys(matching(word)))
    missing = [path for path in paths if not os.path.lexists(path)]
    if missing:
        raise UserError(f"data: {word} names {len(missing)} files that are not there, the first is {missing[0]}.")
    if not paths:
        raise UserError(f"data: nothing matches {word}.")
    files = [path for path in paths if not os.path.isdir(path)]
    if not files:
        return joined([open_source(path, config) for path in paths])
    kinds = {ENDINGS.get(os.path.splitext(path)[1].lower(), "image") for path in files}
    kinds = {"image" if kind in ("stack", "array") else kind for kind in kinds}  # a file of many is an image
    if kinds == {"archive"}:
        from .archive import Archive

        return Archive(files, config)
    if kinds == {"parquet"}:
        from .parquet import Parquet

        return Parquet(files, config)
    if len(kinds) == 1 and "image" not in kinds:
        return joined([open_source(path, config) for path in files])
    return _images(word, files, config)


def _images(word: str, paths: list[str], config: Config) -> Files:
    if not os.path.splitext(word)[1]:  # `*` takes what a folder would take, `*.xyz` all of these
        paths = [path for path in paths if os.path.splitext(path)[1].lower() in EXTENSIONS]
    if not paths:
        raise UserError(f"data: no images match {word}. Image files end in {SOME_EXTENSIONS}.")
    root = Path(os.path.dirname(re.split(r"[*?{\[]", os.path.expanduser(word))[0]))
    names = sorted(os.path.relpath(path, root) for path in paths)
    check_channels(config.in_chans, endings_of(names), word)
    return Files(root, Names(names), *top_folders(names), config.in_chans, config.value_range)
