import io
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from sslvit.data.sources import decode as decode_module
from sslvit.data.sources.decode import BadImage, decode
from sslvit.data.sources.limits import MAX_PIXELS

COARSE = np.random.default_rng(0).integers(40, 216, (4, 5, 3), dtype=np.uint8)
PIXELS = np.array(Image.fromarray(COARSE).resize((30, 20), Image.Resampling.BILINEAR))
HOLDS = {"PNG": "RGB L P RGBA", "JPEG": "RGB L CMYK", "BMP": "RGB L P RGBA", "WEBP": "RGB L P RGBA CMYK",
         "TIFF": "RGB L P RGBA CMYK", "GIF": "RGB L P RGBA"}  # fmt: skip


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def reference(image: Image.Image, mode: str) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image.convert(mode)))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4])
@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in HOLDS.items() for mode in modes.split()])
def test_every_mode_becomes_what_in_chans_asks_for(mode, kind, in_chans):
    data = encoded(Image.fromarray(PIXELS).convert(mode), kind)
    image = decode(data, in_chans)
    assert image.shape == (in_chans, 20, 30)
    assert image.dtype == torch.uint8
    expected = reference(Image.open(io.BytesIO(data)), {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[in_chans])
    assert (image.int() - expected.int()).abs().max() <= 2  # libjpeg's gray and PIL's round differently


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_depth(kind, in_chans):
    values = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    image = decode(encoded(Image.fromarray(values), kind), in_chans)
    assert image.dtype == torch.float32
    assert image.shape == (in_chans, 20, 30)
    assert image[0].min() == 0
    assert image[0].max() == 255
    assert len(image[0].unique()) == 600


def test_transparency_of_a_palette_does_not_disturb():
    image = Image.fromarray(PIXELS).convert("P")
    data = encoded(image, "PNG", transparency=int(np.array(image)[0, 0]))
    assert decode(data, 3).shape == (3, 20, 30)
    assert decode(data, 4)[3].min() == 0


PHOTO = encoded(Image.fromarray(PIXELS).resize((200, 150)), "JPEG", quality=90)
BROKEN = {
    "empty": b"",
    "zero bytes": bytes(5000),
    "text": b"this is no image\n" * 20,
    "jpeg cut in half": PHOTO[: len(PHOTO) // 2],
    "jpeg header only": PHOTO[:100],
    "jpeg without its end": PHOTO[:-200],
    "jpeg magic and noise": b"\xff\xd8\xff" + np.random.default_rng(0).bytes(3000),
    "png cut in half": (png := encoded(Image.fromarray(PIXELS), "PNG"))[: len(png) // 2],
    "png with a flipped byte": png[:60] + bytes([png[60] ^ 255]) + png[61:],
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "float tiff": encoded(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_broken_files_are_bad_images_with_a_short_reason(name, in_chans):
    with pytest.raises(BadImage) as error:
        decode(BROKEN[name], in_chans)
    assert 3 < len(str(error.value)) <= 200
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_small_file_that_claims_a_huge_picture_is_refused_before_it_is_decoded(in_chans):
    side = (65000).to_bytes(2, "big")
    at = PHOTO.index(b"\xff\xc0")
    with pytest.raises(BadImage, match="million"):
        decode(PHOTO[: at + 5] + side + side + PHOTO[at + 9 :], in_chans)
    assert MAX_PIXELS < 65000**2
    header = encoded(Image.new("1", (14_000, 14_000)), "PNG")
    with pytest.raises(BadImage, match="million"):
        decode(header, in_chans)


def test_more_channels_than_a_file_can_have_are_refused():
    with pytest.raises(BadImage, match="in_chans=5"):
        decode(PHOTO, 5)


EXIF = Image.Exif()
EXIF[274] = 6  # to be turned by a quarter
JPEGS = {
    "gray": ({}, "L"), "CMYK": ({}, "CMYK"), "4:4:4": ({"subsampling": 0}, "RGB"), "4:2:2": ({"subsampling": 1}, "RGB"),
    "4:2:0": ({"subsampling": 2}, "RGB"), "progressive": ({"progressive": True}, "RGB"),
    "RGB": ({"keep_rgb": True}, "RGB"), "restarts": ({"restart_marker_blocks": 2}, "RGB"),
    "turned by EXIF": ({"exif": EXIF}, "RGB"),
}  # fmt: skip


@pytest.mark.parametrize("size", [(200, 150), (37, 29), (1, 1)])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_of_any_kind_has_pils_pixels(kind, size):
    options, mode = JPEGS[kind]
    data = encoded(Image.fromarray(PIXELS).resize(size, Image.Resampling.BICUBIC).convert(mode), "JPEG", **options)
    assert torch.equal(decode(data, 3), reference(Image.open(io.BytesIO(data)), "RGB"))


def test_a_jpeg_that_pil_can_read_is_read_though_it_has_a_fault():
    """Two bytes too many before a marker: libjpeg warns, and then simplejpeg refuses the file."""
    data = encoded(Image.fromarray(PIXELS).resize((200, 150)), "JPEG", restart_marker_blocks=2)
    data = data.replace(b"\xff\xd3", b"\1\2\xff\xd3", 1)
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(data)
    assert torch.equal(decode(data, 3), reference(Image.open(io.BytesIO(data)), "RGB"))


@pytest.mark.parametrize("pool", [ThreadPoolExecutor, partial(ProcessPoolExecutor, mp_context=get_context("fork"))])
def test_threads_and_forked_processes_decode_alike(pool):
    files = [encoded(Image.fromarray(PIXELS).resize((40 + i, 90)), "JPEG") for i in range(24)]
    expected = [decode(data, 3) for data in files]
    with pool(3) as running:
        assert all(
            torch.equal(a, b) for a, b in zip(expected, running.map(partial(decode, in_chans=3), files), strict=True)
        )


def test_deprecations_on_the_way_are_not_hidden(monkeypatch):
    def deprecated(*_) -> torch.Tensor:
        warnings.warn("going away", DeprecationWarning, stacklevel=2)
        return torch.zeros(3, 1, 1)

    monkeypatch.setattr(decode_module, "from_pil", deprecated)
    with pytest.warns(DeprecationWarning, match="going away"):
        decode(png, 3)
