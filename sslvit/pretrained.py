"""Load the encoder that the user names: a run directory, one of its checkpoints, `untrained:<run directory>`, an
exported folder, `timm:<name>`, `random:<name>`, `pixels:<run directory>`, or `pixels`."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from . import compatibility, data, hub, objectives, rng
from .arguments import flatten, merge, read_yaml
from .checkpoints import state
from .distributed import say
from .errors import UserError, check_limits
from .model import factory, lora
from .model.encoder import Encoder, Pool

JSON_BYTES = 1 << 24  # of the config.json of an exported folder: it may name thousands of classes
CHOICES = (
    "a run directory, one of its checkpoints, untrained:<run directory>, an exported folder, timm:<name>, "
    "random:<name>, pixels:<run directory> or pixels"
)


class Pixels(nn.Module):
    """No encoder: the image itself is the feature. Every encoder should be better than this."""

    is_vit = False
    pool: Pool = "pooled"

    def __init__(self, image_size: tuple[int, int], in_chans: int = 3) -> None:
        super().__init__()
        self.image_size, self.in_chans = image_size, in_chans

    def feature_dim(self, pool: Pool | None = None) -> int:
        return self.in_chans * self.image_size[0] * self.image_size[1]

    def pools(self) -> tuple[Pool, ...]:
        return ("pooled",)

    def features(self, images: Tensor, pool: Pool | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C*H*W]."""
        return images.flatten(1)

    def pooled(self, images: Tensor, pools: Sequence[Pool]) -> dict[Pool, Tensor]:
        return {pool: self.features(images) for pool in pools}


@dataclass
class Pretrained:
    """A frozen encoder, and what its images must look like."""

    encoder: Encoder | Pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str  # as the user gave it
    detail: dict[str, Any]  # for the record: step, images seen ...
    folder: Path | None = None  # its run directory or exported folder
    results: Path | None = None  # the folder of its results and features
    value_range: tuple[float, float] | None = None  # of its training images, see data.Config
    chosen_on: str = ""  # the eval.test with which save.keep_best chose this checkpoint; empty: it was not chosen

    @property
    def data_config(self) -> data.Config:
        """How to open images for it."""
        return data.Config(
            image_size=self.encoder.image_size, in_chans=self.encoder.in_chans, mean=self.mean, std=self.std,
            value_range=self.value_range,
        )  # fmt: skip

    @property
    def origin(self) -> dict[str, Any]:
        """What the config.json of an export says of its origin. timm does not read it. An evaluation of the export
        needs the range, to read deep images as the run did."""
        return {"source": self.detail} | ({"value_range": list(self.value_range)} if self.value_range else {})


def load(
    name: str, image_size: int | tuple[int, int] | None = None, model_args: dict[str, Any] | None = None, seed: int = 0,
    allow_method: str = "", value_range: tuple[float, float] | None = None,
) -> Pretrained:  # fmt: skip
    """The encoder with this name. Raises UserError.

    image_size: pixels, for `timm:`, `random:` (None: the model's own) and `pixels` (None: 32).
    model_args: more arguments of the timm model, for `timm:` and `random:`.
    value_range: of deep images, for `timm:`, `random:` and `pixels`; the others have that of their training images.
    allow_method: the module of a method of your own, which `untrained:` runs.
    """
    if not name:
        raise UserError(f"run= is missing: give {CHOICES}.")
    kind, colon, rest = name.partition(":")
    if kind not in ("timm", "random") and (model_args or ((image_size or value_range) and name != "pixels")):
        raise UserError(
            "image_size, value_range and model_args are for timm: and random:, the first two also for pixels. "
            f"run={name} has its own: leave them out."
        )
    if value_range is not None:
        data.check_value_range("value_range", value_range)
    if colon and kind == "untrained":
        return _untrained(Path(rest).expanduser(), name, allow_method)
    if allow_method:
        raise UserError(f"allow_method={allow_method} is for untrained:, and run={name} needs no method: leave it out.")
    if colon and kind == "pixels":
        return _pixels_of(Path(rest).expanduser(), name)
    if colon and kind in ("timm", "random"):
        return replace(_from_timm(name, image_size, model_args or {}, seed), value_range=value_range)
    if name == "pixels":
        return _pixels(data.Config(image_size=image_size or 32, value_range=value_range), name)
    path = Path(name).expanduser()
    if path.parent.name == "checkpoints" and (path / state.STATE).is_file():
        return _from_run(path.parent.parent, path)
    if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        return _from_run(path)
    if (path / "config.json").is_file():
        return _from_folder(path, name)
    if not path.exists():
        raise UserError(f"run={name} does not exist: give {CHOICES}.")
    raise UserError(
        f"run={name} is neither a run (no checkpoints in it) nor an exported encoder (no config.json in it): give "
        f"{CHOICES}."
    )


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def results_folder(name: str) -> Path:
    """Where results of a run, of one of its checkpoints, of untrained:<run>, of pixels:<run> or of an exported folder
    are stored."""
    kind, colon, run_dir = name.partition(":")
    if colon and kind in ("untrained", "pixels"):
        return Path(run_dir).expanduser() / "eval" / kind
    path = Path(name).expanduser()
    return path.parent.parent / "eval" / path.name if path.parent.name == "checkpoints" else path / "eval"


def root_of(results: Path) -> Path:
    """The run directory or exported folder of such a folder of results."""
    return results.parent if results.name == "eval" else results.parent.parent


def _from_run(run_dir: Path, checkpoint: Path | None = None) -> Pretrained:
    """checkpoint: its folder; None: the newest whole one."""
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"run={run_dir} has no config.yaml: it is not a run directory.")
    complaints: list[str] = []
    if checkpoint:
        try:
            folder, (record, (tensors,)) = checkpoint, state.read(checkpoint, state.MODEL)
        except state.Damaged as error:
            raise UserError(f"The checkpoint {checkpoint} is damaged ({error}): give another one.") from error
    else:
        folder, record, (tensors,), complaints = state.latest(run_dir, state.MODEL)
        best = record.get("best_step")
        if best not in (None, record["step"]) and _stands_for_best(run_dir):
            return _from_run(run_dir, state.folder_of(run_dir, best))
        say(*complaints)
    data_config, model_config = _section(run_dir, "data", data.Config), _section(run_dir, "model", factory.Config)
    try:
        prefix, pool = str(record["encoder"]["prefix"]), record["encoder"]["pool"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} does not name the weights of its encoder: it was not written by a run.") from error
    if pool not in get_args(Pool):
        raise UserError(f"{folder} has the pooling {pool}, which is none of {', '.join(get_args(Pool))}.")
    weights = {key[len(prefix) :]: value for key, value in lora.merge(tensors).items() if key.startswith(prefix)}
    stored = sum(value.numel() for value in weights.values())
    built = factory.create(model_config, data.image_size(data_config), data_config.in_chans, stored=stored)
    built.pool = pool
    load_weights(built, weights, str(folder))
    mean, std = data.normalization(data_config)
    detail = {
        "checkpoint": str(folder), "step": record["step"], "images_seen": record["images_seen"], "notes": complaints,
    }  # fmt: skip
    name = str(checkpoint or run_dir)
    return Pretrained(
        built.eval(), mean, std, name, detail, run_dir, results_folder(name), data_config.value_range,
        _chosen_on(run_dir, record),
    )  # fmt: skip


def _chosen_on(run_dir: Path, record: dict[str, Any]) -> str:
    """`Pretrained.chosen_on` of the checkpoint with this record."""
    stored = read_yaml(run_dir / "config.yaml")
    save, evaluation = stored.get("save"), stored.get("eval")
    if not isinstance(save, dict) or not isinstance(evaluation, dict) or not save.get("keep_best"):
        return ""
    return str(evaluation.get("test") or "") if record.get("best_step") == record["step"] else ""


def _stands_for_best(run_dir: Path) -> bool:
    """Whether a run began with pretrained weights and has kept its best state, these weights counted."""
    stored = flatten(read_yaml(run_dir / "config.yaml"))
    return bool(stored.get("model.init") and stored.get("save.keep_best"))


def _section(run_dir: Path, key: str, schema: type) -> Any:
    """A section of a run's config.yaml, as an instance of its schema. Raises UserError."""
    where = run_dir / "config.yaml"
    stored = compatibility.modernise(flatten(read_yaml(where)), str(where))
    values = {name.removeprefix(f"{key}."): value for name, value in stored.items() if name.startswith(f"{key}.")}
    if not values:
        raise UserError(f"{where} has no section {key}: it was not written by a run.")
    return OmegaConf.to_object(merge(OmegaConf.structured(schema), values, str(where)))


def settings_of(run_dir: Path, name: str = "", allow_method: str = "") -> SimpleNamespace:
    """method, seed, objective, model and data of a run, as in its RunConfig. Raises UserError.

    name: how the user named the run. allow_method: the module of a method of your own.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"run={name or run_dir}: {run_dir} has no config.yaml, so it is not a run directory.")
    stored = read_yaml(run_dir / "config.yaml")
    method, seed = str(stored.get("method")), stored.get("seed")
    if method != allow_method:
        objectives.check_bundled(method, run_dir / "config.yaml", "allow_method")
    if not isinstance(seed, int):
        raise UserError(f"{run_dir / 'config.yaml'} has no seed: it was not written by a run.")
    schemas = {"objective": objectives.find(method).Config, "model": factory.Config, "data": data.Config}
    parts = {key: _section(run_dir, key, schema) for key, schema in schemas.items()}
    return SimpleNamespace(method=method, seed=seed, **parts)


def objective_of(config: SimpleNamespace) -> objectives.Objective:
    """The objective of `settings_of` before its first step. Raises UserError."""
    return objectives.start(config, steps_per_epoch=10**6, steps=10**9)  # the weights do not depend on them


def _untrained(run_dir: Path, name: str, allow_method: str) -> Pretrained:
    """The encoder of a run before its first step: same seed, same initialisation."""
    config = settings_of(run_dir, name, allow_method)
    if init := config.model.init:
        raise UserError(f"run={name} began with model.init={init}: to measure these weights, give run={init}.")
    mean, std = data.normalization(config.data)
    detail = {"weights": f"untrained, seed {config.seed}"}
    encoder, results = objective_of(config).exported_encoder().eval(), results_folder(name)
    return Pretrained(encoder, mean, std, name, detail, results=results, value_range=config.data.value_range)


def _pixels(config: data.Config, name: str) -> Pretrained:
    """Images as this configuration reads them, instead of features."""
    encoder = Pixels(data.image_size(config), config.in_chans)
    detail = {"weights": "none: pixels minus the mean training image"}
    return Pretrained(encoder, *data.normalization(config), name, detail, value_range=config.value_range)


def _pixels_of(run_dir: Path, name: str) -> Pretrained:
    """Pixels with the size, the channels and the value range of a run. Raises UserError."""
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"run={name}: {run_dir} has no config.yaml, so it is not a run directory.")
    config = _section(run_dir, "data", data.Config)
    check_limits(f"{run_dir / 'config.yaml'}: data.", config)
    factory.check_size("data.image_size", data.image_size(config))
    if config.value_range:
        data.check_value_range("data.value_range", config.value_range)
    return replace(_pixels(config, name), results=results_folder(name))


def _from_folder(path: Path, name: str) -> Pretrained:
    """A folder that `sslvit export to=timm` or timm's save_for_hf has written.

    timm gets a name and plain arguments, and makes the model without weights: it never looks into the folder.
    """
    where, file = path / "config.json", path / "model.safetensors"
    if not file.is_file():
        raise UserError(f"run={name} has no model.safetensors, the only kind of weights that cannot hold code.")
    try:
        if where.stat().st_size > JSON_BYTES:
            raise ValueError(f"it is larger than {JSON_BYTES:,} bytes, the limit of a config.json")
        stored = json.loads(where.read_text(encoding="utf-8"))
        cfg, args = stored["pretrained_cfg"], dict(stored.get("model_args") or {})
        for key in ("in_chans", "num_classes"):  # input_size has the channels, and the head is left out
            args.pop(key, None)
        in_chans, h, w = cfg["input_size"]
        weights = load_file(file)
        numbers, fixed = sum(value.numel() for value in weights.values()), bool(cfg.get("fixed_input_size"))
        built = factory.recreate(stored["architecture"], args, (h, w), in_chans, fixed, numbers, str(where))
        if built.is_vit and built.model.global_pool == "avg":
            built.pool = "mean"
        load_weights(built, weights, str(path))
        low, high = stored.get("value_range") or (None, None)
        value_range = None if low is None or high is None else (float(low), float(high))
        mean, std = data.normalization(
            data.Config(in_chans=in_chans, mean=_floats(cfg, "mean"), std=_floats(cfg, "std"))
        )
        return Pretrained(built.eval(), mean, std, name, {"folder": str(path)}, path, path / "eval", value_range)
    except UserError:
        raise
    except Exception as error:  # timm raises exceptions of any kind for a configuration that it has not written
        raise UserError(f"run={name} is no encoder that timm can load: {hub.why(error)}.") from error


def _floats(cfg: dict[str, Any], key: str) -> tuple[float, ...]:
    values = cfg[key]
    if not isinstance(values, list) or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        raise ValueError(f"{key}={values} must be a list of numbers")
    return tuple(map(float, values))


def _from_timm(name: str, image_size: int | tuple[int, int] | None, args: dict[str, Any], seed: int) -> Pretrained:
    """timm:<model> with timm's weights, or random:<model> with weights drawn from the seed. Raises UserError."""
    kind, _, model_name = name.partition(":")
    if kind == "random":
        torch.manual_seed(int(rng.fold_in(seed, "weights")))
        built, mean, std = _architecture(model_name, image_size, args, pretrained=False)
        return Pretrained(built.eval(), mean, std, name, {"weights": f"random, seed {seed}"})
    with hub.without_retries() as lost:
        try:
            built, mean, std = _architecture(model_name, image_size, args, pretrained=True)
        except Exception as error:  # no network, no such weights, no room on the disk ...
            if isinstance(error, UserError) and not (lost and isinstance(error.__cause__, OSError)):
                raise
            raise UserError(f"run={name}: timm cannot fetch these weights ({hub.why(error, lost)}).") from error
    return Pretrained(built.eval(), mean, std, name, {"weights": model_name})


def load_weights(built: Encoder, weights: dict[str, Tensor], where: str) -> None:
    """Load the weights of a timm model into an encoder, all of them or none. Raises UserError with the counts."""
    own = built.model.state_dict()
    matched = [key for key, value in weights.items() if key in own and own[key].shape == value.shape]
    if len(matched) < len(own):
        missing = [key for key in own if key not in matched]
        raise UserError(
            f"{where} has {len(matched)} of the {len(own)} weights that this encoder needs; missing or of another "
            f"shape: {', '.join(missing[:3])}{' ...' * (len(missing) > 3)}. It belongs to another model."
        )
    built.model.load_state_dict({key: weights[key] for key in own})


def _architecture(
    model_name: str, image_size: int | tuple[int, int] | None, args: dict[str, Any], pretrained: bool
) -> tuple[Encoder, tuple[float, ...], tuple[float, ...]]:
    """The encoder, and the mean and standard deviation of its images in timm, or ours if timm has none."""
    cfg = timm.get_pretrained_cfg(model_name) if timm.is_model(model_name.split(".")[0]) else None
    size = _height_width(image_size or (cfg.input_size[1:] if cfg else 224))
    args = dict(args)
    in_chans = args.pop("in_chans", 3)
    built = factory.create(factory.Config(model_name, args), size, in_chans, pretrained=pretrained)
    if cfg and in_chans == len(cfg.mean):
        return built, tuple(cfg.mean), tuple(cfg.std)
    return built, *data.normalization(data.Config(in_chans=in_chans))
