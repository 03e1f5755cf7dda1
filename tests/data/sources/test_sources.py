"""Every kind of source gives the same tensors, names, labels and length for the same images, also in workers."""

import csv
import functools
import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sslvit.config import load, save
from sslvit.data import Config, Source, open_source
from sslvit.data.crops import Crop
from sslvit.data.loader import Layout, make_loader
from sslvit.data.sources import files
from tests.conftest import words
from tests.processes import launch

VIEWS = {"image": [Crop((16, 16), (0.2, 1.0))]}
CLASSES = ["bird", "cat", "dog"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """folder/<class>/<number>.png: 13 colour images of one size."""
    folder = tmp_path_factory.mktemp("sources") / "folder"
    generator = np.random.default_rng(3)
    for i in range(13):
        place = folder / CLASSES[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(place / f"{i:02d}.png")
    return folder


def truth(root: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(names, [N, H, W, 3] pixels, labels) in the order of the folder."""
    paths = sorted(root.rglob("*.png"))
    pixels = np.stack([np.array(Image.open(path)) for path in paths])
    return [str(p.relative_to(root)) for p in paths], pixels, np.array([CLASSES.index(p.parent.name) for p in paths])


def as_list(root: Path, out: Path) -> str:
    return json.dumps([str(root / "bird"), f"{root}/cat/*.png", str(root / "dog")])


def as_text(root: Path, out: Path) -> str:
    (out / "list.txt").write_text("".join(f"{os.path.relpath(root / name, out)}\n" for name in truth(root)[0]))
    return str(out / "list.txt")


def as_csv(root: Path, out: Path) -> str:
    names, _, labels = truth(root)
    with (out / "list, with a comma.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["File", "age", "Label"])
        writer.writerows([root / name, 3, CLASSES[label]] for name, label in zip(names, labels, strict=True))
    return str(out / "list, with a comma.csv")


def as_tsv(root: Path, out: Path) -> str:
    names, _, labels = truth(root)
    lines = [f"{CLASSES[label]}\t{root / name}\n" for name, label in zip(names, labels, strict=True)]
    (out / "list.tsv").write_text("class\tpath\n" + "".join(lines))
    return str(out / "list.tsv")


def as_zip(root: Path, out: Path, method: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(out / "all.zip", "w", method) as file:
        file.writestr("readme.txt", "no image")
        file.writestr("__MACOSX/._00.png", "no image either")
        for name in reversed(truth(root)[0]):
            file.write(root / name, f"train/{name}")
    return str(out / "all.zip")


def as_tar(root: Path, out: Path) -> str:
    with tarfile.open(out / "all.tar", "w") as file:
        file.add(root, "./")
    return str(out / "all.tar")


def as_long_named_tar(root: Path, out: Path) -> str:
    with tarfile.open(out / "all.tar", "w", format=tarfile.PAX_FORMAT) as file:
        file.add(root, f"{'long/' * 60}../of it")
    return str(out / "all.tar")


def as_shards(root: Path, out: Path, labels_as: str = "cls") -> str:
    """WebDataset: samples 000.png and 000.cls, five to a shard."""
    names, _, labels = truth(root)
    for shard in range(3):
        with tarfile.open(out / f"part-{shard:03d}.tar", "w") as file:
            for i in range(5 * shard, min(13, 5 * shard + 5)):
                text = CLASSES[labels[i]] if labels_as == "cls" else json.dumps({"label": CLASSES[labels[i]]})
                for ending, data in (("png", (root / names[i]).read_bytes()), (labels_as, text.encode())):
                    info = tarfile.TarInfo(f"{i:03d}.{ending}")
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))
    return f"{out}/part-{{000..002}}.tar"


def as_shards_by_pattern(root: Path, out: Path) -> str:
    return as_shards(root, out, "json").replace("{000..002}", "*")


def as_parquet(root: Path, out: Path, plain: bool = False) -> str:
    import pyarrow
    import pyarrow.parquet

    names, _, labels = truth(root)
    data = [(root / name).read_bytes() for name in names]
    cells = data if plain else [{"bytes": d, "path": name} for d, name in zip(data, names, strict=True)]
    features = {"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}}}}
    table = pyarrow.table({"image": cells, "label": [CLASSES[i] for i in labels] if plain else labels})
    if not plain:
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    for part in range(2):
        piece = table.slice(7 * part, 7)
        pyarrow.parquet.write_table(piece, out / f"{part}.parquet", row_group_size=4)
    return f"{out}/*.parquet"


def as_saved_data_set(root: Path, out: Path) -> str:
    import datasets

    names, _, labels = truth(root)
    kinds = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = {"picture": [{"bytes": (root / n).read_bytes(), "path": None} for n in names], "label": labels.tolist()}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=kinds)}).save_to_disk(out / "saved")
    return f"hf:{out / 'saved'}:train"


def as_npy(root: Path, out: Path, dtype: str = "uint8") -> str:
    _, pixels, labels = truth(root)
    np.save(out / "all.npy", pixels)
    np.save(out / "all.labels.npy", np.array(CLASSES)[labels])
    return str(out / "all.npy")


def as_npz(root: Path, out: Path) -> str:
    _, pixels, labels = truth(root)
    labels = np.array(CLASSES)[labels][:, None]
    np.savez_compressed(out / "all.npz", train_images=pixels, train_labels=labels, test_images=pixels[:3])
    return f"{out / 'all.npz'}:train_images"


def as_hdf5(root: Path, out: Path) -> str:
    import h5py

    _, pixels, labels = truth(root)
    with h5py.File(out / "all.h5", "w") as file:
        file.create_dataset("train/images", data=pixels, chunks=(4, 20, 24, 3), compression="gzip")
        file["train/labels"] = [CLASSES[i].encode() for i in labels]
        file["test/images"] = pixels[:2]
    return f"{out / 'all.h5'}:train/images"


def as_pages(root: Path, out: Path) -> str:
    import tifffile

    tifffile.imwrite(out / "stack.tif", truth(root)[1], photometric="rgb")
    return str(out / "stack.tif")


def as_tiff_files(root: Path, out: Path) -> str:
    import tifffile

    for name, image in zip(*truth(root)[:2], strict=True):
        (out / name).parent.mkdir(exist_ok=True)
        planes = image.transpose(2, 0, 1)
        tifffile.imwrite(out / Path(name).with_suffix(".tif"), planes, photometric="rgb", planarconfig="separate")
    return str(out)


def as_npy_files(root: Path, out: Path) -> str:
    for name, image in zip(*truth(root)[:2], strict=True):
        (out / name).parent.mkdir(exist_ok=True)
        np.save(out / Path(name).with_suffix(".npy"), image)
    return str(out)


def as_dicom_files(root: Path, out: Path) -> str:
    for name, image in zip(*truth(root)[:2], strict=True):
        (out / name).parent.mkdir(exist_ok=True)
        write_dicom(out / Path(name).with_suffix(".dcm"), image)
    return str(out)


def write_dicom(path: Path, values: np.ndarray, **more) -> None:
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    colour = values.ndim == 3
    file.Rows, file.Columns, file.SamplesPerPixel = *values.shape[:2], 3 if colour else 1
    file.BitsAllocated = file.BitsStored = 8 * values.dtype.itemsize
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, int(values.dtype.kind == "i")
    file.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        file.PlanarConfiguration = 0
    for key, value in more.items():
        setattr(file, key, value)
    file.PixelData = values.tobytes()
    pydicom.dcmwrite(path, file)


KINDS = {
    "folder": (lambda root, out: str(root), True),
    "list": (as_list, False),  # (how it is written, whether it has labels)
    "pattern": (lambda root, out: f"{root}/**/*.png", True),
    "pattern of folders": (lambda root, out: f"{root}/*", False),
    "braces": (lambda root, out: f"{root}/{{bird,cat,dog}}/*.png", True),
    "txt": (as_text, False),
    "csv": (as_csv, True),
    "tsv": (as_tsv, True),
    "zip": (as_zip, True),
    "stored zip": (functools.partial(as_zip, method=zipfile.ZIP_STORED), True),
    "tar": (as_tar, True),
    "tar with long names": (as_long_named_tar, True),
    "shards": (as_shards, True),
    "shards by pattern": (as_shards_by_pattern, True),
    "parquet": (as_parquet, True),
    "plain parquet": (functools.partial(as_parquet, plain=True), True),
    "saved data set": (as_saved_data_set, True),
    "npy": (as_npy, True),
    "npz": (as_npz, True),
    "hdf5": (as_hdf5, True),
    "pages": (as_pages, False),
    "tiff files": (as_tiff_files, True),
    "npy files": (as_npy_files, True),
    "dicom files": (as_dicom_files, True),
}
NAMED = ("folder", "list", "pattern", "pattern of folders", "braces", "txt", "csv", "tsv", "zip", "stored zip", "tar",
         "tar with long names", "parquet")  # fmt: skip


@pytest.fixture(scope="module")
def inverted(root, tmp_path_factory) -> Path:
    """Other images of the same names and sizes."""
    folder = tmp_path_factory.mktemp("inverted") / root.name
    shutil.copytree(root, folder)
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            ImageOps.invert(image).save(path)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_images(kind, root, inverted, tmp_path):
    write, labelled = KINDS[kind]
    source = open_source(write(root, tmp_path), config(tmp_path))
    names, pixels, labels = truth(root)
    assert len(source) == 13
    for i in range(13):
        image = source.read(i)
        assert image.dtype == torch.uint8
        assert torch.equal(image, torch.from_numpy(pixels[i]).permute(2, 0, 1)), source.name(i)
    if kind in NAMED:
        assert all(source.name(i).endswith(name) for i, name in enumerate(names))
    assert len({source.name(i) for i in range(13)}) == 13
    if labelled:
        assert [source.classes[label] for label in source.labels] == [CLASSES[label] for label in labels]
    else:
        assert source.labels is None
    again = open_source(write(root, tmp_path), config(tmp_path))
    assert again.identity() == source.identity()
    assert_workers_agree(source)
    # A run that goes on would notice others in their place.
    sample = source.sample()
    assert again.sample() == sample
    (tmp_path / "others").mkdir()
    others = open_source(write(inverted, tmp_path / "others"), config(tmp_path / "others")).sample()
    assert len(others) == len(sample) == 13
    assert all(one != other for one, other in zip(sample, others, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_other_bytes_of_the_same_size_and_time_change_the_fingerprint(kind, root, tmp_path):
    shutil.copytree(root, tmp_path / "images")
    source = open_source(KINDS[kind][0](tmp_path / "images", tmp_path), config(tmp_path))
    before = source.fingerprint()
    assert source.fingerprint() == before
    for path in [path for path in tmp_path.rglob("*.*") if path.is_file() and "cache" not in path.parts]:
        about = path.stat()
        with path.open("r+b") as file:
            data = bytearray(file.read())
            data[len(data) // 2] ^= 1
            file.seek(0)
            file.write(data)
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert source.fingerprint() != before


def test_a_fingerprint_reads_little_of_many_and_of_large_files(tmp_path, monkeypatch):
    """The first, the middle and the last block of a large file, or the middle block of the first, ... and last file."""
    monkeypatch.setattr(files, "SAMPLE", 3)
    monkeypatch.setattr(files, "BLOCK", 10)
    large = tmp_path / "large"
    for names, place, noticed in [
        (["large"], 0, True), (["large"], 499, True), (["large"], 999, True), (["large"], 200, False),
        (["large", "0", "1", "2"], 500, True), (["large", "0", "1", "2"], 0, False), (["0", "large"], 500, True),
        (["0", "1", "large", "2", "3", "4"], 500, True), (["0", "large", "1", "2", "3", "4"], 500, False),
    ]:  # fmt: skip
        large.write_bytes(bytes(1000))
        os.utime(large, (1, 1))
        before = files.fingerprint_of("", names, tmp_path)
        large.write_bytes(bytes(place) + b"x" + bytes(999 - place))
        os.utime(large, (1, 1))
        assert (files.fingerprint_of("", names, tmp_path) != before) == noticed, (names, place)


def config(folder: Path, **more) -> Config:
    return Config(download_dir=str(folder / "cache"), **more)


def assert_workers_agree(source: Source) -> None:
    """Two forked processes, after this one has read and so opened what there is to open; also from a later step."""
    plain = list(make_loader(source, VIEWS, Layout(4), 0, (0, 9), 0, torch.device("cpu")))
    forked = list(make_loader(source, VIEWS, Layout(4), 0, (0, 9), 2, torch.device("cpu")))
    resumed = list(make_loader(source, VIEWS, Layout(4), 0, (5, 9), 1, torch.device("cpu")))
    assert len(plain) == len(forked) == 9
    for a, b in zip(plain + plain[5:], forked + resumed, strict=True):
        assert a["bad"] == b["bad"] == []
        assert torch.equal(a["image"], b["image"])


@pytest.mark.slow
def test_two_processes_train_on_what_one_unpacks(root, tmp_path):
    """Parquet, whose images are written once to download_dir, on two ranks with a loader process each."""
    out = tmp_path / "run"
    more = [
        "global_batch_size=12",
        "epochs=1",
        "workers=1",
        "warmup_epochs=0",
        f"download_dir={tmp_path / 'cache'}",
        f"out={out}",
    ]
    said = launch(["pretrain", as_parquet(root, tmp_path), *words("mae", *more)], tmp_path / "said", 2)
    assert "13 images of" in said
    assert (out / "checkpoints").exists()
    assert [path.name for path in (tmp_path / "cache" / "parquet").iterdir() if path.name.endswith(".part")] == []
    assert len(list((tmp_path / "cache" / "parquet").iterdir())) == 2


def test_a_recipe_may_list_folders(root, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"data": {"train": [f"{root}/bird", f"{root}/cat"]}, "method": "mae"}))
    loaded = load([str(recipe)])
    assert len(open_source(loaded.data.train, loaded.data)) == 9
    save(loaded, tmp_path / "saved.yaml")
    assert load([str(tmp_path / "saved.yaml")]).data.train == loaded.data.train
    assert load([f"[{root}/bird,{root}/cat]"]).data.train == f"[{root}/bird,{root}/cat]"
