"""`sslvit search`: against loops written from the definitions, as a command, and with files of somebody else."""

import csv
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sslvit.tools import near, search
from tests.conftest import write_images

from .test_embed import command


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """20 images in two class folders, a broken one between them, and in the second a copy of the image a/003."""
    root = tmp_path_factory.mktemp("photos")
    write_images(root / "a", 12)
    write_images(root / "b", 7, seed=1)
    (root / "a" / "005.png").write_bytes(b"no image")
    (root / "a" / "012.png").write_bytes((root / "a" / "000.png").read_bytes())
    shutil.copy(root / "a" / "003.png", root / "b" / "copy.png")
    return root


@pytest.fixture(scope="module")
def made(photos, tmp_path_factory) -> Path:
    """A folder with vectors of these in each form."""
    from tests.processes import main

    folder = tmp_path_factory.mktemp("made")
    for name, dtype in (("v.faiss", "float32"), ("h.faiss", "float16"), ("v.npy", "float16"), ("v.parquet", "float32")):
        assert main(command(photos, folder / name, f"dtype={dtype}", "batch_size=8")) == 0
    return folder


@pytest.fixture
def index(made, tmp_path) -> Path:
    """A copy, to change as a stranger would."""
    for name in ("v.faiss", "v.npy"):
        for path in made.glob(f"{name}*"):
            shutil.copy(path, tmp_path)
    return tmp_path / "v.faiss"


def change(index: Path, **values) -> None:
    record = index.with_name(f"{index.name}.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | values))


def table(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open()))


@pytest.mark.parametrize("form", ["v.faiss", "h.faiss", "v.npy", "v.parquet"])
def test_an_image_finds_itself_and_its_copy_in_every_form(cli, made, photos, tmp_path, form):
    image, out, picture = photos / "a" / "003.png", tmp_path / "near.csv", tmp_path / "near.png"
    status, text, error = cli("search", f"index={made / form}", f"image={image}", "k=3", f"out={out}",
                              f"picture={picture}")  # fmt: skip
    assert status == 0, error
    assert text.splitlines()[1].split() == ["1.000", "a", "a/003.png"]
    assert text.splitlines()[2].split() == ["1.000", "b", "b/copy.png"]
    rows = table(out)
    assert [row["path"] for row in rows[:2]] == [str(image), str(photos / "b" / "copy.png")]
    assert float(rows[2]["similarity"]) < 0.9999
    assert Image.open(picture).size == (404, 120)  # one row of four cells with their captions


def test_copies_are_one_group_and_the_subset_does_not_take_both(cli, made, photos, tmp_path):
    out = tmp_path / "found.csv"
    status, text, error = cli("search", f"index={made / 'v.faiss'}", "duplicates=0.9999", f"out={out}")
    assert status == 0, error
    assert "4 of 20 images are in 2 groups" in text
    assert "1 of the groups have images of several labels" in text
    assert [(row["group"], Path(row["path"]).name) for row in table(out)] == [
        ("1", "000.png"), ("1", "012.png"), ("2", "003.png"), ("2", "copy.png"),
    ]  # fmt: skip
    assert (made / "v.faiss.png").is_file()
    text = cli("search", f"index={made / 'v.faiss'}", "subset=20", f"out={out}", "picture=null")[1]
    assert "18 of 20 images" in text
    assert "All others are the same as one of these." in text
    # What is written is a source of images.
    assert cli(*command(out, tmp_path / "again.npy"))[0] == 0
    assert len(np.load(tmp_path / "again.npy")) == 18
    assert "No two of the 18 images" in cli("search", f"index={tmp_path / 'again.npy'}", "duplicates=0.9999")[1]


@pytest.mark.parametrize("most", [2**22, 7])
@pytest.mark.parametrize("tile", [(1024, 2**14), (5, 11)])
def test_groups_are_those_of_a_search_from_image_to_image(monkeypatch, tile, most):
    monkeypatch.setattr(near, "TILE", tile)
    monkeypatch.setattr(near, "MOST_PAIRS", most)
    vectors = F.normalize(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    groups = near.near_groups(vectors, 0.97)
    linked = vectors @ vectors.T >= 0.97
    first = np.arange(60)
    for rows in groups:
        assert len(rows) > 1
        first[rows] = rows.min()
    for row in range(60):
        reached, waiting = {row}, [row]
        while waiting:
            for other in linked[waiting.pop()].nonzero().flatten().tolist():
                if other not in reached:
                    reached.add(other)
                    waiting.append(other)
        assert first[row] == min(reached)
    assert 1 < len(set(first)) < 60


def test_centres_are_those_of_the_greedy_rule_and_cover_better_than_chance():
    vectors = F.normalize(torch.randn(500, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    chosen, nearest = search.k_centres(vectors, 40)
    assert chosen[0] == int((vectors @ vectors.sum(dim=0)).argmax())
    for count in range(1, 40):
        assert chosen[count] == int((vectors @ vectors[chosen[:count]].T).amax(dim=1).argmin())
    assert torch.allclose(nearest, (vectors @ vectors[chosen].T).amax(dim=1), atol=1e-6)
    drawn = torch.randperm(500, generator=torch.Generator().manual_seed(1))[:40]
    assert nearest.min() > (vectors @ vectors[drawn].T).amax(dim=1).min() + 0.05


def test_wrong_questions_are_one_sentence(fails, index, photos, tmp_path):
    made, index = index, f"index={index}"
    assert "Give one of image=" in fails("search", index)
    assert "Give one of image=" in fails("search", index, "subset=3", "duplicates=0.9")
    assert "subset=21 is more than the 20 images" in fails("search", index, "subset=21")
    assert "must end in one of" in fails("search", "index=v.txt", "subset=3")
    assert fails("search", f"index={tmp_path / 'no.npy'}", "subset=3").startswith("sslvit search: There is no")
    assert "image=nowhere.jpg is not there" in fails("search", index, "image=nowhere.jpg", "picture=null")
    assert "out=x.txt must be a .csv file" in fails("search", index, "subset=3", "out=x.txt")
    change(made, weights="of another run")
    assert "has not the weights" in fails("search", index, f"image={photos}")


def test_files_of_somebody_else_are_refused_in_one_sentence(fails, index, made):
    words = ["search", f"index={index}", "duplicates=0.9"]
    content = index.read_bytes()
    for bad in (b"", content[:-1], content + b"x", b"IwFl" + content[4:], content[:8] + struct.pack("<q", 2**39),
                content[:4] + struct.pack("<i", 2**30) + content[8:]):  # fmt: skip
        index.write_bytes(bad)
        assert "is damaged or not what sslvit embed writes" in fails(*words)
    index.write_bytes(content[:-4] + struct.pack("<f", float("nan")))
    assert "no finite numbers" in fails(*words)
    index.write_bytes(content)
    for record in ("[" * 10**5, "[]", '{"evaluation": "embed", "results": {"images": "x", "unreadable": []}}', "\0"):
        index.with_name("v.faiss.json").write_text(record)
        assert "is damaged or not what sslvit embed writes" in fails(*words)
    shutil.copy(made / "v.faiss.json", index.parent)
    index.with_name("v.faiss.csv").write_text("path,label\na,b\n")
    assert "has 20 vectors and 1 paths" in fails(*words)
    pickled = index.with_name("v.npy")
    np.save(pickled, np.array([{}]), allow_pickle=True)
    assert "Python objects in dtype" in fails("search", f"index={pickled}", "duplicates=0.9")


def test_a_record_cannot_make_it_fetch_or_run_anything(fails, cli, index, photos):
    image = f"image={photos / 'a' / '003.png'}"
    for run in ("timm:vit_tiny_patch16_224", "https://127.0.0.1/x", "untrained:https://127.0.0.1/x"):
        change(index, run=run)
        assert f"was made with run={run}, which is no file or folder here: give run=." in fails(
            "search", f"index={index}", image
        )
    for data in ("https://127.0.0.1/x.tar", "hf:x/y", "[https://127.0.0.1/x.tar]"):
        change(index, data=data)
        assert f"No picture: The index was made with data={data}" in cli("search", f"index={index}", "subset=3")[1]
    change(index, data=str(photos / "b"))
    assert "has changed since its images were embedded" in cli("search", f"index={index}", "subset=3")[1]
    change(index, results={"images": 20, "unreadable": [{"number": 21}]})
    assert "names unreadable images that cannot be" in fails("search", f"index={index}", "subset=3")
    change(index, results={"images": 20, "unreadable": [{"number": 5}]})
    for protocol in ({}, {"architecture": [0, 0, "x"], "value_range": "y"}):
        change(index, data=str(photos), protocol=protocol)
        assert "No picture: " in cli("search", f"index={index}", "subset=3")[1]
    assert "picture=" in fails("search", f"index={index}", "subset=3", f"picture={index.parent / 'x.png'}")
