"""An exported encoder fine-tuned elsewhere, by plain timm and by plain transformers, beside `sslvit finetune`.

    python -m tests.benchmarks.elsewhere run=<run> train=<folder> test=<folder> images=2000 epochs=10

`train` and `test` hold a folder of images for each class; the first `images` of each are used, as many of each class.
All have the same recipe: AdamW, a warm-up of one epoch and a cosine, layer-wise decay, crops, flips, clipped gradients.
The loops for timm and transformers are their users': the exported folders are all that they read.
"""

import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from transformers import AutoImageProcessor, AutoModelForImageClassification

LR, WEIGHT_DECAY, LAYER_DECAY, BATCH, CROP_SCALE, SEEDS = 1e-3, 0.05, 0.75, 64, (0.5, 1.0), (0, 1, 2)
RECIPE = f"recipe=small base_lr={LR * 256 / BATCH} head_lr=1 head_epochs=0 unfreeze_epochs=0 standardise=false"
Labelled = tuple[Tensor, Tensor]  # [N, 3, H, W] uint8, [N] int64


def first_of_each_class(folder: Path, count: int, out: Path) -> Labelled:
    """The first files of each class by name, also copied to `out`, for `sslvit finetune`."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    each = count // len(classes)
    files = [path for folder in classes for path in sorted(folder.iterdir())[:each]]
    for path in files:
        (out / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, out / path.parent.name)
    images = torch.stack([decode_image(str(path), ImageReadMode.RGB) for path in files])
    return images, torch.arange(len(classes)).repeat_interleave(each)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """A learning rate for each layer, by the number in its name: blocks.3 of timm, layer.3 of transformers."""
    numbers = {name: re.search(r"(?:blocks|layer)\.(\d+)\.", name) for name, _ in model.named_parameters()}
    last = 2 + max(int(found[1]) for found in numbers.values() if found)
    made = []
    for name, parameter in model.named_parameters():
        found, stem = numbers[name], re.search(r"embed|token", name)
        layer = 1 + int(found[1]) if found else 0 if stem else last
        decay = 0.0 if parameter.ndim <= 1 or (stem and not found) else WEIGHT_DECAY
        made.append({"params": [parameter], "rate": LR * LAYER_DECAY ** (last - layer), "weight_decay": decay})
    return made


def fine_tune(model: nn.Module, size: int, mean: Any, std: Any, train: Labelled, test: Labelled, epochs: int) -> float:
    """Top-1 on the test images in percent."""
    crop = v2.Compose([v2.RandomResizedCrop(size, CROP_SCALE, interpolation=3), v2.RandomHorizontalFlip()])
    whole = v2.Compose([v2.Resize(size, 3), v2.CenterCrop(size)])
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])

    def logits(images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(normalise(images))
        return (outputs if isinstance(outputs, Tensor) else outputs.logits).float()

    adamw = torch.optim.AdamW(groups(model), lr=0.0)
    epoch_steps = len(train[0]) // BATCH
    for epoch in range(epochs):
        model.train()
        for step, rows in enumerate(torch.randperm(len(train[0])).split(BATCH)[:epoch_steps]):
            done = epoch + step / epoch_steps
            share = done if done < 1 else (1 + math.cos(math.pi * (done - 1) / (epochs - 1))) / 2
            for group in adamw.param_groups:
                group["lr"] = group["rate"] * share
            F.cross_entropy(logits(torch.stack([crop(x) for x in train[0][rows]])), train[1][rows]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad()
    model.eval()
    with torch.no_grad():
        found = torch.cat([logits(whole(images)).argmax(1) for images in test[0].split(250)])
    return 100 * (found == test[1]).float().mean().item()


def by_timm(folder: Path, train: Labelled, test: Labelled, epochs: int) -> float:
    classes = int(train[1].max()) + 1
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=classes)
    data = resolve_model_data_config(model)
    return fine_tune(model, data["input_size"][1], data["mean"], data["std"], train, test, epochs)


def by_transformers(folder: Path, train: Labelled, test: Labelled, epochs: int) -> float:
    classes = int(train[1].max()) + 1
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=classes)
    processor = AutoImageProcessor.from_pretrained(folder)
    size = processor.size["height"] if "height" in processor.size else processor.size["shortest_edge"]
    return fine_tune(model, size, processor.image_mean, processor.image_std, train, test, epochs)


def sslvit(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "sslvit", *words], check=True)


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    count, epochs = int(given.get("images", 2000)), int(given.get("epochs", 10))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        train, test = (first_of_each_class(Path(given[part]), count, place / part) for part in ("train", "test"))
        sslvit("export", f"run={given['run']}", "to=timm,hf", f"out={place / 'exported'}")
        own = place / "own.json"
        sslvit(
            "finetune", f"run={place / 'exported/timm'}", f"data.train={place / 'train'}",
            f"data.test={place / 'test'}", *RECIPE.split(), f"global_batch_size={BATCH}", f"epochs={epochs}",
            f"seeds=[{','.join(map(str, SEEDS))}]", f"out={own}",
        )  # fmt: skip
        ways = {"sslvit finetune": [found["top1"] for found in json.loads(own.read_text())["results"]["seeds"]]}
        for way, folder in ((by_timm, "timm"), (by_transformers, "hf")):
            ways[f"{way.__name__}, {folder}"] = found = []
            for seed in SEEDS:
                torch.manual_seed(seed)
                found.append(way(place / "exported" / folder, train, test, epochs))
    for way, scores in ways.items():
        print(f"{way}: {statistics.mean(scores):.2f} +- {statistics.stdev(scores):.2f} {scores}", flush=True)


if __name__ == "__main__":
    main()
