"""A source that cannot be opened is one sentence that says what to do."""

import io
import sys

import numpy as np
import pytest

from sslvit.data import BadImage, Config, WrappedSource, kind_of, open_source
from sslvit.data.sources import SETS, torchvision_sets
from sslvit.data.sources.decode import decode
from sslvit.errors import UserError
from tests.conftest import write_images
from tests.data.sources.test_sources import config, write_dicom


def refused(word, **more) -> str:
    with pytest.raises(UserError) as error:
        open_source(str(word), Config(**more))
    assert "\n" not in str(error.value)
    assert str(error.value).count("data: ") <= 1  # no error inside another
    return str(error.value)


def test_the_kind_of_a_word_is_seen_before_anything_is_opened(tmp_path):
    write_images(tmp_path / "[odd, name].tar", 1)  # a folder: what exists is what it is
    for name in ("x.csv", "x.zip", "x.TAR", "x.parquet", "x.npy", "x.h5", "x.tif", "x.jpg", "a:b.csv"):
        (tmp_path / name).write_bytes(b"")
    kinds = {
        "[a,b]": "list", "https://x/y.zip": "url", "hf:mnist": "hub", "fractals:test,classes=3": "fractals",
        "cifar10:test": "set", "stl10": "set", f"{tmp_path}": "folder", f"{tmp_path}/[odd, name].tar": "folder",
        "scans/**/*.png": "pattern", "x{0..3}.tar": "pattern", "scan[0-9].png": "pattern",
        f"{tmp_path}/x.csv": "table", f"{tmp_path}/x.csv:age,weight": "table", f"{tmp_path}/a:b.csv": "table",
        f"{tmp_path}/x.zip": "archive", f"{tmp_path}/x.TAR": "archive", f"{tmp_path}/x.parquet": "parquet",
        f"{tmp_path}/x.npy": "array", f"{tmp_path}/x.h5:group/images": "hdf5", f"{tmp_path}/x.tif": "stack",
        f"{tmp_path}/x.jpg": "folder", f"pages:{tmp_path}": "pages", "nowhere": None, "cifar1": None, "x.csv": None,
    }  # fmt: skip
    assert {word: kind_of(word) for word in kinds} == kinds


def test_the_sets_of_torchvision_are_those_that_words_know():
    assert tuple(torchvision_sets.SPLITS) == SETS


def test_lists_with_mistakes(tmp_path):
    assert "empty item" in refused("[a,,b]")
    assert "not closed" in refused('[a,"b]')
    assert "nowhere is neither" in refused(f"[{write_images(tmp_path / 'a', 1)},nowhere]")


def test_a_list_keeps_commas_that_belong_to_a_name(tmp_path):
    write_images(tmp_path / "a, b", 2)
    write_images(tmp_path / "c", 1)
    assert len(open_source(f'["{tmp_path}/a, b",{tmp_path}/c]', Config())) == 3


def test_classes_of_several_folders_go_by_name(tmp_path):
    for name in ("one/cat", "one/dog", "two/ant", "two/cat"):
        write_images(tmp_path / name, 1)
    write_images(tmp_path / "three", 2)
    source = open_source(f"[{tmp_path}/one,{tmp_path}/two,{tmp_path}/three]", Config())
    assert source.classes == ["ant", "cat", "dog"]
    assert source.labels.tolist() == [1, 2, 0, 1, -1, -1]
    swapped = open_source(f"[{tmp_path}/two,{tmp_path}/one,{tmp_path}/three]", Config())
    assert swapped.identity() != source.identity()
    assert swapped.fingerprint() != source.fingerprint()


def test_several_sources_and_a_cache_say_their_value_range(tmp_path):
    """Features of 16-bit images are cached under it."""
    parts = [str(write_images(tmp_path / name, 1)) for name in "ab"]
    source = open_source(f"[fractals,{parts[0]},{parts[1]}]", Config(value_range=(0, 9)))
    assert source.value_range == WrappedSource(source).value_range == (0, 9)


def test_patterns_that_match_nothing_or_no_images(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert "nothing matches" in refused(tmp_path / "*.png")
    assert "stands for" in refused("x{0..99999999}.tar")
    assert "braces hold" in refused("x{y}.tar")
    write_images(tmp_path / "a", 2)
    (tmp_path / "a" / "notes.md").write_text("")
    assert len(open_source(f"{tmp_path}/a/*", Config())) == 2


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [((5,), "uint8", r"\[N, H, W\]"), ((0, 4, 4), "uint8", r"\[N, H, W\]"), ((2, 4, 4, 7), "uint8", "7 channels")],
)
def test_arrays_that_are_no_images(tmp_path, shape, dtype, expected):
    import re

    np.save(tmp_path / "x.npy", np.zeros(shape, dtype))
    assert re.search(expected, refused(tmp_path / "x.npy"))


def test_damaged_arrays(tmp_path):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 999, 999)})
    shape_of_true = b"\x93NUMPY\1\0\x40\0" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (True,), }".ljust(64)
    unfinished = b"\x93NUMPY\1\0\2\0[\n"
    for data in (b"", b"no array", stream.getvalue(), b"\x93NUMPY\x01\x00\xff\xff{", shape_of_true, unfinished):
        (tmp_path / "x.npy").write_bytes(data)
        assert "cannot be read as an array" in refused(tmp_path / "x.npy")
    np.save(tmp_path / "o.npy", np.array([{"a": 1}] * 3))
    assert "cannot be read as an array" in refused(tmp_path / "o.npy")


def test_npz_files_with_mistakes(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros((2, 4, 4), np.uint8), b=np.zeros(3))
    assert "holds the arrays a, b: say which one has the images, x.npz:a" in refused(tmp_path / "x.npz")
    assert "say which one" in refused(f"{tmp_path / 'x.npz'}:c")
    assert len(open_source(f"{tmp_path / 'x.npz'}:a", Config())) == 2
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:200])
    assert "cannot be read as arrays" in refused(f"{tmp_path / 'x.npz'}:a")


def test_labels_of_an_array_must_fit(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 4, 4), np.uint8))
    np.save(tmp_path / "x.labels.npy", np.array([2, -1, 10]))
    source = open_source(str(tmp_path / "x.npy"), Config())
    assert (source.classes, source.labels.tolist()) == (["2", "10"], [0, -1, 1])
    np.save(tmp_path / "x.labels.npy", np.array([2, 1]))
    assert "one whole number for each of the 3 images" in refused(tmp_path / "x.npy")


def test_hdf5_files_with_mistakes(tmp_path):
    import h5py

    for data in (b"", b"no such thing" * 50):
        (tmp_path / "bad.h5").write_bytes(data)
        assert "cannot be read as HDF5" in refused(tmp_path / "bad.h5")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a/b"], file["c"] = np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4), np.uint8)
        file["flat"] = np.zeros(4)
    assert "say which one has the images, x.h5:a/b" in refused(tmp_path / "x.h5")
    assert "has no dataset d; it has a/b, c, flat" in refused(tmp_path / "x.h5:d")
    assert "[N, H, W]" in refused(tmp_path / "x.h5:flat")
    data = (tmp_path / "x.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(data[: len(data) // 2])
    assert "cannot be read as HDF5" in refused(tmp_path / "cut.h5:c")


def test_hdf5_of_encoded_images(tmp_path, images):
    import h5py

    files = [path.read_bytes() for path in sorted(images.iterdir())[:3]]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        kind = h5py.vlen_dtype(np.uint8)
        cells = file.create_dataset("data", (3,), kind)
        for i, data in enumerate(files):
            cells[i] = np.frombuffer(data, np.uint8)
    source = open_source(str(tmp_path / "x.h5"), Config())
    assert all((source.read(i) == decode(data, 3)).all() for i, data in enumerate(files))


def test_parquet_files_with_mistakes(tmp_path):
    import pyarrow
    import pyarrow.parquet

    where = config(tmp_path).download_dir
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no parquet PAR1")
    assert "x.parquet" in refused(tmp_path / "x.parquet", download_dir=where)
    pyarrow.parquet.write_table(pyarrow.table({"a": [1], "b": ["c"]}), tmp_path / "y.parquet")
    assert "no column of encoded images; it has a, b" in refused(tmp_path / "y.parquet", download_dir=where)
    assert list((tmp_path / "cache" / "parquet").iterdir()) == []
    cells = [{"bytes": b"", "path": "x.png"}, {"bytes": None, "path": None}, None]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": ["b|a", None, "a"]}), tmp_path / "z.parquet")
    source = open_source(str(tmp_path / "z.parquet"), config(tmp_path))
    for i in range(3):
        with pytest.raises(BadImage, match="empty"):
            source.read(i)
    from sslvit.data import labels

    assert labels.multilabel(source)[0].tolist() == [[1, 1], [0, 0], [1, 0]]


def test_hugging_face_names_with_mistakes(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "cannot be opened" in refused("hf:nobody/nothing")
    datasets.DatasetDict({"a": datasets.Dataset.from_dict({"x": [1]})}).save_to_disk(tmp_path / "saved")
    assert f"has the splits a: say which, hf:{tmp_path}/saved:a" in refused(f"hf:{tmp_path}/saved")
    assert "no column of images; it has x" in refused(f"hf:{tmp_path}/saved:a")


@pytest.mark.parametrize(
    ("module", "extra", "name"),
    [("h5py", "hdf5", "x.h5"), ("pyarrow.parquet", "parquet", "x.parquet"), ("datasets", "hf", "hf:x"),
     ("tifffile", "tiff", "x.tif")],
)  # fmt: skip
def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, tmp_path, module, extra, name):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"")
    word = name if name.startswith("hf:") else str(tmp_path / name)
    assert f"pip install 'sslvit[{extra}]'" in refused(word, download_dir=str(tmp_path / "cache"))


def test_a_folder_of_dicom_without_pydicom_is_refused_at_the_start(monkeypatch, tmp_path):
    write_dicom(tmp_path / "a.dcm", np.zeros((4, 4), np.uint8))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "pip install 'sslvit[dicom]'" in refused(tmp_path)


def test_other_endings_are_found_where_there_are_no_common_ones(tmp_path):
    write_dicom(tmp_path / "a.dcm", np.zeros((4, 4), np.uint8))
    np.save(tmp_path / "b.npy", np.zeros((4, 4), np.uint8))
    assert len(open_source(str(tmp_path), Config())) == 2
    write_images(tmp_path, 1)
    assert len(open_source(str(tmp_path), Config())) == 1  # as it was before these endings were known
