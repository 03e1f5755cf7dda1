"""A folder of images, flat or nested, with or without class folders."""

import os
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ...errors import UserError
from ..config import Config
from .files import EXTENSIONS, SCIENTIFIC, SOME_EXTENSIONS, Files, check_channels
from .names import Names, labels_of_runs

THREADS = 16  # that list folders
LOCK = threading.Lock()


class Folder(Files):
    """Every image file below `root`, in the order of the paths. If all of them lie in sub-folders, the first folder of
    the path is the label.

    The list is made anew at every start: whether a stored one still holds could only be told from the folders' times,
    which say nothing on some network file systems. A million files take a few seconds on a local disk.
    """

    def __init__(self, root: Path, in_chans: int = 3, value_range: tuple[float, float] | None = None) -> None:
        if not root.is_dir():
            raise UserError(f"data: {root} is a file: give the folder that holds the images.")
        tree = Tree(root, EXTENSIONS)
        if not tree.num_images:
            tree = Tree(root, SCIENTIFIC)
        if not tree.num_images:
            raise UserError(f"data: no images in {root}: {_describe(tree)}. Image files end in {SOME_EXTENSIONS}.")
        check_channels(in_chans, tree.endings, "a folder")
        super().__init__(root, *_listed(tree), in_chans=in_chans, value_range=value_range)


def open_folder(word: str, config: Config) -> Folder:
    return Folder(Path(word).expanduser(), config.in_chans, config.value_range)


class Tree:
    """The image files below a folder, in the order in which they would be sorted, without a Python string for each.

    Folders are listed by threads, which wait for the file system at once. Hidden files are passed over. Links to
    folders are followed after all else, in the order of their paths, and a folder that was seen already is not entered
    again. Raises UserError for a folder that cannot be listed.
    """

    def __init__(self, root: Path, wanted: frozenset[str]) -> None:
        self.root, self.wanted = root, wanted
        self.num_images, self.num_others = 0, 0
        self.endings: set[str] = set()  # of the images
        self.others: Counter[str] = Counter()  # other files, by their ending
        self.example: str | None = None  # of them
        # {folder: what it holds, sorted, with zeros between; the name of a folder ends in a slash}. With the slash it
        # stands where its files do in the order of all paths.
        self.held: dict[str, bytes] = {}
        seen, links, level = {os.path.realpath(root)}, [], [("", os.path.realpath(root))]
        with ThreadPoolExecutor(THREADS) as pool:
            while level or links:
                if not level:
                    folder = links.pop(0)
                    real = os.path.realpath(root / folder)
                    if real in seen:
                        self._leave_out(folder)
                        continue
                    seen.add(real)
                    level = [(folder, real)]
                found = pool.map(self._list, [folder for folder, _ in level])
                inner = []
                for (folder, real), (folders, linked) in zip(level, found, strict=True):
                    inner += [(os.path.join(folder, name), os.path.join(real, name)) for name in folders]
                    links += [os.path.join(folder, name) for name in linked]
                again = [folder for folder, real in inner if real in seen]  # below a link out of the tree and back
                for folder in again:
                    self._leave_out(folder)
                level = [(folder, real) for folder, real in inner if real not in seen]
                seen.update(real for _, real in level)
                links.sort()

    def _list(self, folder: str) -> tuple[list[str], list[str]]:
        """Note what one folder holds; returns the names of the folders in it, and those of links to folders."""
        images, folders, links = [], [], []
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if _is_folder(entry):
                        (links if entry.is_symlink() else folders).append(entry.name)
                        continue
                    ending = os.path.splitext(entry.name)[1].lower()
                    if ending in self.wanted:
                        images.append(entry.name)
                        self.endings.add(ending)
                    else:
                        with LOCK:
                            self._note_other(os.path.join(folder, entry.name), ending)
        except OSError as error:
            raise UserError(f"data: cannot list {self.root / folder}: {error.strerror}.") from error
        held = sorted([*images, *(f"{name}/" for name in (*folders, *links))])
        with LOCK:
            self.num_images += len(images)
            self.held[folder] = b"\0".join(map(os.fsencode, held))
        return folders, links

    def _note_other(self, path: str, ending: str) -> None:
        self.num_others += 1
        self.others[ending or "no extension"] += 1
        if self.example is None or path < self.example:
            self.example = path

    def _leave_out(self, folder: str) -> None:
        self.held[folder] = b""

    def files(self) -> Iterator[tuple[str, list[bytes]]]:
        """(folder, names of images), in order; a folder comes again after each folder in it."""
        stack = [("", iter(self._entries("")))]
        while stack:
            folder, entries = stack[-1]
            names: list[bytes] = []
            inner = None
            for entry in entries:
                if entry.endswith(b"/"):
                    inner = os.path.join(folder, os.fsdecode(entry[:-1]))
                    break
                names.append(entry)
            if names:
                yield folder, names
            if inner is None:
                stack.pop()
            else:
                stack.append((inner, iter(self._entries(inner))))

    def _entries(self, folder: str) -> list[bytes]:
        held = self.held.pop(folder)
        return held.split(b"\0") if held else []


def _listed(tree: Tree) -> tuple[Names, list[str], np.ndarray | None]:
    """The paths, and labels from class folders."""
    blob, ends, at = bytearray(), np.empty(tree.num_images, dtype=np.int64), 0
    tops: list[tuple[str, int]] = []  # first folder, images
    for folder, names in tree.files():
        before = os.fsencode(folder) + b"/" if folder else b""
        lengths = np.fromiter(map(len, names), dtype=np.int64, count=len(names)) + len(before)
        ends[at : at + len(names)] = len(blob) + np.cumsum(lengths)
        blob += before + (b"\0" + before).join(names).replace(b"\0", b"")
        at += len(names)
        tops.append((folder.partition(os.sep)[0], len(names)))
    return Names.of_arrays(ends, np.frombuffer(blob, dtype=np.uint8)), *labels_of_runs(tops)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: reading it is a BadImage
        return False


def _describe(tree: Tree) -> str:
    if not tree.num_others:
        return "the folder is empty"
    counts = ", ".join(f"{count} {kind}" for kind, count in tree.others.most_common(4))
    openable = next((ending for ending in (".zip", ".tar", ".parquet") if ending in tree.others), None)
    if openable:
        counts += f"; write <folder>/*{openable} for what is in the {openable} files"
    return f"it holds {tree.num_others} other files ({counts}), for example {tree.example}"
