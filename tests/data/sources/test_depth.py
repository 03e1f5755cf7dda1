"""Images of more than 8 bits and more than 3 channels, in every format that has them."""

import io
import shutil
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch

from sslvit.data import BadImage, Config, open_source
from sslvit.data.sources.decode import decode
from sslvit.data.sources.pixels import from_array
from sslvit.errors import UserError
from tests.data.sources.test_sources import assert_workers_agree, write_dicom

DEEP = np.random.default_rng(0).integers(0, 65536, (20, 30, 3)).astype(np.uint16)
FIVE = np.random.default_rng(1).integers(0, 256, (20, 30, 5)).astype(np.uint8)


def png16(values: np.ndarray) -> bytes:
    """[H, W, C] uint16 -> a PNG of 16 bits, which PIL cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    h, w, c = values.shape
    header = struct.pack(">IIBBBBB", w, h, 16, {1: 0, 2: 4, 3: 2, 4: 6}[c], 0, 0, 0)
    rows = b"".join(b"\0" + values[y].astype(">u2").tobytes() for y in range(h))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **options)
    return stream.getvalue()


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def channels_first(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


@pytest.mark.parametrize(
    "data",
    [png16(DEEP), tiff(DEEP, photometric="rgb"),
     tiff(DEEP.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
     tiff(DEEP, photometric="rgb", compression="zlib"), tiff(DEEP, photometric="rgb", bigtiff=True),
     tiff(DEEP, photometric="rgb", byteorder=">"), npy(DEEP), npy(np.asfortranarray(DEEP))],
    ids=["png", "tiff", "planar tiff", "packed tiff", "big tiff", "motorola tiff", "npy", "fortran npy"],
)  # fmt: skip
def test_colour_of_sixteen_bits_keeps_its_depth(data):
    image = decode(data, 3)
    assert image.dtype == torch.float32
    assert torch.equal(image, channels_first(DEEP.astype(np.float32) / 257))


def test_alpha_and_gray_of_sixteen_bits():
    four = np.concatenate([DEEP, DEEP[:, :, :1]], axis=2)
    assert torch.equal(decode(png16(four), 3), decode(png16(DEEP), 3))
    assert torch.equal(decode(png16(four), 4)[3], channels_first(four.astype(np.float32) / 257)[3])
    gray = decode(png16(DEEP), 1)
    expected = DEEP.astype(np.float64) @ [0.299, 0.587, 0.114] / 257
    assert (gray[0].double() - torch.from_numpy(expected)).abs().max() < 1e-3
    two = decode(png16(DEEP[:, :, :2]), 3)  # gray and alpha
    assert torch.equal(two, channels_first(DEEP[:, :, :1].astype(np.float32) / 257).expand(3, -1, -1))


@pytest.mark.parametrize(
    "data",
    [tiff(FIVE, photometric="minisblack", planarconfig="contig"),
     tiff(FIVE.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate"),
     tiff(FIVE.transpose(2, 0, 1), photometric="minisblack"), npy(FIVE), npy(FIVE.transpose(2, 0, 1))],
    ids=["samples", "planes", "pages", "npy", "npy with channels first"],
)  # fmt: skip
def test_five_channels_in_a_file(data):
    image = decode(data, 5)
    assert image.dtype == torch.uint8
    assert torch.equal(image, channels_first(FIVE))


@pytest.mark.parametrize(("in_chans", "have"), [(3, 5), (4, 5), (6, 5), (5, 3)])
def test_channels_that_do_not_fit_are_said(in_chans, have):
    values = FIVE[:, :, :have]
    for data in (tiff(values, photometric="minisblack", planarconfig="contig"), npy(values)):
        with pytest.raises(BadImage, match=f"{have} channels, and data.in_chans={in_chans}"):
            decode(data, in_chans)


def test_pages_are_channels_only_if_they_are_as_many():
    stack = np.stack([np.full((20, 30), value, np.uint8) for value in (10, 20, 30)])
    data = tiff(stack, photometric="minisblack")
    assert decode(data, 3)[:, 0, 0].tolist() == [10, 20, 30]
    assert decode(data, 1)[:, 0, 0].tolist() == [10]  # the first page, as PIL reads such a file
    assert decode(data, 4)[:, 0, 0].tolist() == [10, 10, 10, 255]


def test_a_folder_and_an_archive_of_five_channels(tmp_path):
    (tmp_path / "files").mkdir()
    for i in range(3):
        data = tiff(FIVE + np.uint8(i), photometric="minisblack", planarconfig="contig")
        (tmp_path / "files" / f"{i}.tif").write_bytes(data)
    shutil.make_archive(str(tmp_path / "all"), "zip", tmp_path / "files")
    for word in (tmp_path / "files", f"{tmp_path}/files/*.tif", tmp_path / "all.zip"):
        source = open_source(str(word), Config(in_chans=5))
        assert torch.equal(source.read(2), channels_first(FIVE + np.uint8(2)))


def test_smaller_copies_of_a_page_are_no_channels():
    """Three levels of a pyramid, which PIL reads as the first."""
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as file:
        for level in range(3):
            file.write(np.full((32 >> level, 32 >> level), 10 + level, np.uint8), photometric="minisblack")
    assert decode(stream.getvalue(), 3).shape == (3, 32, 32)
    assert decode(stream.getvalue(), 3).unique().tolist() == [10]


def test_white_is_zero_in_some_tiffs():
    values = np.arange(600, dtype=np.uint16).reshape(20, 30)
    stack = np.stack([values, values])
    image = decode(tiff(stack, photometric="miniswhite"), 2)
    assert torch.equal(image[0], torch.from_numpy((65535 - values.astype(np.float32)) / 257))


def test_what_black_and_white_are_can_be_said():
    """Twelve bits in sixteen, Hounsfield units, reflectance."""
    values = np.array([[0, 2048, 4095, 5000]], dtype=np.uint16)
    assert from_array(values, 1, (0, 4095))[0, 0].tolist() == pytest.approx([0, 2048 / 4095 * 255, 255, 255])
    units = np.array([[-2000, -1000, 0, 1000]], dtype=np.int16)
    assert from_array(units, 1, (-1000, 1000))[0, 0].tolist() == pytest.approx([0, 0, 127.5, 255])
    floats = np.array([[-1.0, 0.25, np.nan, np.inf]], dtype=np.float32)
    assert from_array(floats, 1, (0, 0.5))[0, 0].tolist() == pytest.approx([0, 127.5, 0, 255])
    assert from_array(np.array([[0, 255]], dtype=np.uint8), 1, (0, 10))[0, 0].tolist() == [0, 255]


@pytest.mark.parametrize(
    ("values", "reason"),
    [(np.full((4, 4), 1.5), r"1.5 .. 1.5, not in 0 .. 1"), (np.full((4, 4), np.nan), "it has NaN or infinite pixels"),
     (np.full((4, 4), -3, np.int16), "-3 .. -3, not in 0 .. 65535"), (np.full((4, 4), 70000), "70000"),
     (np.zeros((4, 4), complex), "no numbers"), (np.zeros(4), "no image"), (np.zeros((0, 4)), "no image"),
     (np.zeros((2, 3, 4, 5)), "no image")],
)  # fmt: skip
def test_values_whose_meaning_is_unknown_are_refused(values, reason):
    with pytest.raises(BadImage, match=reason):
        from_array(values, 1)


def test_floats_between_0_and_1_are_images():
    values = np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
    for data in (tiff(values), npy(values)):
        assert torch.equal(decode(data, 1)[0], torch.from_numpy(values * 255))
    assert torch.equal(from_array(values > 0.5, 1)[0], torch.from_numpy((values > 0.5) * np.uint8(255)))


def test_an_array_header_is_not_believed():
    """A file of a hundred bytes that says it holds a terabyte."""
    for shape in ((10**6, 10**6), (4, -4), (3, 3)):
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with pytest.raises(BadImage, match=r"as its header says|million"):
            decode(stream.getvalue() + bytes(16), 1)


@pytest.mark.parametrize("tag", [256, 257, 277])
def test_a_tiff_header_is_not_believed(tag):
    data = bytearray(tiff(DEEP, photometric="rgb"))
    at = next(i for i in range(8, len(data) - 12) if data[i : i + 2] == struct.pack("<H", tag))
    data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, 2**31 - 1)
    with pytest.raises(BadImage):
        decode(bytes(data), 3)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("chans", [1, 5])
def test_deep_arrays_of_many_channels_are_trained_on(dtype, chans, tmp_path):
    values = np.random.default_rng(2).random((9, 20, 30, chans))
    values = (values * 65535).astype(dtype) if dtype == np.uint16 else values.astype(dtype)
    values = values[..., 0] if chans == 1 else values
    np.save(tmp_path / "x.npy", values)
    source = open_source(str(tmp_path / "x.npy"), Config(in_chans=chans))
    scale = 255 if dtype == np.float32 else 1 / 257
    expected = values[4].astype(np.float32) * np.float32(scale)
    assert source.read(4).shape == (chans, 20, 30)
    assert np.allclose(source.read(4).numpy(), expected[None] if chans == 1 else expected.transpose(2, 0, 1))
    assert_workers_agree(source)
    with pytest.raises(UserError, match="the number of channels"):
        open_source(str(tmp_path / "x.npy"), Config(in_chans=6))


def test_the_pages_of_many_files_are_images(tmp_path):
    for folder, count in (("a", 3), ("b", 2)):
        (tmp_path / folder).mkdir()
        stack = np.stack([np.full((20, 30), 1000 * count + page, np.uint16) for page in range(count)])
        tifffile.imwrite(tmp_path / folder / "stack.tif", stack, photometric="minisblack")
    source = open_source(f"pages:{tmp_path}", Config(in_chans=1))
    assert [round(float(source.read(i)[0, 0, 0] * 257)) for i in range(5)] == [3000, 3001, 3002, 2000, 2001]
    assert source.classes == ["a", "b"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    assert source.name(4).endswith("b/stack.tif[1]")
    assert_workers_agree(source)


HU = np.array([[-1000, -500], [0, 1000]], dtype=np.int16)


def dicom(tmp_path, values: np.ndarray, in_chans: int = 1, value_range=None, **more) -> np.ndarray:
    write_dicom(tmp_path / "x.dcm", values, **more)
    return decode((tmp_path / "x.dcm").read_bytes(), in_chans, value_range).numpy()


def test_dicom_is_rescaled_and_windowed(tmp_path):
    stored = (HU + 1024).astype(np.uint16)
    window = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": [0, 40], "WindowWidth": [1000, 400]}
    shown = dicom(tmp_path, stored, **window)
    # PS3.3 C.11.2.1.2.1: ((x - (c - 0.5)) / (w - 1) + 0.5) * 255
    expected = ((HU - (0 - 0.5)) / 999 + 0.5) * 255
    assert np.allclose(shown[0], expected.clip(0, 255), atol=1e-3)
    inverted = dicom(tmp_path, stored, **window, PhotometricInterpretation="MONOCHROME1")
    assert np.allclose(inverted, 255 - shown)
    asked = dicom(tmp_path, stored, value_range=(-1000, 1000), **window)
    assert np.allclose(asked[0], (HU + 1000.0) / 2000 * 255, atol=1e-3)
    exact = dicom(tmp_path, stored, **window, VOILUTFunction="LINEAR_EXACT")
    assert np.allclose(exact[0], ((HU / 1000) + 0.5).clip(0, 1) * 255, atol=1e-3)
    sigmoid = dicom(tmp_path, stored, **window, VOILUTFunction="SIGMOID")
    assert np.allclose(sigmoid[0], 255 / (1 + np.exp(-4 * HU / 1000)), atol=1e-3)


def test_dicom_without_a_window_shows_all_that_its_bits_hold(tmp_path):
    twelve = np.array([[0, 1024], [2048, 4095]], dtype=np.uint16)
    image = dicom(tmp_path, twelve, BitsStored=12, HighBit=11)
    assert np.allclose(image[0], twelve / 4095 * 255, atol=1e-3)
    signed = np.array([[-2048, 0], [0, 2047]], dtype=np.int16)
    image = dicom(tmp_path, signed, BitsStored=12, HighBit=11)
    assert np.allclose(image[0], (signed + 2048.0) / 4095 * 255, atol=1e-3)
    eight = np.arange(4, dtype=np.uint8).reshape(2, 2)
    assert dicom(tmp_path, eight, 3).dtype == np.uint8
    assert np.array_equal(dicom(tmp_path, eight, 3), np.stack([eight] * 3))


def test_dicom_files_that_are_no_image_are_bad_images(tmp_path):
    write_dicom(tmp_path / "x.dcm", HU)
    data = (tmp_path / "x.dcm").read_bytes()
    assert decode(data, 1).shape == (1, 2, 2)
    with pytest.raises(BadImage):
        decode(data[:-4], 1)
    rows = data.index(b"\x28\x00\x10\x00US\x02\x00")
    with pytest.raises(BadImage):
        decode(data[: rows + 8] + b"\xff\xff" + data[rows + 10 :], 1)
    write_dicom(tmp_path / "y.dcm", HU, NumberOfFrames=30000)
    with pytest.raises(BadImage):
        decode((tmp_path / "y.dcm").read_bytes(), 1)
