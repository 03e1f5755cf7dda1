"""The forms beside timm's, the model card, the upload. test_transformers_versions.py has encoders of all kinds."""

import json
import re
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from sslvit import pretrained
from sslvit.__main__ import main
from sslvit.checkpoints import exported
from sslvit.errors import UserError
from sslvit.export import card, hf_folder, hub, timm_folder, torch_program

from ..conftest import TINY_MODEL

FILES = {
    "timm": {"config.json", "model.safetensors"},
    "hf": {"config.json", "model.safetensors", "preprocessor_config.json"},
    "onnx": {"model.onnx", "preprocessor_config.json"},
    "torch": {"model.pt2", "preprocessor_config.json"},
}


@pytest.fixture(scope="module")
def run(colour_run, labelled, tmp_path_factory):
    """A run that was measured."""
    run = tmp_path_factory.mktemp("measured") / "run"
    shutil.copytree(colour_run, run)
    sets = [f"run={run}", f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}", "workers=0"]
    assert main(["knn", *sets, "k=[1,20]"]) == 0
    assert main(["linear", *sets, "epochs=1", "lr=[0.1]", "weight_decay=[0]"]) == 0
    return run


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """Two forms of one encoder."""
    folder = tmp_path_factory.mktemp("forms") / "exported"
    words = ["to=timm,hf", "license=cc-by-4.0", f"out={folder}"]
    assert main(["export", f"run={run}", *words]) == 0
    return folder


def test_each_form_is_written_beside_the_others_with_a_model_card(folder, run):
    found = {form.name: {path.name for path in form.iterdir()} for form in folder.iterdir()}
    assert found == {form: {*FILES[form], "README.md"} for form in ("timm", "hf")}
    linear = json.loads((run / "eval" / "linear.json").read_text())["results"]
    low, high = linear["top1_interval"]
    for form, library in (("timm", "timm"), ("hf", "transformers")):
        text = (folder / form / "README.md").read_text()
        assert text.startswith(f'---\nlibrary_name: "{library}"\n')
        assert 'license: "cc-by-4.0"\n---\n' in text
        assert "objective.mask_ratio: 0.75" in text
        assert text.split("- Command: `")[1].splitlines()[0].endswith("`")
        assert f"| linear: top1 | {linear['top1']:g} | {low:g} to {high:g} | 18 of " in text
        assert "| knn, k = 20: top1 |" in text
        assert f"`linear` chose {card.POOLS[linear['pool']]} on held-out images." in text


@pytest.mark.slow
def test_the_examples_of_the_readme_run(run, labelled, cli, monkeypatch, tmp_path):
    folder = tmp_path / "exported"
    assert cli("export", f"run={run}", "to=timm,onnx", f"out={folder}")[0] == 0
    assert {path.name for path in (folder / "onnx").iterdir()} == {*FILES["onnx"], "README.md"}
    text = (Path(__file__).parents[2] / "eval" / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text.split("## In Python")[1].split("\n## ")[0], flags=re.DOTALL)
    assert len(examples) == 5
    assert all(len(re.findall(r"^.", example, re.M)) <= 5 for example in examples)
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        words = [f"run={folder / 'timm'}", f"data={labelled / split}", f"out={split}.parquet"]
        assert cli("embed", *words)[0] == 0
    from PIL import Image

    photos = [Image.open(path).convert("RGB") for path in sorted((labelled / "test").rglob("*.png"))][:4]
    labels = torch.arange(4)
    names = {"photos": photos, "labels": labels, "batches": [(torch.zeros(4, 3, 32, 32), labels)]}
    for example in examples:
        exec(example, names)
    assert names["score"] > 0.9
    assert names["loss"].isfinite()
    assert names["features"].shape == (8, 48)


def encoder(size=32, pool="", name="vit_tiny_patch16_224", **args):
    subject = pretrained.load(f"random:{name}", size, (TINY_MODEL if name.startswith("vit") else {}) | args)
    subject.encoder.pool = pool or subject.encoder.pool
    return subject


SWIN = {"embed_dim": 24, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}
WIDE_SWIN = SWIN | {"window_size": 7}


@pytest.mark.parametrize(
    ("subject", "hf_class", "what"),
    [
        (lambda: encoder(class_token=False, global_pool="avg", fc_norm=False), "auto", "no class token"),
        (lambda: encoder((16, 48)), "auto", "a grid of 2x6 patches, not a square: take hf_class=vit, "),
        (lambda: encoder(qk_norm=True), "auto", "blocks of its own"),
        (lambda: encoder(mlp_ratio=2.5), "auto", "an MLP of 2.5 times its width, not a whole number"),
        (lambda: encoder(reg_tokens=2), "vit", "register tokens: take hf_class=auto, "),
        (lambda: encoder(64, name="mobilevitv2_050"), "auto", "a ByobNet"),
        (lambda: encoder(32, name="swin_tiny_patch4_window7_224", **WIDE_SWIN), "auto", "windows of other sizes"),
        (
            lambda: encoder((32, 64), name="swin_tiny_patch4_window7_224", **SWIN),
            "auto",
            "a stage that is one window high",
        ),
    ],
)
def test_what_a_layout_of_transformers_cannot_express_is_refused_with_the_form_that_can(subject, hf_class, what):
    with pytest.raises(
        UserError, match=f"to=hf cannot express .* with {what}.*to=timm, which transformers loads too, or to=onnx"
    ):
        hf_folder.layout(subject().encoder, hf_class)


def test_the_processor_of_transformers_scales_deep_images_as_the_run_did():
    subject = encoder(in_chans=1)
    subject.mean, subject.std, subject.value_range = (0.3,), (0.2,), (100.0, 4095.0)
    found = hf_folder.processor(subject)
    x = np.array([100.0, 1000.0, 4095.0])
    theirs = (x * found["rescale_factor"] - found["image_mean"][0]) / found["image_std"][0]
    assert np.allclose(theirs, ((x - 100) / 3995 - 0.3) / 0.2)
    assert (found["crop_size"], found["size"]) == ({"height": 32, "width": 32}, {"shortest_edge": 36})


def test_a_program_may_take_8_bits_and_normalise_inside(tmp_path):
    subject = encoder(pool="mean")
    folder = torch_program.export(subject, tmp_path / "program", preprocess=True)
    assert {path.name for path in folder.iterdir()} == {*FILES["torch"], "README.md"}
    program = torch.export.load(folder / "model.pt2").module()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (subject.mean, subject.std))
    with torch.no_grad():
        expected = subject.encoder.features((images / 255 - mean) / std)
        assert torch.allclose(program(images), expected, atol=1e-5)
    assert json.loads((folder / "preprocessor_config.json").read_text())["do_normalize"] is False
    subject.value_range = (0.0, 4095.0)
    with pytest.raises(UserError, match="takes images of 8 bits, and random:vit_tiny_patch16_224 was trained"):
        torch_program.export(subject, tmp_path / "deep", preprocess=True)


def test_a_form_whose_features_differ_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(exported, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="differ from the encoder's by 0 of their size: nothing was written"):
        timm_folder.export(encoder(), tmp_path / "encoder")
    assert list(tmp_path.iterdir()) == []


def test_a_card_shows_what_strangers_wrote_as_plain_text(tmp_path):
    subject = encoder()
    (tmp_path / "config.yaml").write_text('method: "m`<b>"\ndata: {train: "a`\\n# head"}\n')
    (tmp_path / "starts.jsonl").write_text('{"command": "x`|\\n[click](http://x)"}\n')
    results = {"a|<b>": 1, "a|<b>_interval": [0, 2], "huge": 10**400, "huge_interval": [0, 10**401]}
    record = {"results": results, "test": {"images": 3, "data": "`t|"}, "step": 1}
    (tmp_path / "x|y.json").write_text(json.dumps(record))
    for name, text in (("bad", "{"), ("list", "[]"), ("deep", "[" * 10**5), ("nan", '{"results": {"a": NaN}}')):
        (tmp_path / f"{name}.json").write_text(text)
    subject.folder = subject.results = tmp_path
    subject.detail = {"step": 1, "images_seen": 8}
    text = card.text(subject, "timm", "", "")
    assert "pretrained with m'(b>\n" in text
    assert "\n# head" not in text
    assert "`x~/\\n[click](http://x)`" in text
    assert "| x/y: a/(b> | 1 | 0 to 2 | 3 of `~t/` |" in text
    assert "Licence: not stated" in text


def test_forms_and_libraries_that_are_not_there_get_a_sentence(fails, colour_run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert "onx is no form. Did you mean onnx?" in fails("export", f"run={colour_run}", "to=timm,onx", f"out={out}")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    error = fails("export", f"run={colour_run}", "to=timm,onnx", f"out={out}")
    assert "to=onnx needs onnxscript: pip install 'sslvit[onnx]'." in error
    assert "push=a/b/c is no name of a repository" in fails("export", f"run={colour_run}", "push=a/b/c", f"out={out}")
    (tmp_path / "link").symlink_to(tmp_path)
    words = ["to=timm,torch", f"out={tmp_path / 'link'}"]
    assert "link is a link, and links are not followed" in fails("export", f"run={colour_run}", *words)
    assert not out.exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append((self.path, body))
        if self.server.full:
            return self._answer(507, {"error": "no room"})
        if self.path.endswith("/create"):
            return self._answer(200, {"url": f"{self.server.address}/me/encoder"})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self._answer(200, {"files": [{**file, "shouldIgnore": False} for file in files]})
        if "/commit/" in self.path:
            return self._answer(200, {"commitUrl": f"{self.server.address}/me/encoder/commit/1", "commitOid": "1"})
        return self._answer(200, {"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self._answer(200, {"id": "me/encoder", "sha": "0" * 40})

    def _answer(self, status: int, content: dict) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


def test_folders_are_uploaded_to_a_private_repository(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.full, server.address = [], False, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folders = {form: tmp_path / form for form in ("timm", "hf")}
    for form, folder in folders.items():
        folder.mkdir()
        (folder / "config.json").write_text(form)
    hub.push(folders, "me/encoder")
    hub.push({"timm": tmp_path / "timm"}, "me/encoder")
    created = json.loads(next(body for path, body in server.calls if path.endswith("/create")))
    assert created["name"] == "encoder"
    assert created.get("private") or created["visibility"] == "private"  # by version
    commits = [body.decode() for path, body in server.calls if "/commit/" in path]
    paths = [json.loads(line)["value"].get("path") for commit in commits for line in commit.splitlines()]
    assert [path for path in paths if path] == ["timm/config.json", "hf/config.json", "config.json"]
    assert f"uploaded {tmp_path / 'timm'} to " in capsys.readouterr().out
    server.full = True
    with pytest.raises(UserError, match=r"push=me/encoder failed \(.*507.*\). What was exported is whole, in "):
        hub.push({"timm": tmp_path / "timm"}, "me/encoder")
    server.shutdown()
