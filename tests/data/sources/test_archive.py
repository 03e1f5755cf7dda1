import io
import os
import struct
import tarfile
import tracemalloc
import zipfile

import pytest
import torch
from PIL import Image

from sslvit.data import BadImage, Config, open_source
from sslvit.data.sources import archive
from sslvit.data.sources.archive import Ranges
from sslvit.data.sources.folder import Folder
from sslvit.errors import UserError
from tests.conftest import write_images


def png(value: int = 7) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (9, 8), (value, 0, 255 - value)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path, members: dict[str, bytes], **options):
    with tarfile.open(path, "w", **options) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def write_zip(path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def opened(path, **more):
    return open_source(str(path), Config(download_dir=str(path.parent / "cache"), **more))


WRITERS = {"zip": write_zip, "tar": write_tar}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_run_may_go_on_from_an_archive_of_its_folder(kind, labelled, tmp_path):
    """The same names in the same order: the same identity."""
    folder = Folder(labelled / "train", Config())
    members = {f"./train/{name}": (labelled / "train" / name).read_bytes() for name in reversed(list(folder.names))}
    source = opened(WRITERS[kind](tmp_path / f"train.{kind}", members))
    assert source.identity() == folder.identity()
    assert source.classes == folder.classes
    assert all(torch.equal(source.read(i), folder.read(i)) for i in range(len(folder)))


@pytest.mark.parametrize("kind", WRITERS)
def test_names_that_climb_out_are_only_names(kind, tmp_path):
    outside = {name: png(i) for i, name in enumerate(["../../up.png", "/etc/abs.png", "a/../../b.png", "ok.png"])}
    place = tmp_path / "deep" / "deeper"
    place.mkdir(parents=True)
    source = opened(WRITERS[kind](place / f"x.{kind}", outside))
    assert len(source) == 4
    assert {int(source.read(i)[0, 0, 0]) for i in range(4)} == {0, 1, 2, 3}
    assert [path.name for path in tmp_path.rglob("*.png")] == []


@pytest.mark.parametrize("kind", WRITERS)
def test_an_archive_that_changes_changes_the_fingerprint(kind, tmp_path):
    path = WRITERS[kind](tmp_path / f"x.{kind}", {"a.png": png(1), "b.png": png(2)})
    before, fingerprint = opened(path), opened(path).fingerprint()
    assert before.fingerprint() == fingerprint
    WRITERS[kind](path, {"a.png": png(1), "b.png": png(3)})
    os.utime(path, ns=(1, 1))
    after = opened(path)
    assert after.fingerprint() != fingerprint
    assert after.identity() == before.identity()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_rare_packing_is_named(method, tmp_path):
    source = opened(write_zip(tmp_path / "x.zip", {"a.png": png()}, method))
    with pytest.raises(BadImage, match="make the zip with deflate"):
        source.read(0)


def test_files_with_two_names_are_both_there(tmp_path):
    write_tar(tmp_path / "x.tar", {"a.png": png(5)})
    with tarfile.open(tmp_path / "x.tar", "a") as file:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        file.addfile(link)
    source = opened(tmp_path / "x.tar")
    assert [int(source.read(i)[0, 0, 0]) for i in range(2)] == [5, 5]


def test_a_tar_of_links_says_how_to_make_it(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/data/b.png"
        file.addfile(link)
    with pytest.raises(UserError, match="holds 1 links and not the files that they lead to: make it with tar -h"):
        opened(tmp_path / "x.tar")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_packed_tar_is_refused_with_what_to_do(kind, tmp_path):
    with tarfile.open(tmp_path / f"x.tar.{kind}", f"w:{kind}") as file:
        file.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(UserError, match="unpack it, or make a plain"):
        opened(tmp_path / f"x.tar.{kind}")
    renamed = (tmp_path / f"x.tar.{kind}").rename(tmp_path / "x.tar")
    with pytest.raises(UserError, match="unpack it, or make a plain"):
        opened(renamed)


def test_many_shards_need_few_open_files(tmp_path):
    for i in range(archive.OPEN_FILES + 40):
        write_tar(tmp_path / f"{i:03d}.tar", {"0.png": png(i)})
    source = opened(tmp_path / "*.tar")
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    assert [int(source.read(i)[0, 0, 0]) for i in range(len(source))] == list(range(archive.OPEN_FILES + 40))
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + archive.OPEN_FILES


def damaged_tar(path, kind: str):
    write_tar(path, {f"{i}.png": png(i) for i in range(8)})
    data = bytearray(path.read_bytes())
    if kind == "cut in an image":
        data = data[: 5 * 1024 + 512 + 20]
    elif kind == "cut in a header":
        data = data[: 5 * 1024 + 200]
    elif kind == "noise for a header":
        data[3 * 1024 : 3 * 1024 + 512] = os.urandom(512)
    elif kind == "absurd size":
        info = tarfile.TarInfo("a.png")
        info.size = 2**40
        data = bytearray(info.tobuf(tarfile.GNU_FORMAT) + png())
    elif kind == "text":
        data = bytearray(b"this is no archive\n" * 100)
    elif kind == "empty":
        data = bytearray()
    elif kind == "absurd long name":
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**33
        data = bytearray(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    path.write_bytes(data)
    return path


def damaged_zip(path, kind: str):
    write_zip(path, {f"{i}.png": png(i) for i in range(8)})
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    if kind == "no index":
        data = data[:directory]
    elif kind == "cut index":
        data = data[: directory + 60] + data[-22:]
    elif kind == "noise for an index":
        data[directory : directory + 200] = os.urandom(200)
    elif kind == "absurd index size":
        data[-10:-6] = struct.pack("<I", 0xFFFFFFF0)
    elif kind == "empty":
        data = bytearray()
    path.write_bytes(data)
    return path


TARS = ["cut in an image", "cut in a header", "noise for a header", "absurd size", "text", "empty", "absurd long name"]
ZIPS = ["no index", "cut index", "noise for an index", "absurd index size", "empty"]


@pytest.mark.parametrize(("write", "kind"), [(damaged_tar, k) for k in TARS] + [(damaged_zip, k) for k in ZIPS])
def test_a_damaged_archive_is_one_sentence_and_little_memory(write, kind, tmp_path):
    path = write(tmp_path / ("x.tar" if write is damaged_tar else "x.zip"), kind)
    tracemalloc.start()
    with pytest.raises(UserError, match="damaged") as error:
        opened(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"data: {path} is damaged")
    assert str(error.value).count("data: ") == 1  # no error inside another
    assert peak < 50e6


def test_damaged_members_are_bad_images(tmp_path):
    path = write_zip(tmp_path / "x.zip", {f"{i}.png": bytes([i]) * 3000 + png(i) for i in range(4)})
    data = bytearray(path.read_bytes())
    places = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x03\x04"]
    entries = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]
    data[places[0] : places[0] + 4] = b"zzzz"  # no header where the index says
    data[places[1] + 50] ^= 255  # a flipped byte
    data[entries[2] + 24 : entries[2] + 28] = struct.pack("<I", 2**32 - 2)  # unpacks to four gigabytes, it says
    data[entries[3] + 42 : entries[3] + 46] = struct.pack("<I", 2**31)  # begins beyond the end, it says
    path.write_bytes(data)
    source = opened(path)
    for index, reason in enumerate(["damaged", ".", "no image", "ends before"]):
        with pytest.raises(BadImage, match=reason):
            source.read(index)


def test_a_tar_that_shrinks_during_a_run_gives_bad_images(tmp_path):
    path = write_tar(tmp_path / "x.tar", {f"{i}.png": png(i) for i in range(4)})
    source = opened(path)
    os.truncate(path, 1024)
    with pytest.raises(BadImage, match="ends before"):
        source.read(3)


def test_the_index_is_kept_until_the_tar_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "SLOW", -1.0)
    path = write_tar(tmp_path / "x.tar", {f"{i}.png": png(i) for i in range(4)})
    first = opened(path)
    with monkeypatch.context() as patch:
        patch.setattr(archive, "_tar", None)  # not called again
        again = opened(path)
    assert [again.name(i) for i in range(4)] == [first.name(i) for i in range(4)]
    assert torch.equal(again.read(2), first.read(2))
    write_tar(path, {f"{i}.png": png(i) for i in range(5)})
    assert len(opened(path)) == 5
    for kept in (tmp_path / "cache" / "index").iterdir():
        kept.write_bytes(b"damaged")
    assert len(opened(path)) == 5


def test_ranges_end_where_the_file_ends(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    ranges = Ranges([str(tmp_path / "x")])
    assert ranges.read(0, 90, 10) == bytes(range(90, 100))
    assert ranges.read(0, 100, 0) == b""
    for place, size in ((90, 11), (-1, 1), (0, -1), (2**62, 1)):
        with pytest.raises(OSError, match="ends before"):
            ranges.read(0, place, size)


def test_labels_beside_the_images_may_be_missing_for_some(tmp_path):
    path = write_tar(
        tmp_path / "x.tar", {"0.png": png(0), "0.cls": b"dog", "1.png": png(1), "2.png": png(2), "2.cls": b"cat"}
    )
    source = opened(path)
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [1, -1, 0]
    meta = write_tar(tmp_path / "y.tar", {"0.png": png(0), "0.json": b'{"caption": "a dog"}'})
    assert opened(meta).labels is None


def test_damaged_labels_are_said_at_the_start(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"0.png": png(0), "0.cls": b"dog" * 50})
    data = bytearray(path.read_bytes())
    data[data.index(b"0.cls") + 6] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"0\.cls in .*x\.zip cannot be read"):
        opened(path)


def test_backslashes_of_windows_are_folders(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"cat/0.png": png(0), "dog/0.png": png(1)})
    path.write_bytes(path.read_bytes().replace(b"cat/", b"cat\\").replace(b"dog/", b"dog\\"))
    assert opened(path).classes == ["cat", "dog"]


def test_archives_without_images_say_what_they_hold(tmp_path):
    with pytest.raises(UserError, match="it holds 1 other files, for example notes"):
        opened(write_zip(tmp_path / "x.zip", {"notes.txt": b""}))
    with pytest.raises(UserError, match="it holds nothing"):
        opened(write_zip(tmp_path / "x.zip", {}))


def test_a_missing_shard_is_named(tmp_path):
    write_tar(tmp_path / "0.tar", {"0.png": png()})
    with pytest.raises(UserError, match=r"1 files that are not there, the first is .*1\.tar"):
        open_source(f"{tmp_path}/{{0..1}}.tar", Config())


def test_a_folder_of_archives_says_how_to_name_them(tmp_path):
    write_zip(tmp_path / "x.zip", {"a.png": png()})
    with pytest.raises(UserError, match=r"write <folder>/\*\.zip"):
        open_source(str(tmp_path), Config())
    assert len(open_source(f"{tmp_path}/*.zip", Config())) == 1
    write_images(tmp_path / "plain", 1)
    assert len(open_source(f"[{tmp_path}/*.zip,{tmp_path}/plain]", Config())) == 2
