"""`sslvit data`: what a set is like, against sets made to be so."""

import html
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslvit import config
from sslvit.data import Config as DataConfig
from sslvit.data import open_source
from sslvit.settings import look
from sslvit.tools import data_page, data_report
from tests.conftest import TINY, words, write_images
from tests.data.test_broken import BROKEN

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", 40, size=(48, 40))


def found(word, *more: str, **settings) -> data_report.Findings:
    return data_report.examine(config.load([str(word), "image_size=32", *more]), data_report.Config(**settings))


def test_mean_and_deviation_are_those_of_the_pixels(folder):
    source = open_source(str(folder), DataConfig())
    pixels = np.stack([source.read(i).numpy() for i in range(40)]).astype(np.float64) / 255
    one, many = found(folder, "workers=0"), found(folder, "workers=2")
    assert np.allclose(one.mean, pixels.mean(axis=(0, 2, 3)), atol=1e-4)
    assert np.allclose(one.std, pixels.std(axis=(0, 2, 3)), atol=1e-4)
    assert one == many


def test_copies_are_found_whatever_their_name_and_format(folder):
    first = Image.open(folder / "000.png")
    shutil.copy(folder / "000.png", folder / "again.png")
    first.save(folder / "other_format.bmp")
    first.save(folder / "nearly.jpg", quality=80)
    first.resize((80, 96)).save(folder / "larger.png")
    result = found(folder)
    names = [sorted(name.rsplit("/", 1)[1] for name in group) for group in (*result.same, *result.near)]
    assert names == [["000.png", "again.png", "other_format.bmp"], ["000.png", "larger.png", "nearly.jpg"]]


def test_different_images_are_no_copies(folder):
    result = found(folder)
    assert (result.same, result.near, result.flat) == ([], [], [])


def test_scans_that_all_look_alike_are_no_copies(tmp_path):
    """One template and a little of each image's own; and one true copy."""
    generator = np.random.default_rng(0)

    def smooth() -> np.ndarray:
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8))
        return np.array(coarse.resize((64, 64), Image.Resampling.BICUBIC)).astype(float)

    template = smooth()
    for i in range(60):
        Image.fromarray((template + 0.15 * (smooth() - 128)).clip(0, 255).astype(np.uint8)).save(
            tmp_path / f"{i:02d}.png"
        )
    Image.open(tmp_path / "07.png").save(tmp_path / "copy.jpg", quality=90)
    result = found(tmp_path, "in_chans=1")
    assert [sorted(name.rsplit("/", 1)[1] for name in group) for group in result.near] == [["07.png", "copy.jpg"]]


@pytest.mark.parametrize("mirrored", [0.0, 0.5, 1.0])
def test_images_that_have_a_left_and_a_right_side_are_not_to_be_flipped(mirrored, tmp_path, cli):
    """A wedge that is bright on one side, with noise; and the same, of which half are mirrored."""
    generator = np.random.default_rng(0)
    wedge = np.linspace(40, 80, 32)[None, :] * np.linspace(1, 2, 32)[:, None]
    values = wedge + generator.normal(0, 40, (100, 1, 32)) + generator.normal(0, 20, (100, 32, 32))
    turned = generator.uniform(size=100) < mirrored
    values[turned] = values[turned][:, :, ::-1]
    np.save(tmp_path / "images.npy", values.clip(0, 255).astype(np.uint8)[..., None])
    words = [str(tmp_path / "images.npy"), "in_chans=1", "workers=0"]
    one_side = mirrored != 0.5
    sided = data_report.examine(config.load(words), data_report.Config()).sided
    assert (sided > 15) == one_side
    assert (sided < 3) != one_side
    _, out, _ = cli("data", *words)
    assert ("a left and a right side" in out) == one_side
    assert ("flip_prob=0" in out.splitlines()[-1]) == one_side
    assert look.look(config.load(words)).sided == one_side


def test_images_look_alike_if_each_has_another_one_near_it(tmp_path):
    generator = np.random.default_rng(0)
    kinds = generator.normal(0, 40, (5, 8, 8)).repeat(4, 1).repeat(4, 2)
    for name, own, expected in (("alike", 20, 0.9), ("others", 400, 0.3)):
        values = 128 + kinds[np.arange(60) % 5] + generator.normal(0, own, (60, 8, 8)).repeat(4, 1).repeat(4, 2)
        np.save(tmp_path / f"{name}.npy", values.clip(0, 255).astype(np.uint8)[..., None])
        words = [str(tmp_path / f"{name}.npy"), "in_chans=1", "workers=0"]
        correlation = data_report.examine(config.load(words), data_report.Config()).alike
        assert correlation == pytest.approx(expected, abs=0.1)
        assert look.look(config.load(words)).alike == (name == "alike")
    images = np.load(tmp_path / "others.npy")
    np.save(tmp_path / "copies.npy", np.concatenate([images, images, images[:, ::-1] // 2 * 2]))
    words = [str(tmp_path / "copies.npy"), "in_chans=1", "workers=0"]
    found = data_report.examine(config.load(words), data_report.Config())
    assert found.alike < 0.4, "copies do not count"
    assert found.sided < 3


def test_images_of_one_colour_and_broken_ones_are_named(folder):
    for value in (0, 255):
        Image.new("RGB", (40, 48), (value,) * 3).save(folder / f"blank{value}.png")
    for name in ("empty.jpg", "text.jpg"):
        (folder / name).write_bytes(BROKEN[name])
    result = found(folder)
    assert [name.rsplit("/", 1)[1] for name in result.flat] == ["blank0.png", "blank255.png"]
    assert result.broken[0][0].endswith("empty.jpg")
    assert result.broken[0][1] == "the file is empty"
    assert result.near == []  # all that is blank is alike, and said once
    text = "\n".join(data_report.lines(result, config.load([str(folder)]), [str(folder)]))
    assert "broken       2 of 44 (4.55%)" in text
    assert "a run would stop" in text


def test_sizes_formats_and_channels_are_counted(tmp_path):
    for name, mode, size in (
        ("a.png", "L", (10, 20)),
        ("b.png", "RGB", (30, 8)),
        ("c.jpg", "RGB", (10, 20)),
        ("d.gif", "P", (9, 9)),
    ):
        Image.new(mode, size).save(tmp_path / name)
    Image.fromarray(np.full((9, 9), 4095, np.uint16)).save(tmp_path / "e.png")
    result = found(tmp_path)
    assert (result.heights, result.widths, result.sizes) == ([8, 9, 20], [9, 10, 30], 3)
    assert result.formats == {"PNG": 3, "JPEG": 1, "GIF": 1}
    assert result.depths == {"colour": 2, "gray": 1, "palette": 1, "16-bit gray": 1}
    assert result.deep == 1


def test_twelve_bits_in_sixteen_are_noticed(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(generator.integers(0, 4096, (20, 20)).astype(np.uint16)).save(tmp_path / f"{i}.png")
    run = config.load([str(tmp_path), "in_chans=1", "image_size=32"])
    text = "\n".join(data_report.lines(data_report.examine(run, data_report.Config()), run, [str(tmp_path)]))
    assert "  12-bit values in deeper files: the brightest pixel is 15.9 of 255, nearly black. data.value_range" in text
    (suggested,) = re.findall("sslvit pretrain (.*)", text)
    assert "'value_range=[0,4095]'" in suggested
    mean = re.findall(r"data.mean=\[(.*?)\]", suggested)
    assert float(mean[0]) == pytest.approx(0.5, abs=0.02)  # of the images as they will be read
    ranged = config.load([str(tmp_path), "in_chans=1", "image_size=32", "value_range=[0,4095]"])
    assert data_report.examine(ranged, data_report.Config()).mean[0] == pytest.approx(0.5, abs=0.02)


def test_a_sample_is_chosen_by_the_seed_and_said(folder):
    result = found(folder, sample=10)
    assert (result.count, result.examined) == (40, 10)
    assert result == found(folder, sample=10)
    assert result.mean != found(folder, "seed=1", sample=10).mean
    text = data_report.lines(result, config.load([str(folder)]), [str(folder)])
    assert "examined 10 of them" in text[1]


@pytest.mark.parametrize("kind", ["npy", "several"])
def test_sources_that_are_no_files_are_examined_too(kind, folder, tmp_path, labelled):
    if kind == "npy":
        np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (5, 9, 9), dtype=np.uint8))
        result = found(tmp_path / "x.npy", "in_chans=1")
        assert result.formats == {"Array": 5}
    else:
        result = found(f"[{folder},{labelled / 'train'}]")
        assert result.formats == {"PNG": 76}
        assert (result.unlabelled, result.classes) == (40, {"class0": 12, "class1": 12, "class2": 12})


def test_the_command_it_suggests_is_understood_by_pretrain(folder, cli, tmp_path):
    status, said, error = cli("data", folder, f"report={tmp_path / 'r.json'}")
    assert (status, error) == (0, "")
    import shlex

    line = next(line for line in said.splitlines() if line.strip().startswith("sslvit pretrain"))
    suggested = config.load(shlex.split(line)[2:])
    assert suggested.data.image_size == 32  # for images of 48 x 40
    assert suggested.data.mean == pytest.approx(json.loads((tmp_path / "r.json").read_text())["mean"], abs=1e-4)
    config.make_plan(suggested, 40, 1, 0)


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_the_picture_shows_images_crops_and_masks(method, folder, cli, tmp_path):
    picture = tmp_path / "picture.png"
    status, _, error = cli("data", folder, *words(method), f"picture={picture}")
    assert (status, error) == (0, "")
    pixels = np.array(Image.open(picture))
    assert pixels.std() > 30
    gray = (pixels == 128).all(axis=2).mean()
    assert gray > 0.02 if method == "mae" else gray < 0.005  # what is hidden
    again = tmp_path / "again.png"
    cli("data", folder, *words(method), f"picture={again}")
    assert picture.read_bytes() == again.read_bytes()


def test_a_picture_of_the_users_is_not_overwritten(folder, cli, fails, tmp_path):
    theirs = tmp_path / "holiday.png"
    Image.new("RGB", (8, 8)).save(theirs)
    before = theirs.read_bytes()
    assert "was not drawn by sslvit" in fails("data", folder, *TINY, f"picture={theirs}")
    assert theirs.read_bytes() == before


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["picture=/no/such/folder/x.png"], "there is no folder"),
        (["picture=x.jpg"], "must end in .png"),
        (["sample=-1"], "sample=-1 must be 0 or above"),
        (["sampel=3"], "There is no key sampel"),
        (["mean=[0.5]"], "data.mean has 1 numbers"),
    ],
)
def test_mistakes_are_one_sentence_before_the_work(fails, folder, more, expected):
    assert expected in fails("data", folder, *TINY, *more)


def test_a_set_of_broken_images_is_reported_and_not_drawn(tmp_path, cli, fails):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, data in BROKEN.items():
        (folder / name).write_bytes(data)
    status, said, _ = cli("data", folder)
    assert status == 0
    assert f"{len(BROKEN)} of {len(BROKEN)} (100.00%)" in said
    assert "none of the images tried can be read" in fails("data", folder, f"picture={tmp_path / 'x.png'}")


@pytest.mark.parametrize(
    "given", [[], ["in_chans=1"], ["method=dino", "steps=20"], ["epochs=4"], ["mae_cifar10"], ["batch_size=4"]]
)
def test_the_suggested_command_is_one_that_runs(given, folder):
    words = [str(folder), *given]
    if given == ["mae_cifar10"]:
        words[1] = str(ROOT / "configs" / "mae_cifar10.yaml")
    run = config.load(words)
    text = data_report.lines(data_report.examine(run, data_report.Config(sample=10)), run, words)[-1]
    suggested = config.load(shlex.split(text)[2:])
    config.check(suggested)
    config.make_plan(suggested, 40, 1, 0)


def test_floats_far_below_1_are_noticed_and_nan_is_broken(tmp_path):
    values = np.random.default_rng(0).random((20, 9, 9), dtype=np.float32) / 20
    values[3, 3, 3] = np.nan
    np.save(tmp_path / "x.npy", values)
    result = found(tmp_path / "x.npy", "in_chans=1")
    assert result.value_range == (0.0, 0.05)
    assert [reason.split(":")[0] for _, reason in result.broken] == ["it has NaN or infinite pixels"]


def test_the_page_shows_what_was_found_and_escapes_names(folder, cli, fails, tmp_path):
    shutil.copy(folder / "000.png", folder / "<img src=x>.png")
    Image.open(folder / "001.png").resize((80, 96)).save(folder / "larger.png")
    Image.new("RGB", (48, 40), (250, 20, 20)).save(folder / "red.png")
    (folder / "<script>alert(1).jpg").write_bytes(BROKEN["text.jpg"])
    page = tmp_path / "data.html"
    status, said, error = cli("data", folder, *TINY, "data.workers=0", f"out={page}")
    assert (status, error) == (0, "")
    text = page.read_text()
    for title in ("Some images", "What an encoder gets of them", "The same pixels", "Nearly the same", "One colour"):
        assert f"<h2>{title}</h2>" in text
    assert "&lt;script&gt;alert(1).jpg" in text
    assert text.count("<script") == 2
    assert "<img src=x>" not in text
    command = next(line.strip() for line in said.splitlines() if "sslvit pretrain" in line)
    assert html.escape(command) in text
    assert "out=" not in command
    (tmp_path / "mine.html").write_text("<p>mine")
    assert "is no report of sslvit" in fails("data", folder, *TINY, f"out={tmp_path / 'mine.html'}")


def test_dark_images_of_12_bits_are_not_of_one_colour_and_channels_are_named(cli, tmp_path):
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 1200, (12, 6, 6))
    deep = np.kron(coarse, np.ones((1, 8, 8))).astype(np.uint16)
    deep[:, 0, 0] = 4095  # 16 of 255; the deviation is 1.3
    for name, pixels in [*enumerate(deep), ("flat", np.full((48, 48), 900, np.uint16))]:
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    page = tmp_path / "data.html"
    arguments = "method=mae", "image_size=32", "data.workers=0"
    status, said, _ = cli("data", tmp_path, *arguments, f"out={page}")
    assert (status, "one colour   1 of 13" in said) == (0, True)
    assert "nearly black here, as an encoder would get them" in page.read_text()
    np.save(tmp_path / "five.npy", generator.integers(0, 256, (9, 40, 40, 5), dtype=np.uint8))
    assert cli("data", tmp_path / "five.npy", *arguments, "in_chans=5", f"out={page}")[0] == 0
    assert "All that can be read. The first three of their 5 channels, as red, green and blue." in page.read_text()


def test_outliers_are_named_with_what_makes_them_so(folder):
    odd = np.array(Image.open(folder / "000.png").resize((20, 400)))
    odd[..., 2] = odd[..., 2] // 4  # little blue, which is less than it is narrow
    Image.fromarray(odd).save(folder / "odd.png")
    source, stats, _ = data_report.look(config.load([str(folder), "image_size=32"]), data_report.Config())
    (index, why), *_ = data_page.outliers(stats)
    assert source.name(index).endswith("odd.png")
    assert why == "narrow: width to height 0.05, usually 0.83"
