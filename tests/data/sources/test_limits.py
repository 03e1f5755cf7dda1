"""Files made to take memory, time or other files: each is refused with a sentence, and large honest ones are read."""

import io
import json
import os
import re
import resource
import struct
import tracemalloc
import zipfile
import zlib

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from sslvit.data import BadImage, Config, open_source
from sslvit.data.sources import limits, parquet
from sslvit.data.sources.decode import decode
from sslvit.data.sources.dicom import DEFLATED
from sslvit.data.sources.pixels import from_array
from sslvit.data.sources.syntax import expanded
from sslvit.errors import UserError
from tests import processes
from tests.data.sources.test_archive import png, write_tar, write_zip
from tests.data.sources.test_sources import write_dicom

MIB = 2**20


def hdf5(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, options in datasets.items():
            file.create_dataset(name, **options)
    return path


def packed(path, name: str, size: int):
    """A zip with so many zeros, which take a thousandth."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open(name, "w", force_zip64=True) as member:
        if name.endswith(".npy"):
            header = {"descr": "|u1", "fortran_order": False, "shape": (size // 4096, 64, 64)}
            np.lib.format.write_array_header_1_0(member, header)
        for _ in range(size // MIB):
            member.write(bytes(MIB))
    return path


def tiff_with_a_bomb(size: int) -> bytes:
    """A TIFF of 8x8 pixels whose only strip becomes `size` zeros."""
    strip, stream = zlib.compress(bytes(size)), io.BytesIO()
    tifffile.imwrite(stream, np.zeros((8, 8, 3), np.uint16), photometric="rgb", compression="zlib", rowsperstrip=8)
    data = bytearray(stream.getvalue())
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tags = file.pages[0].tags
        for code, value in ((273, len(data)), (279, len(strip))):
            data[tags[code].valueoffset : tags[code].valueoffset + 4] = struct.pack("<I", value)
    return bytes(data) + strip


def deflated_dicom(path, size: int):
    """A DICOM file that is deflated as a whole, with so many zeros at its end."""
    write_dicom(path, np.zeros((4, 4), np.uint8))
    data = path.read_bytes()
    start = 144 + int.from_bytes(data[140:144], "little")
    syntax = data.index(b"1.2.840.10008.1.2", 144)
    old = int.from_bytes(data[syntax - 2 : syntax], "little")
    head = data[: syntax - 2] + struct.pack("<H", len(DEFLATED)) + DEFLATED + data[syntax + old : start]
    head = head[:140] + struct.pack("<I", len(head) - 144) + head[144:]
    packer = zlib.compressobj(wbits=-15)
    path.write_bytes(head + packer.compress(data[start:] + bytes(size)) + packer.flush())
    return path


def hostile(folder) -> dict[str, str]:
    """{a spec: what its refusal says}."""
    Image.new("RGB", (9, 9)).save(folder / "a.png")
    (folder / "bomb.tif").write_bytes(tiff_with_a_bomb(70 * MIB))
    large = {"shape": (1, 9000, 19000, 3), "dtype": "u1", "chunks": (1, 9000, 19000, 3), "compression": "gzip"}
    hdf5(folder / "nothing.h5", images={"shape": (1, 9000, 19000, 3), "dtype": "u1"})
    hdf5(folder / "large.h5", images={**large, "shape": (1, 40000, 40000, 3)})
    hdf5(folder / "chunks.h5", images={**large, "shape": (300_000, 64, 64), "chunks": (300_000, 64, 64)})
    for name in ("chunks", "large"):
        with h5py.File(folder / f"{name}.h5", "a") as file:
            place = (0,) * file["images"].ndim
            file["images"].id.write_direct_chunk(place, zlib.compress(bytes(99)))
    hdf5(folder / "labels.h5", images={"data": np.zeros((3, 8, 8), "u1")},
         labels={"shape": (10**9,), "dtype": "i8", "chunks": (2**20,), "compression": "gzip"})  # fmt: skip
    with h5py.File(folder / "labels.h5", "a") as file:
        file["labels"][0] = 1
    hdf5(folder / "source.h5", images={"data": np.zeros((3, 8, 8), "u1")})
    with h5py.File(folder / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout((3, 8, 8), "u1")
        layout[:] = h5py.VirtualSource(str(folder / "source.h5"), "images", (3, 8, 8))
        file.create_virtual_dataset("images", layout)
    hdf5(folder / "external.h5", images={"shape": (1, 8, 8), "dtype": "u1", "external": [("/etc/passwd", 0, 64)]})
    with h5py.File(folder / "link.h5", "w") as file:
        file["images"] = h5py.ExternalLink(str(folder / "source.h5"), "images")
    deflated_dicom(folder / "d.dcm", 70 * MIB)
    (folder / "deflated").mkdir()
    os.replace(folder / "d.dcm", folder / "deflated" / "d.dcm")
    deep = write_zip(folder / "json.zip", {"0.png": png(), "0.json": b"[" * 100_000})
    return {
        f"{packed(folder / 'x.npz', 'x.npy', 258 * MIB)}": "would become 258.0 MiB",
        f"{packed(folder / 'x.zip', 'a.png', 70 * MIB)}": "would become 70.0 MiB",
        f"{folder / 'bomb.tif'}": "becomes more than 64.0 MiB",
        f"{folder / 'nothing.h5'}": "announced and never written",
        f"{folder / 'large.h5'}": "SSLVIT_MAX_PIXELS",
        f"{folder / 'chunks.h5'}": "has chunks of 1.1 GiB",
        f"{folder / 'labels.h5'}": "one whole number for each of the 3 images",
        f"{folder / 'virtual.h5'}": "lies in other files, which is refused",
        f"{folder / 'external.h5'}": "lies in other files, which is refused",
        f"{folder / 'link.h5'}:images": "lies in other files, which is refused|too many links",
        f"{folder / 'deflated'}": "become more than 64.0 MiB",
        f"{deep}": "",
        f"{write_tar(folder / 'long.tar', {'0.png': png(), '0.cls': b'9' * 5000})}": "",
        f"{folder}/{{0..999}}{{0..999}}{{0..999}}.tar": "that is no list of files",
    }


def read_all(folder: str, specs: list[str]) -> int:
    """Open each source under a limit of memory, and write what it says. Runs in a process of its own."""
    said = {}
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for spec in specs:
        said[spec] = ""
        try:
            source = open_source(spec, Config(download_dir=folder))
            for index in range(min(2, len(source))):
                source.read(index)
        except (UserError, BadImage) as error:
            said[spec] = str(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    with open(os.path.join(folder, "said.json"), "w", encoding="utf-8") as file:
        json.dump({"said": said, "peak": peak / 1024}, file)
    return 0


def test_hostile_files_are_refused_in_little_memory(tmp_path):
    expected = hostile(tmp_path)
    log = tmp_path / "log"
    processes.finish(processes.begin(read_all, str(tmp_path), [*expected], output=log), log)
    found = json.loads((tmp_path / "said.json").read_text())
    wrong = {s: found["said"][s] for s, text in expected.items() if not re.search(text or "^$", found["said"][s])}
    assert wrong == {}
    assert found["peak"] < 400, "MiB"


def test_an_image_of_more_than_eight_bits_takes_little_more_than_itself():
    values = np.zeros((3000, 1000, 3), np.uint16)
    for value_range in (None, (0.0, 9.0)):
        tracemalloc.start()
        image = from_array(values, 3, value_range)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.6 * image.numel() * 4
    with pytest.raises(
        BadImage, match=r"10000x10000 pixels of 3 numbers take 1\.1 GiB, more than 1\.0 GiB: raise SSLV"
    ):
        from_array(np.broadcast_to(np.uint16(0), (10000, 10000, 3)), 3)


def test_the_limit_is_raised_by_the_environment_and_by_nothing_else(monkeypatch):
    monkeypatch.setenv("SSLVIT_MAX_PIXELS", "600000000")
    assert limits.limit("SSLVIT_MAX_PIXELS", 5) == 600_000_000
    monkeypatch.setenv("SSLVIT_MAX_PIXELS", "many")
    with pytest.raises(UserError, match="SSLVIT_MAX_PIXELS=many in the environment is not a whole number above 0"):
        limits.limit("SSLVIT_MAX_PIXELS", 5)


def test_a_jpeg_with_thousands_of_scans_is_refused():
    stream = io.BytesIO()
    Image.new("L", (2000, 1500)).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    decode(data, 3)
    with pytest.raises(BadImage, match="more than 200 scans"):
        decode(data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 300 + data[-2:], 3)


def test_data_sets_that_pack_well_are_read(tmp_path):
    """As dSprites, which is black and white: 3 GB in 26 MB."""
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((9000, 64, 64), np.uint8), labels=np.zeros(9000, int))
    assert len(open_source(f"{tmp_path}/x.npz:images", Config())) == 9000
    hdf5(tmp_path / "x.h5", images={"data": np.zeros((900, 64, 64), "u1"), "compression": "gzip"},
         labels={"data": np.repeat([5, -1, 12], 300), "compression": "gzip"})  # fmt: skip
    source = open_source(f"{tmp_path}/x.h5", Config())
    assert (source.classes, source.labels[::300].tolist()) == (["5", "12"], [0, -1, 1])
    sparse = tmp_path / "x.npy"
    with sparse.open("wb") as file:  # larger than the memory, and mapped
        header = {"descr": "|u1", "fortran_order": False, "shape": (2**18, 512, 512, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2**18 * 512 * 512 * 3)
    assert open_source(str(sparse), Config()).read(2**18 - 1).shape == (3, 512, 512)


def test_a_parquet_file_of_one_image_many_times_does_not_fill_the_disk(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(parquet, "AT_ONCE", 2**20)
    monkeypatch.setattr(limits, "MAX_RATIO", 10)
    table = pyarrow.table({"image": pyarrow.array([png() + bytes(20_000)] * 2000).dictionary_encode().cast("binary")})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", compression="zstd")
    with pytest.raises(UserError, match="would become more than"):
        open_source(str(tmp_path / "x.parquet"), Config(download_dir=str(tmp_path / "cache")))
    assert list((tmp_path / "cache" / "parquet").iterdir()) == []


@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x.zip", "x.tar", "x.parquet", "x.npy", "x.npz", "x.h5", "x.tif"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_refused_where_a_file_is_expected(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    for spec in (f"{path}", f"{tmp_path}/*{path.suffix}", f"pages:{tmp_path}" if name == "x.tif" else f"[{path}]"):
        with pytest.raises((UserError, BadImage), match="device"):
            open_source(spec, Config(download_dir=str(tmp_path))).read(0)
    if name == "x.npy":
        np.save(tmp_path / "y.npy", np.zeros((2, 8, 8), np.uint8))
        os.mkfifo(tmp_path / "y.labels.npy")
        with pytest.raises(UserError, match=r"y\.labels\.npy is a pipe or a device"):
            open_source(f"{tmp_path}/y.npy", Config())


def test_a_list_of_somebody_else_makes_images_of_images_only(tmp_path):
    """What a list or a link names is decoded as an image or refused: the reason says nothing of what is in the file."""
    (tmp_path / "secret.txt").write_text("password: 12345")
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "list.txt").write_bytes(
        b"a.png\nb.png\n/etc/passwd\n/dev/zero\n/proc/self/environ\nz\0ero\n" + b"n" * 300
    )
    source = open_source(f"{tmp_path}/list.txt", Config())
    reasons = []
    for index in range(1, len(source)):
        with pytest.raises(BadImage) as error:
            source.read(index)
        reasons.append(str(error.value))
    assert reasons == ["cannot identify image file"] * 2 + [
        "it is a device, not a file", "the file is empty", "embedded null byte", "File name too long",
    ]  # fmt: skip


def test_braces_stand_for_a_million_names_at_most():
    assert len(expanded("{0..9}{a,b}")) == 20
    with pytest.raises(UserError, match="stands for"):
        expanded("{0..999}{0..9999}")


def test_links_in_archives_lead_nowhere(tmp_path):
    import tarfile

    (tmp_path / "outside.png").write_bytes(png())
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("in.png")
        info.size = len(png())
        tar.addfile(info, io.BytesIO(png()))
        for name, kind in (("s.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "outside.png")
            tar.addfile(info)
    assert [*open_source(f"{tmp_path}/x.tar", Config()).names] == ["in.png"]
    inner = write_zip(tmp_path / "inner.zip", {"a.png": png()})
    nested = write_zip(tmp_path / "nested.zip", {"inner.zip": inner.read_bytes()})
    with pytest.raises(UserError, match="no images"):
        open_source(str(nested), Config())
