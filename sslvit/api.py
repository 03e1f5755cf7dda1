"""sslvit in Python, in the words of the command line.

    import sslvit
    run = sslvit.pretrain("images/", hours=1)
    run.knn("labelled/train", "labelled/test")
    encoder = sslvit.load(run)
    features = sslvit.embed(encoder, "images/")  # .vectors, .paths, .labels

A keyword is a key of the command, as `sslvit pretrain --help` lists them: `epochs=100`, `optim={"base_lr": 1e-3}`. All
raise sslvit.UserError, with the sentence that the command would print. `import sslvit` takes no time: torch is imported
by what needs it.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, require

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from PIL import Image

    from .pretrained import Pretrained

Images = str | Path | Sequence[str | Path]  # whatever data.train takes; several: one after another


@dataclass(frozen=True)
class Run:
    """A pretraining: its directory, and what can be done with it."""

    folder: Path
    stopped: str | None = None  # why it ended before its last step, a signal's name or max_hours; `pretrain` goes on

    def knn(self, train: Images, test: Images | None = None, **keys: Any) -> dict[str, Any]:
        """k-NN accuracy of the frozen features, {"neighbours": [{"k": 20, "top1": percent, ...}, ...]}. Without `test`,
        each image is tested by all others. See `sslvit knn --help`."""
        found: dict[str, Any] = evaluate("knn", self, train, test, **keys)
        return found

    def linear(self, train: Images, test: Images, **keys: Any) -> dict[str, Any]:
        """Accuracy of a linear classifier on the frozen features, {"top1": percent, ...}: `sslvit linear`."""
        found: dict[str, Any] = evaluate("linear", self, train, test, **keys)
        return found

    def attention(self, images: Images, /, **keys: Any) -> "Image.Image":
        """A picture of what the heads of the last block look at, and of the patch tokens as colours."""
        return _picture("attention", str(self.folder), images, keys)

    def export(self, out: str | Path, to: str | Sequence[str] = "timm", **keys: Any) -> Path:
        """Write the encoder for others: timm, hf, onnx, torch. Returns the folder."""
        words = {"run": self.folder, "to": to if isinstance(to, str) else ",".join(to), "out": out}
        _command("export", "export", words | keys)
        return Path(out)

    @property
    def metrics(self) -> "pd.DataFrame":
        """metrics.jsonl as a data frame: a row for each line, a column for each number, NaN where a line has none."""
        frames, rows = require("pandas", "notebook", "run.metrics"), []
        for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # half a line: the run goes on, or was killed
                continue
        frame: pd.DataFrame = frames.DataFrame(rows)
        return frame


@dataclass(frozen=True)
class Embeddings:
    """Features of images, with what they belong to."""

    vectors: "np.ndarray"  # [N, D] float32
    paths: list[str]  # N
    labels: list[str] | None  # N, the names of the classes; None: the images have no labels

    def __len__(self) -> int:
        return len(self.vectors)


def pretrain(images: Images | None = None, /, *, recipe: str | Path | None = None, **keys: Any) -> Run:
    """`sslvit pretrain`: train an encoder, or go on with the run in the directory `out`.

    images: a folder, or whatever else data.train takes; None: the recipe names them. recipe: a name of `sslvit recipes`
    or a .yaml file. keys: all others, for example minutes=10, method="dino", out="runs/first". Ctrl-C saves and returns
    the run; the same call goes on.
    """
    from . import settings
    from .pretraining import pretrain as train
    from .pretraining import summary

    began = time.monotonic()
    words = _words(({} if images is None else {"data.train": images}) | keys)
    result = train(settings.load([str(recipe), *words] if recipe else words, began), began)
    print(*summary(result), sep="\n")
    return Run(result.run_dir, result.stopped)


def evaluate(
    name: str, encoder: "Run | str | Path", train: Images | None = None, test: Images | None = None, **keys: Any
) -> Any:
    """Any evaluation: evaluate("finetune", run, train, test, recipe="small"). Prints what `sslvit <name>` prints, and
    returns the results that it writes to <run>/eval/<name>.json.

    encoder: a run, or what `load` takes, `untrained:<run>` too. keys: those of the command.
    """
    from .evaluation import commands

    if name not in commands():
        raise UserError(f"there is no evaluation {name}: give one of {', '.join(commands())}.")
    sets = {key: value for key, value in {"data.train": train, "data.test": test}.items() if value is not None}
    return _command(name, f"evaluation.{name}", {"run": _name(encoder)} | sets | keys)


def load(run: "Run | str | Path", **keys: Any) -> "Pretrained":
    """A pretrained encoder: of a run, one of its checkpoints, an export, `timm:<name>`.

    `.encoder` is the torch module, `.encoder.model` the model of timm; `.mean` and `.std` are those of its images.
    keys: image_size, model_args, value_range, for `timm:<name>`.
    """
    from .pretrained import load as load_encoder

    return load_encoder(_name(run), **keys)


def embed(encoder: "Pretrained | Run | str | Path", images: Images, **keys: Any) -> Embeddings:
    """The features of images, in memory. For more than fit there, `sslvit embed` writes them to a file.

    encoder: what `load` returns, or its name. keys: pool, batch_size, workers, precision.
    """
    from .evaluation.frozen import EncoderConfig, place
    from .pretrained import Pretrained

    config = _parse(EncoderConfig(), {"run": _name(encoder)} | keys, "embed")
    frozen = place(encoder if isinstance(encoder, Pretrained) else load(encoder), config)
    source = frozen.open(_text(images))
    found = frozen.features(source)
    labels = [found.classes[label] if label >= 0 else "" for label in found.labels.tolist()]
    paths = [source.name(number) for number in found.index.tolist()]
    return Embeddings(found.values.numpy(), paths, labels if found.classes else None)


def _name(encoder: Any) -> str:
    return str(encoder.folder if isinstance(encoder, Run) else getattr(encoder, "name", encoder))


def _picture(name: str, run: str, images: Images, keys: dict[str, Any]) -> "Image.Image":
    """What a command draws, as an image: a notebook shows it."""
    from tempfile import TemporaryDirectory

    from PIL import Image

    with TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        _command(name, f"evaluation.{name}", {"run": run, "data": images, "picture": path} | keys)
        with Image.open(path) as image:
            return image.copy()


def _command(name: str, module: str, keys: Mapping[str, Any]) -> Any:
    found = import_module(f".{module}", __package__)
    return found.run(_parse(found.Config(), keys, name))


def _parse(schema: Any, keys: Mapping[str, Any], command: str) -> Any:
    from .arguments import parse

    return parse(schema, _words(keys), command)


def _words(keys: Mapping[str, Any], prefix: str = "") -> list[str]:
    """{"epochs": 3, "optim": {"base_lr": 1e-3}} -> ["epochs=3", "optim.base_lr=0.001"]."""
    words = []
    for key, value in keys.items():
        if isinstance(value, Mapping) and key not in ("args", "model_args"):
            words += _words(value, f"{prefix}{key}.")
        else:
            words.append(f"{prefix}{key}={_text(value)}")
    return words


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, (str, Path)):
        return str(value)
    if isinstance(value, Mapping):
        return json.dumps(value)  # YAML reads JSON
    if isinstance(value, (list, tuple)):
        return json.dumps([str(item) if isinstance(item, Path) else item for item in value])
    return "null" if value is None else json.dumps(value)
