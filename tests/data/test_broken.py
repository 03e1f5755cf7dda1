"""A folder of which some files are broken, each in its own way: trained on, counted, named."""

import contextlib
import io
import os
import random
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

from sslvit.data import BadImage, Config, open_source
from sslvit.data.sources.decode import decode
from tests.conftest import words, write_images
from tests.data.sources.test_depth import png16


def photo(kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((60, 50), Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


def with_size(data: bytes, width: int, height: int) -> bytes:
    """A PNG whose header says another size, with a checksum that fits."""
    import zlib

    header = data[12:16] + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


BROKEN = {
    "truncated.jpg": photo()[:600],
    "truncated.png": photo("PNG")[:-300],
    "empty.jpg": b"",
    "zeros.png": bytes(4000),
    "text.jpg": b"404 not found\n" * 30,
    "bomb.png": with_size(photo("PNG"), 100_000, 100_000),
    "absurd.png": with_size(photo("PNG"), 2**31 - 1, 2**31 - 1),
    "absurd16.png": with_size(png16(np.zeros((4, 4, 3), np.uint16)), 2**30, 2**30),
    "header.jpg": b"\xff\xd8\xff\xe0" + bytes(500) + photo()[504:],
    "header.tif": b"II*\0\x08\0\0\0\xff\xff" + os.urandom(300),
    "noise.webp": b"RIFF\xff\xff\xff\x7fWEBPVP8 " + os.urandom(300),
    "noise.gif": b"GIF89a\xff\xff\xff\xff" + os.urandom(300),
}
READABLE = {"wrong_extension.jpg": photo("PNG"), "wrong_extension.png": photo("WEBP")}  # the content decides


@pytest.fixture
def folder(tmp_path):
    folder = write_images(tmp_path / "images", 60, size=(32, 32))
    for name, data in {**BROKEN, **READABLE}.items():
        (folder / name).write_bytes(data)
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "circle.jpg").symlink_to(folder / "circle.jpg")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    return folder


def test_each_kind_is_a_bad_image_with_its_reason(folder):
    source = open_source(str(folder), Config())
    bad = {}
    for index in range(len(source)):
        try:
            source.read(index)
        except BadImage as error:
            bad[os.path.basename(source.name(index))] = str(error)
    assert set(bad) == {*BROKEN, "dangling.jpg", "circle.jpg", "pipe.jpg"}
    assert len(source) == 60 + len(BROKEN) + len(READABLE) + 3  # a folder is none, whatever its name
    assert all(3 < len(reason) <= 200 and "\n" not in reason for reason in bad.values()), bad
    assert "No such file" in bad["dangling.jpg"]
    assert "device" in bad["pipe.jpg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_a_bad_image(folder):
    (folder / "000.png").chmod(0)
    with pytest.raises(BadImage, match="Permission denied"):
        open_source(str(folder), Config()).read(0)


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    write_images(tmp_path, 1)
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(2**40)  # takes no place on the disk
    with pytest.raises(BadImage, match=r"1024\.0 GiB, which is no image"):
        open_source(str(tmp_path), Config()).read(1)


def test_damaged_bytes_never_do_more_than_make_a_bad_image():
    """Flipped bytes and cuts, in every format that is read by another decoder."""
    stream = io.BytesIO()
    tifffile.imwrite(stream, np.zeros((8, 8, 3), np.uint16), photometric="rgb")
    chance = random.Random(0)
    for data in (photo(), photo("PNG"), stream.getvalue(), png16(np.zeros((8, 8, 3), np.uint16))):
        for _ in range(60):
            broken = bytearray(data[: chance.randrange(1, len(data) + 1)] if chance.random() < 0.3 else data)
            for _ in range(3):
                broken[chance.randrange(min(len(broken), 200))] = chance.randrange(256)
            with contextlib.suppress(BadImage):
                assert decode(bytes(broken), 3).shape[0] == 3


def test_a_run_counts_and_names_them_and_goes_on(folder, tmp_path, cli):
    out = tmp_path / "run"
    status, said, error = cli("pretrain", folder, *words("mae", f"out={out}", "bad_ratio=0.3", "epochs=4", "workers=1"))
    assert (status, error) == (0, "")
    listed = (out / "bad_images.txt").read_text()
    named = {os.path.basename(line.split("\t")[0]) for line in listed.splitlines()}
    assert named <= {*BROKEN, "dangling.jpg", "circle.jpg", "pipe.jpg"}
    assert len(named) >= 12
    assert "Cannot read" in said


HOSTILE_NAMES = {
    b"latin-\xe9.png": r"latin-\xe9.png",
    b"two\nlines.png": r"two\nlines.png",
    b"a\ttab.png": r"a\ttab.png",
    b"\x1b]0;title\x07\x1b[31mred.png": r"\x1b]0;title\x07\x1b[31mred.png",
    "back\u202egnp.exe.png".encode(): r"back\u202egnp.exe.png",
}


def test_names_of_any_bytes_are_listed_on_one_line_and_reach_no_terminal(tmp_path, cli):
    folder = write_images(tmp_path / "images", 40, size=(32, 32))
    for name in HOSTILE_NAMES:
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(b"no image")
    out = tmp_path / "run"
    command = ("pretrain", folder, *words("mae", f"out={out}", "bad_ratio=0.3", "epochs=2"))
    status, said, error = cli(*command)
    assert (status, error) == (0, "")
    rows = [line.split("\t") for line in (out / "bad_images.txt").read_text(encoding="utf-8").splitlines()]
    assert {name for name, _ in rows} <= {f"{folder}/{name}" for name in HOSTILE_NAMES.values()}
    assert len(rows) >= 4
    assert {reason for _, reason in rows} == {"cannot identify image file"}
    assert "\x1b" not in said
    status, said, error = cli("data", folder)
    assert (status, error) == (0, "")
    assert "\x1b" not in said
    assert "cannot identify image file" in said
    # The same names are known when the run goes on, whatever an editor has made of the list.
    with (out / "bad_images.txt").open("ab") as file:
        file.write(b"added by hand \xe9\tin Latin-1\n")
    assert cli(*command, "epochs=3")[0] == 0
    again = (out / "bad_images.txt").read_bytes().splitlines()
    assert len({line.split(b"\t")[0] for line in again}) == len(again)


def test_reasons_hold_no_address_of_memory():
    """Else two processes, or two starts, list an image twice."""
    for data in (b"no image", b"II*\0\x08\0\0\0\xff\xff" + bytes(300), b"RIFF\xff\xff\xff\x7fWEBPVP8 " + bytes(300)):
        with pytest.raises(BadImage) as error:
            decode(data, 3)
        assert " at 0x" not in str(error.value)
    assert str(BadImage("seen <_io.BytesIO object at 0x7f00beef> and\x1b[2J\nmore")) == r"seen and\x1b[2J"
    assert str(BadImage(MemoryError())) == "there is not enough memory for it"
