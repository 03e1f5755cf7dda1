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

LOCK = threading.Lock()
THREADS = 16  # that list folders, each waiting for the file system


class Folder(Files):
    """Every image file below `root`, in the order of the paths. If all images lie in sub-folders, the first folder of
    a path is the label.

    The files are listed at every start. A stored list could only be checked by the times of folders, which some network
    file systems do not keep. A million files take a few seconds on a local disk.
    """

    def __init__(self, root: Path, config: Config) -> None:
        if not root.is_dir():
            raise UserError(f"data: {root} is a file: give the folder that holds the images.")
        tree = Tree(root, EXTENSIONS)
        if not tree.num_images:
            tree = Tree(root, SCIENTIFIC)
        if not tree.num_images:
            raise UserError(f"data: no images in {root}: {_describe(tree)}. Image files end in {SOME_EXTENSIONS}.")
        check_channels(config.in_chans, tree.endings, "a folder")
        names, classes, labels = _listed(tree)
        super().__init__(root, names, config, classes, labels)


def open_folder(spec: str, config: Config) -> Folder:
    return Folder(Path(spec).expanduser(), config)


class Tree:
    """The image files below a folder, in the order of their sorted paths, without a Python string for each.

    Hidden files are left out. Links to folders are followed after all else, in the order of their paths. A folder that
    was seen before is not entered again. Raises UserError for a folder that cannot be listed.
    """

    def __init__(self, root: Path, wanted: frozenset[str]) -> None:
        """wanted: endings of image files."""
        self.root, self.wanted, self.num_images = root, wanted, 0
        self.endings: set[str] = set()  # of the images
        self.others: Counter[str] = Counter()  # other files, by their ending
        self.example = ""  # one of them
        # {folder: names of its images and folders, sorted, with zeros between}. A folder's name ends in a slash, which
        # gives it its place in the order of all paths.
        self.held: dict[str, bytes] = {}
        seen: set[str] = set()
        links: list[str] = []
        level = [("", os.path.realpath(root))]
        with ThreadPoolExecutor(THREADS) as pool:
            while level or links:
                if not level:
                    folder = links.pop(0)
                    level = [(folder, os.path.realpath(root / folder))]
                self.held |= {folder: b"" for folder, real in level if real in seen}
                level = [(folder, real) for folder, real in level if real not in seen]
                seen.update(real for _, real in level)
                inner = []
                found = pool.map(self._list, [folder for folder, _ in level])
                for (folder, real), (folders, linked) in zip(level, found, strict=True):
                    inner += [(os.path.join(folder, name), os.path.join(real, name)) for name in folders]
                    links += [os.path.join(folder, name) for name in linked]
                level = inner
                links.sort()

    def _list(self, folder: str) -> tuple[list[str], list[str]]:
        """Note what a folder holds. Returns the names of folders in it and of links to folders."""
        images, others = list[str](), list[str]()
        folders, links = list[str](), list[str]()
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if _is_folder(entry):
                        (links if entry.is_symlink() else folders).append(entry.name)
                    else:
                        (images if _ending(entry.name) in self.wanted else others).append(entry.name)
        except OSError as error:
            raise UserError(f"data: cannot list {self.root / folder}: {error.strerror}.") from error
        held = b"\0".join(map(os.fsencode, sorted([*images, *(f"{name}/" for name in folders + links)])))
        with LOCK:
            self.held[folder] = held
            self.num_images += len(images)
            self.endings |= set(map(_ending, images))
            self.others.update(_ending(name) or "no extension" for name in others)
            if others:
                first = os.path.join(folder, min(others))
                self.example = min(self.example or first, first)
        return folders, links

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


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: reading it is a BadImage
        return False


def _describe(tree: Tree) -> str:
    if not tree.others:
        return "the folder is empty"
    counts = ", ".join(f"{count} {kind}" for kind, count in tree.others.most_common(4))
    openable = next((ending for ending in (".zip", ".tar", ".parquet") if ending in tree.others), None)
    if openable:
        counts += f"; write <folder>/*{openable} for what is in the {openable} files"
    return f"it holds {tree.others.total()} other files ({counts}), for example {tree.example}"
