import hashlib
import os
import shutil
import tracemalloc

import pytest

from sslvit.data import Config, open_source
from sslvit.data.sources.folder import Folder, Names
from sslvit.errors import UserError
from tests.conftest import write_images


def test_a_flat_folder_has_no_labels_and_the_order_of_its_names(images):
    source = open_source(str(images), Config())
    assert len(source) == 37
    assert source.labels is None
    assert source.classes == []
    assert [os.path.basename(source.name(i)) for i in range(37)] == [f"{i:03d}.png" for i in range(37)]
    assert source.read(5).shape == (3, 40, 36)


def test_class_folders_give_labels_by_name(labelled):
    source = open_source(str(labelled / "train"), Config())
    assert source.classes == ["class0", "class1", "class2"]
    assert source.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    assert all(f"class{label}" in source.name(i) for i, label in enumerate(source.labels))


def test_nested_folders_hidden_files_and_other_files(tmp_path):
    write_images(tmp_path / "a" / "deep" / "deeper", 2)
    write_images(tmp_path / "b", 1)
    write_images(tmp_path / ".hidden", 1)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "._000.png").write_bytes(b"resource fork")
    (tmp_path / "b" / "LOUD.JPG").write_bytes(b"counts as an image by its name")
    source = Folder(tmp_path, Config())
    assert len(source) == 4
    assert source.classes == ["a", "b"]


def test_one_image_beside_the_folders_means_no_labels(tmp_path):
    write_images(tmp_path / "a", 2)
    write_images(tmp_path, 1)
    assert Folder(tmp_path, Config()).labels is None


def test_links_are_followed_once(tmp_path):
    write_images(tmp_path / "real", 2)
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "real")
    (root / "linked_loop").symlink_to(root)
    assert len(Folder(root, Config())) == 2


def test_an_empty_folder_says_what_it_found(tmp_path):
    with pytest.raises(UserError, match="the folder is empty"):
        Folder(tmp_path, Config())
    for i in range(3):
        (tmp_path / f"{i}.nii").write_bytes(b"")
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(UserError, match=r"4 other files \(3 \.nii, 1 \.txt\)"):
        Folder(tmp_path, Config())


def test_a_missing_folder_a_file_and_a_misspelt_set(tmp_path, images):
    with pytest.raises(UserError, match="does not exist: give a folder or file of images"):
        open_source(str(tmp_path / "nowhere"), Config())
    with pytest.raises(UserError, match="is a file"):
        open_source(str(images / "000.png"), Config())
    with pytest.raises(UserError, match="Did you mean cifar10"):
        open_source("cifar_10", Config())


def test_names_are_kept_whatever_they_are():
    names = ["a", "", "ä/ö.png", os.fsdecode(b"\xff\xfe.png"), "x" * 1000]
    kept = Names(names)
    assert [kept[i] for i in range(len(kept))] == names


def test_the_fingerprint_changes_with_the_images(tmp_path):
    write_images(tmp_path, 3)
    before = Folder(tmp_path, Config()).fingerprint()
    assert Folder(tmp_path, Config()).fingerprint() == before
    shutil.copy(tmp_path / "000.png", tmp_path / "zzz.png")
    added = Folder(tmp_path, Config()).fingerprint()
    (tmp_path / "000.png").write_bytes(b"other")
    assert len({before, added, Folder(tmp_path, Config()).fingerprint()}) == 3


AWKWARD = ["a/x.png", "a-b/x.png", "a b/x.png", "a.png", "a/b/c.png", "a/b.png", "a/b-c/d.png", "ab/x.png", "A/x.png",
           "a0/x.png", "ä/é.png", "a/\udcff.png", "z/\U0001f600.png", "z/\uffee.png", "z/a/b/c/d/e.png"]  # fmt: skip


def test_the_order_is_that_of_sorted_paths(tmp_path):
    for name in AWKWARD:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    source = Folder(tmp_path, Config())
    assert list(source.names) == sorted(AWKWARD)
    ends, blob = Names(sorted(AWKWARD)).ends, os.fsencode("".join(sorted(AWKWARD)))
    assert source.identity() == hashlib.sha256(ends.tobytes() + blob).hexdigest()
    assert source.labels is None
    (tmp_path / "a.png").unlink()
    source = Folder(tmp_path, Config())
    tops = [name.split("/")[0] for name in sorted(AWKWARD) if name != "a.png"]
    assert source.classes == sorted(set(tops))
    assert [source.classes[label] for label in source.labels] == tops


def test_a_folder_that_links_lead_to_is_seen_under_its_own_path(tmp_path):
    write_images(tmp_path / "root" / "z" / "real", 2)
    write_images(tmp_path / "beside", 1)
    (tmp_path / "root" / "a").symlink_to(tmp_path / "root" / "z")
    (tmp_path / "root" / "b").symlink_to(tmp_path)  # holds the root, which is not entered again
    (tmp_path / "root" / "c").symlink_to(tmp_path / "beside")  # seen through b
    assert list(Folder(tmp_path / "root", Config()).names) == ["b/beside/000.png", "z/real/000.png", "z/real/001.png"]


def test_many_images_cost_their_names_and_little_more(tmp_path):
    for folder in range(20):
        (tmp_path / f"class{folder:02d}").mkdir()
        for i in range(500):
            (tmp_path / f"class{folder:02d}" / f"image{i:06d}.png").touch()
    tracemalloc.start()
    source = Folder(tmp_path, Config())
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    bytes_of_names = len("class00/image000000.png")
    assert kept < len(source) * (bytes_of_names + 2 * 8) * 1.2 + 1e5
    assert peak < len(source) * (bytes_of_names + 2 * 8) * 2.5 + 1e5
