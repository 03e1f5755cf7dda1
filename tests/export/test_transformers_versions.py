"""Every form of export, of every kind of encoder, loaded in processes without sslvit: by transformers 4.57 and 5, timm,
ONNX Runtime and torch. Prints the table of differences: python -m pytest -m slow -n0 -s tests/export"""

import json
import subprocess
import sys
import sysconfig

import pytest
import torch
from safetensors.torch import load_file, save_file

from sslvit import pretrained
from sslvit.errors import UserError
from sslvit.export import hf_folder, onnx_file, timm_folder, torch_program

from ..conftest import TINY_MODEL

VERSIONS = {"4.57": "transformers>=4.57,<5", "5": "transformers>=5.24,<6"}
SWIN = {"embed_dim": 24, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}
# name: (model, its arguments, image size, pooling; empty: the first)
CASES = {
    "class token": ("vit_tiny_patch16_224", {}, 32, ""),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}, 32, ""),
    "registers without positions": ("vit_tiny_patch16_224", {"reg_tokens": 3, "no_embed_class": True}, 32, ""),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}, 32, ""),
    "mean pooling": ("vit_tiny_patch16_224", {}, 32, "mean"),
    "mean pooling, registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}, 32, "mean"),
    "non-square": ("vit_tiny_patch16_224", {}, (16, 48), ""),
    "1 channel": ("vit_tiny_patch16_224", {"in_chans": 1}, 32, ""),
    "5 channels": ("vit_tiny_patch16_224", {"in_chans": 5}, 32, ""),
    "LayerScale": ("vit_tiny_patch16_224", {"init_values": 0.3}, 32, ""),
    "LayerScale, registers": ("vit_tiny_patch16_224", {"init_values": 0.3, "reg_tokens": 2}, 32, ""),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN, 32, ""),
    "Swin, non-square, 1 channel": ("swin_tiny_patch4_window7_224", {**SWIN, "in_chans": 1}, (64, 96), ""),
}
# What hf_class= cannot express, and so refuses.
REFUSED = {"hf": {"no class token", "non-square"}, "hf, vit": {name for name in CASES if "registers" in name or "Swin" in name} | {"no class token"}}  # fmt: skip  # noqa: E501
FORMS = {
    "timm": timm_folder.export,
    "hf": hf_folder.export,
    "hf, vit": lambda subject, out: hf_folder.export(subject, out, hf_class="vit"),
    "onnx": onnx_file.export,
    "torch": torch_program.export,
}
# Prints {"<case>/<form>/<reader>": features}; its arguments are a folder of cases and the file to write.
READER = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
root, result, transformers_only = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "1"
found = {}
for folder in sorted(root.glob("*/*/")):
    case, form = folder.parent.name, folder.name
    images = load_file(folder.parent / "images.safetensors")["images"]
    mean_from = json.loads((folder.parent / "mean_from.json").read_text())
    with torch.no_grad():
        if form in ("timm", "hf", "hf, vit"):
            from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
            model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
            wrong = [info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")]
            assert not any(wrong), (folder, wrong)
            output = model.eval()(images)
            hf_mean = form != "timm" and mean_from is not None
            pooled = output.last_hidden_state[:, mean_from:].mean(1) if hf_mean else output.pooler_output
            found[f"{case}/{form}/transformers"] = pooled.flatten(1).contiguous()
            processor = AutoImageProcessor.from_pretrained(folder)
            heads = AutoModelForImageClassification.from_pretrained(folder, num_labels=5)
            assert heads.eval()(images).logits.shape == (len(images), 5), folder
            if images.shape[1] == 3:
                import numpy, PIL.Image
                photo = PIL.Image.fromarray(numpy.full((70, 90, 3), 100, dtype=numpy.uint8))
                pixels = processor(photo, return_tensors="pt")["pixel_values"]
                assert pixels.shape[1:] == images.shape[1:], (folder, pixels.shape)
                if form == "timm":
                    from transformers import pipeline
                    features = pipeline("image-feature-extraction", model=str(folder), pool=True)(photo)
                    same = torch.tensor(features).flatten() - model(pixels).pooler_output.flatten()
                    assert same.abs().max() < 1e-6, folder
        if form == "timm" and not transformers_only:
            import timm
            model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            found[f"{case}/timm/timm"] = model(images)
        if form == "onnx" and not transformers_only:
            import onnxruntime
            session = onnxruntime.InferenceSession(folder / "model.onnx")
            found[f"{case}/onnx/onnxruntime"] = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        if form == "torch" and not transformers_only:
            found[f"{case}/torch/torch"] = torch.export.load(folder / "model.pt2").module()(images)
assert "sslvit" not in sys.modules
import transformers
save_file({key: value.contiguous() for key, value in found.items()}, result)
print(transformers.__version__)
"""


@pytest.fixture(scope="module")
def pythons(tmp_path_factory):
    """{version of transformers: a Python that has it, and torch and timm from the one that runs the tests}."""
    pythons, root = {}, tmp_path_factory.mktemp("environments")
    for version, wanted in VERSIONS.items():
        place = root / version
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
        python = place / "bin" / "python"
        install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", python, wanted]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no network to install {wanted} from: {done.stderr.strip()[-200:]}")
        site = next(place.glob("lib/python*/site-packages"))
        (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pythons[version] = python
    return pythons


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(folder of all exports, <case>/<form>/; {case: features})."""
    root, expected = tmp_path_factory.mktemp("exports"), {}
    for i, (case, (name, args, size, pool)) in enumerate(CASES.items()):
        torch.manual_seed(i)
        usual = TINY_MODEL if "vit" in name else {}
        subject = pretrained.load(f"random:{name}", size, usual | args)
        for weight in subject.encoder.model.parameters():  # so that no bias is 0 and no scale is 1
            weight.data.add_(0.1 * torch.randn_like(weight))
        encoder = subject.encoder.eval()
        encoder.pool = pool or encoder.pool
        images = torch.randn(3, encoder.in_chans, *encoder.image_size)
        with torch.inference_mode():
            expected[case] = encoder.features(images)
        for form, export in FORMS.items():
            if case in REFUSED.get(form, ()):
                with pytest.raises(UserError, match="to=hf cannot express"):
                    export(subject, root / case / form)
            else:
                export(subject, root / case / form)
        save_file({"images": images}, root / case / "images.safetensors")
        mean_from = encoder.model.num_prefix_tokens if encoder.pool == "mean" else None
        (root / case / "mean_from.json").write_text(json.dumps(mean_from))
    return root, expected


@pytest.mark.slow
def test_every_form_of_every_encoder_loads_without_sslvit_in_transformers_4_and_5(pythons, folders, tmp_path):
    root, expected = folders
    columns: dict[str, dict[str, float]] = {}
    for i, (version, python) in enumerate(pythons.items()):
        result = tmp_path / f"{i}.safetensors"
        command = [python, "-c", READER, root, result, str(i)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.split()[-1].startswith(version)
        for key, features in load_file(result).items():
            case, form, reader = key.split("/")
            column = f"{form} in {reader}{f' {version}' if reader == 'transformers' else ''}"
            difference = ((features - expected[case]).abs().max() / expected[case].abs().max()).item()
            columns.setdefault(column, {})[case] = difference
    names = sorted(columns, key=list(dict.fromkeys(columns)).index)
    print("\n| | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for case in CASES:
        cells = [f"{columns[name][case]:.0e}" if case in columns[name] else "refused" for name in names]
        print(f"| {case} | " + " | ".join(cells) + " |")
    assert max(max(column.values()) for column in columns.values()) < 1e-6
    counts = {form: len(CASES) - len(REFUSED.get(form, ())) for form in FORMS}
    assert {name: len(column) for name, column in columns.items()} == {
        name: counts[name.split(" in ")[0]] for name in names
    }
