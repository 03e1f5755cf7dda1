"""The one exception that a user's mistake raises: its text is the whole message, and no traceback is shown."""

import difflib
import importlib
import math
import re
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

ABOVE_0, BELOW_1 = math.nextafter(0.0, 1.0), math.nextafter(1.0, 0.0)  # limits for numbers that may not be 0 or 1
# What numbers of a Config may be, as `LIMITS: ClassVar[Limits]` in it: (lowest, highest or None, key, key ...).
Limits = list[tuple[Any, ...]]

# Control characters, which move a terminal's cursor or end a line of a table; marks that turn the direction of text;
# and surrogates, which stand for bytes that are not UTF-8 in the names of files.
UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """One sentence: what is wrong, what was given, what to do. `sslvit` prints it and exits with status 2."""


def printable(text: str, keep: str = "") -> str:
    """A name or reason as files and terminals can take it: what is unprintable becomes \\n, \\x1b, \\xff ...

    keep: characters that stay as they are.
    """

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if "\udc80" <= character <= "\udcff":  # how Python writes the bytes 80 to ff that are not UTF-8
            return f"\\x{ord(character) - 0xDC00:02x}"
        return character if character in keep else character.encode("unicode_escape").decode("ascii")

    return UNPRINTABLE.sub(escaped, text)


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """An optional package, imported. Raises UserError that names the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{purpose} needs {module}: pip install 'sslvit[{extra}]'.") from error


def did_you_mean(name: str, choices: Iterable[str], full: Mapping[str, str] | None = None) -> str:
    """ " Did you mean mae?", or "" if no choice is near. full: what to write for each choice."""
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f" Did you mean {full[near[0]] if full else near[0]}?" if near else ""


def check_limits(section: str, config: Any) -> None:
    """Raises UserError for a number of the configuration outside the LIMITS of its class."""
    for low, high, *names in config.LIMITS:
        check_range(section, config, low, high, *names)


def check_range(section: str, config: object, low: float, high: float | None, *names: str) -> None:
    """Raises UserError for a field of the configuration (or a number in its tuple) outside [low, high]; None passes."""
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if number is not None and not low <= number <= (math.inf if high is None else high):
                shown = list(value) if isinstance(value, (tuple, list)) else value
                raise UserError(f"{section}{name}={shown} must {_bounds(low, high)}.")


def _bounds(low: float, high: float | None) -> str:
    if high is None:
        return "be above 0" if low == ABOVE_0 else f"be {low:g} or above"
    excluded = " and ".join(f"{round(bound):g}" for bound in (low, high) if bound in (ABOVE_0, BELOW_1))
    return f"lie between {round(low, 9):g} and {round(high, 9):g}{f', {excluded} excluded' if excluded else ''}"


def check_share(section: str, config: object, *names: str) -> None:
    """Raises UserError for a pair (low, high) of shares of an area that is not 0 < low <= high <= 1."""
    for name in names:
        low, high = getattr(config, name)
        if not 0 < low <= high <= 1:
            raise UserError(f"{section}{name}={[low, high]} must be two shares of the area, 0 < low <= high <= 1.")
