"""A list of paths: .txt with one in each line; .csv or .tsv with a header, a column of paths, and perhaps labels."""

import csv
from collections.abc import Iterator
from pathlib import Path

from ...errors import UserError
from ..config import Config
from .files import Files, check_channels, endings_of
from .names import Names, numbered
from .syntax import split_part

PATHS = ("path", "image", "file", "filename", "file_name", "filepath", "file_path", "image_path", "img", "image index")
LABELS = ("label", "labels", "class", "target", "category", "finding labels")
CHECKED = 100  # the first paths: one of them must exist, so that a wrong folder is noticed at the start


class Table(Files):
    """Images in the order of the lines. Paths are relative to the list's folder. One label column gives classes."""

    def __init__(self, path: Path, wanted: list[str], config: Config) -> None:
        try:
            names, self.columns, texts = _read(path, wanted)
        except (OSError, csv.Error) as error:
            raise UserError(f"data: {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        if not names:
            raise UserError(f"data: {path} lists no images.")
        if not any((path.parent / name).exists() for name in names[:CHECKED]):
            raise UserError(
                f"data: {path} lists {names[0]}, and there is no {path.parent / names[0]}: paths must be absolute or "
                "relative to the list's folder."
            )
        check_channels(config.in_chans, endings_of(names), str(path))
        classes, labels = numbered(texts) if len(self.columns) == 1 else ([], None)
        super().__init__(path.parent, Names(names), config, classes, labels)
        self.texts = Names(texts) if self.columns else None


def open_table(spec: str, config: Config) -> Table:
    """`list.txt`, `list.csv`, `list.csv:finding`, `list.csv:age,weight`, `list.csv:path=scan,finding`."""
    path, part = split_part(spec)
    wanted = [name.strip() for name in part.split(",")] if part else []
    return Table(Path(path).expanduser(), wanted, config)


def _read(path: Path, wanted: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(paths, names of the label columns, their texts)."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if path.suffix.lower() == ".txt":
            lines = (line.strip("\r\n") for line in file)
            return [line for line in lines if line.strip()], [], []
        header = file.readline()
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ";" if ";" in header and "," not in header else ","
        titles = [title.strip() for title in next(csv.reader([header], delimiter=delimiter), [])]
        return _rows(path, titles, csv.reader(file, delimiter=delimiter), wanted)


def _rows(
    path: Path, titles: list[str], rows: Iterator[list[str]], wanted: list[str]
) -> tuple[list[str], list[str], list[str]]:
    chosen = next((name.partition("=")[2] for name in wanted if name.startswith("path=")), None)
    wanted = [name for name in wanted if not name.startswith("path=")]
    low = [title.lower() for title in titles]
    where = [_column(path, titles, chosen)] if chosen else [low.index(name) for name in PATHS if name in low]
    if not where:
        raise UserError(
            f"data: {path} has the columns {', '.join(titles)} and none called path: name it so in the first line, or "
            f"say which it is, {path.name}:path={titles[0] if titles else 'column'}."
        )
    columns = wanted or [titles[low.index(name)] for name in LABELS if name in low][:1]
    places = [_column(path, titles, name) for name in columns]
    names, texts = [], []
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        if len(row) <= max([where[0], *places]) or not row[where[0]].strip():
            raise UserError(f"data: line {number} of {path} has {len(row)} cells and no path in column {where[0] + 1}.")
        names.append(row[where[0]].strip())
        texts.append("\t".join(row[place].strip() for place in places))
    return names, [titles[place] for place in places], texts


def _column(path: Path, titles: list[str], name: str) -> int:
    if name in titles:
        return titles.index(name)
    low = [title.lower() for title in titles]
    if name.lower() in low:
        return low.index(name.lower())
    raise UserError(f"data: {path} has no column {name}; it has {', '.join(titles)}.")
