"""`sslvit embed`: what it writes, by any number of processes and after any stop."""

import csv
import json
import re
import shutil
import time
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet
import pytest
import torch

from sslvit.tools import embed
from tests import processes
from tests.conftest import write_images

ENCODER = [
    "run=random:vit_tiny_patch16_224", "image_size=32", "workers=0", "precision=float32",
    "model_args={patch_size: 8, embed_dim: 48, depth: 2, num_heads: 2}",
]  # fmt: skip
ENDINGS = ("", ".csv", ".json")


def command(data: Path | str, out: Path, *more: str) -> list[str]:
    """Parts of 16 images."""
    return ["embed", *ENCODER, f"data={data}", f"out={out}", "batch_size=1", *more]


def written(out: Path) -> list[bytes]:
    assert not out.with_name(f"{out.name}.parts").exists()
    return [out.with_name(out.name + ending).read_bytes() for ending in ENDINGS]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """37 images and 17 broken files in two class folders. No image of the second part can be read."""
    root = tmp_path_factory.mktemp("photos")
    write_images(root / "a", 16)
    write_images(root / "b", 21, seed=1)
    for number in range(17):
        (root / "a" / f"broken{number:02d}.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory) -> Path:
    """Vectors by one process that nothing has stopped."""
    out = tmp_path_factory.mktemp("whole") / "vectors.npy"
    assert processes.main(command(photos, out)) == 0
    return out


def test_a_row_for_each_readable_image_in_the_order_of_the_source(whole, photos):
    vectors = np.load(whole)
    assert vectors.shape == (37, 48)
    assert vectors.dtype == np.float32
    rows = list(csv.DictReader(whole.with_name("vectors.npy.csv").open()))
    assert [row["path"] for row in rows[:2] + rows[-1:]] == ["a/000.png", "a/001.png", "b/020.png"]
    assert [row["label"] for row in rows] == ["a"] * 16 + ["b"] * 21
    results = json.loads(whole.with_name("vectors.npy.json").read_text())["results"]
    assert results["images"] == 37
    assert results["unreadable"][0] == {"number": 16, "path": "a/broken00.png"}
    assert len(results["unreadable"]) == 17


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_bytes_are_the_same_from_any_number_of_processes(whole, photos, tmp_path, world_size):
    out = tmp_path / "vectors.npy"
    printed = processes.launch(command(photos, out), tmp_path / "output", world_size)
    assert "17 of 54 images cannot be read and have no row: the first is" in printed
    assert written(out) == written(whole)


def test_a_killed_command_goes_on_and_gives_the_same_bytes(photos, tmp_path):
    many = f"[{','.join([str(photos)] * 8)}]"
    assert processes.main(command(many, tmp_path / "whole.npy")) == 0
    out, output = tmp_path / "vectors.npy", tmp_path / "output"
    process = processes.start(command(many, out), output)
    while not list(tmp_path.glob("vectors.npy.parts/*3.safetensors")):
        assert process.is_alive(), output.read_text()
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not out.exists()
    parts = sorted(tmp_path.glob("vectors.npy.parts/*.safetensors"))
    parts[1].write_bytes(parts[1].read_bytes()[:-1] + b"\1")  # a damaged one is computed again
    printed = processes.finish(processes.start(command(many, out), output), output)
    assert f"{len(parts) - 1} of 27 parts are there already" in printed
    assert written(out)[:2] == written(tmp_path / "whole.npy")[:2]


def test_a_second_command_computes_nothing_unless_something_has_changed(whole, photos, tmp_path, cli):
    out = tmp_path / "vectors.npy"
    for ending in ENDINGS:
        shutil.copy(whole.with_name(whole.name + ending), out.with_name(out.name + ending))
    assert "is there already, of these images and weights" in cli(*command(photos, out))[1]
    assert "37 vectors of class token, float32" in cli(*command(photos, out, "seed=1"))[1]
    assert written(out)[0] != written(whole)[0]


def test_other_forms_have_the_same_vectors(whole, photos, tmp_path, cli):
    vectors = np.load(whole)
    for form, dtype in (("parquet", "float16"), ("faiss", "float32")):
        status, _, error = cli(*command(photos, tmp_path / f"v.{form}", f"dtype={dtype}", "batch_size=8"))
        assert status == 0, error
    table = pyarrow.parquet.read_table(tmp_path / "v.parquet")
    assert table.schema.names == ["path", "label", "vector"]
    assert np.allclose(np.stack(table["vector"].to_numpy()), vectors, atol=2e-3)
    assert table["path"][0].as_py() == "a/000.png"
    index = faiss.read_index(str(tmp_path / "v.faiss"))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert index.ntotal == 37
    assert np.allclose(index.reconstruct_n(0, 37), unit, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_files_are_those_of_numpy_and_faiss_byte_by_byte(tmp_path, dtype):
    vectors = np.random.default_rng(0).standard_normal((37, 48)).astype(dtype)
    np.save(tmp_path / "v.npy", vectors)
    assert embed.npy_header(37, 48, vectors.dtype) + vectors.tobytes() == (tmp_path / "v.npy").read_bytes()
    half = faiss.IndexScalarQuantizer(48, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    index = faiss.IndexFlatIP(48) if dtype == "float32" else half
    index.add(vectors.astype(np.float32))
    faiss.write_index(index, str(tmp_path / "v.faiss"))
    assert embed.faiss_header(37, 48, vectors.dtype) + vectors.tobytes() == (tmp_path / "v.faiss").read_bytes()


def test_a_part_of_other_settings_or_with_a_changed_byte_is_not_taken(tmp_path):
    parts = embed.Parts(tmp_path / "parts", "a", 37, 16)
    parts.make_folder()
    parts.write(2, torch.ones(5, 48), parts.numbers(2))
    assert torch.equal(parts.read(2)[1], torch.arange(32, 37))
    assert embed.Parts(tmp_path / "parts", "b", 37, 16).read(2) is None
    content = bytearray(parts.path(2).read_bytes())
    content[-1] ^= 1
    parts.path(2).write_bytes(content)
    assert parts.read(2) is None


def test_what_cannot_be_written_is_one_sentence_before_the_work(photos, tmp_path, fails):
    assert "must end in one of .parquet, .npy, .faiss" in fails(*command(photos, tmp_path / "v.txt"))
    assert "data= is missing" in fails(*command("", tmp_path / "v.npy"))
    (tmp_path / "mine.npy").write_bytes(b"mine")
    assert "was not written by sslvit embed" in fails(*command(photos, tmp_path / "mine.npy"))
    (tmp_path / "linked.npy.parts").symlink_to(tmp_path)
    assert "was not written by sslvit embed" in fails(*command(photos, tmp_path / "linked.npy"))
    (tmp_path / "named.npy.json").write_text("{}")
    assert "holds no result of sslvit" in fails(*command(photos, tmp_path / "named.npy"))
    assert (tmp_path / "mine.npy").read_bytes() == b"mine"
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_bytes(b"no image")
    said = fails(*command(tmp_path / "none", tmp_path / "v.npy"))
    assert re.search(r"None of the 1 images can be read, the first is .*a\.png \(.*identify", said)
