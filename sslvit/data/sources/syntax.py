"""How a user writes where images are: lists, braces, patterns."""

import glob
import json
import os
import re
from collections.abc import Iterator

from ...errors import UserError

ITEM = re.compile(r"""\s*((?:"[^"]*"|'[^']*'|\{[^{}]*\}|[^,"'{}])*?)\s*(,|$)""")
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"(\d+)\.\.(\d+)$")
MAX_NAMES = 1_000_000  # that braces may stand for
# file.csv:column, file.h5:group/name
WITH_PART = re.compile(r"(.*\.(?:csv|tsv|npz|h5|hdf5|hdf|he5)):([^/\\]*(?:/[^\\]*)?)$", re.IGNORECASE)


def split_part(spec: str) -> tuple[str, str]:
    """`file.csv:column`, `file.h5:group/images` -> (file, part); the part is empty where none is given."""
    match = None if os.path.lexists(os.path.expanduser(spec)) else WITH_PART.match(spec)
    return (match[1], match[2]) if match else (spec, "")


def items(spec: str) -> list[str]:
    """`[a, "b,c", x{1,2}]` -> its items; quotes keep a comma that belongs to a name. Raises UserError."""
    try:
        read = json.loads(spec)  # a list in a recipe becomes JSON
        if read and isinstance(read, list) and all(isinstance(item, str) for item in read):
            return read
    except ValueError:
        pass  # typed by hand, without JSON's quotes
    inside, at, found = spec[1:-1], 0, []
    while at <= len(inside):
        match = ITEM.match(inside, at)
        if not match:
            raise UserError(f"data: {spec} has a quote or a brace that is not closed.")
        found.append(re.sub(r"""^(["'])(.*)\1$""", r"\2", match[1]))
        at = match.end() + (not match[2])
        if match[2] and at == len(inside):  # a comma at the end
            break
    if not found or "" in found:
        raise UserError(f"data: {spec} has an empty item: write [first,second].")
    return found


def expanded(spec: str) -> list[str]:
    """`x{00..02}.tar` or `x{a,b}.tar` -> the names that it stands for, in order. Raises UserError."""
    match = BRACES.search(spec)
    if not match:
        return [spec]
    numbers = NUMBERS.match(match[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if abs(last - first) >= MAX_NAMES:
            raise UserError(f"data: {spec} stands for {abs(last - first) + 1} names: that is no list of files.")
        width = len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
        step = 1 if last >= first else -1
        parts = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    elif "," in match[1]:
        parts = match[1].split(",")
    else:
        raise UserError(f"data: {spec}: braces hold numbers as in {{000..012}} or names as in {{a,b}}.")
    before, rests = spec[: match.start()], expanded(spec[match.end() :])
    if len(parts) * len(rests) > MAX_NAMES:
        raise UserError(f"data: {spec} stands for {len(parts) * len(rests)} names: that is no list of files.")
    return [f"{before}{part}{rest}" for part in parts for rest in rests]


def is_pattern(spec: str) -> bool:
    return any(sign in spec for sign in "*?{") or bool(re.search(r"\[[^\]]+\]", spec))


def matching(spec: str) -> Iterator[str]:
    """The paths that match a pattern with braces, `*`, `?`, `[0-9]` and `**`. Those of each brace item are sorted."""
    for pattern in expanded(os.path.expanduser(spec)):
        if os.path.lexists(pattern) or not any(sign in pattern for sign in "*?["):
            yield pattern
        else:
            yield from sorted(glob.iglob(pattern, recursive=True))
