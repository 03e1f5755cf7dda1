"""sslvit in Python: the words of the command line, and what they give back."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sslvit

from .conftest import words

NOTEBOOK = Path(__file__).parents[1] / "eval" / "first_steps.ipynb"


def test_an_import_brings_neither_torch_nor_other_heavy_packages():
    code = (
        "import sys, sslvit; print([n for n in ('torch', 'timm', 'numpy', 'pandas', 'omegaconf') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_run_is_trained_measured_loaded_and_embedded(images, labelled, tmp_path, cli):
    keys = dict(word.split("=", 1) for word in words("mae", f"out={tmp_path / 'run'}", "warmup_epochs=0.5"))
    run = sslvit.pretrain(images, **keys)
    assert (run.folder, run.stopped) == (tmp_path / "run", None)
    assert run.metrics["step"].max() == 8
    found = run.knn(labelled / "train", labelled / "test", k=(5, 10))
    stored = json.loads((run.folder / "eval" / "knn.json").read_text())
    assert json.loads(json.dumps(found)) == stored["results"]
    assert stored["settings"]["k"] == [5, 10]
    encoder = sslvit.load(run)
    features = sslvit.embed(encoder, labelled / "test", batch_size=7)
    assert cli("embed", f"run={run.folder}", f"data={labelled / 'test'}", f"out={tmp_path / 'all.npy'}")[0] == 0
    assert np.allclose(features.vectors, np.load(tmp_path / "all.npy"), atol=1e-5)
    assert features.paths[0].endswith(".png")
    assert set(features.labels) == {path.name for path in (labelled / "test").iterdir()}
    encoder.encoder.model.patch_embed.proj.weight.data.neg_()  # embed takes the encoder as it is now, not its file
    assert not np.allclose(sslvit.embed(encoder, labelled / "test").vectors, features.vectors, atol=1e-2)
    assert run.attention(labelled / "test", images=2).width > 64
    assert (run.export(tmp_path / "exported") / "config.json").is_file()
    with pytest.raises(sslvit.UserError, match=r"There is no key epohcs.*Did you mean epochs"):
        sslvit.pretrain(images, epohcs=3)
    with pytest.raises(sslvit.UserError, match="there is no evaluation knnn: give one of attention,"):
        sslvit.evaluate("knnn", run)
    with pytest.raises(sslvit.UserError, match="does not exist"):
        sslvit.pretrain(tmp_path / "none", epochs=1)


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its cells in their order, with fewer images and a shorter run."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    short = code.replace("count=10000", "count=24").replace("count=2000", "count=24")
    sets = '**{"eval.train": TRAIN, "eval.test": TEST}'
    few = f"images=48, global_batch_size=24, warmup_epochs=0.5, workers=0, {sets}"
    shorter = short.replace('out="runs', f'{few}, out="runs')
    assert len({code, short, shorter}) == 3
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(shorter, names)
    assert list(names["loss"].columns) == ["step", "loss", "images_per_second"]
    assert len(names["loss"]) > 0
    assert names["trained"]["neighbours"][0]["k"] == names["untrained"]["neighbours"][0]["k"] == 20
    assert names["model"].num_classes == 10
