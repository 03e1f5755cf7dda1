"""DINO: a student sees all crops of an image and learns what a teacher answers to the large ones. The teacher is the
student's moving average.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021 (arXiv 2104.14294). Sections below
are of that paper. The released code computes one softmax for each pair of a teacher crop and a student crop. Here the
teacher's distributions are added up first, so each student crop needs one. Loss and gradients are the same.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import data, rng
from ..arguments import first_line
from ..data.crops import Crop, Views, crop_key
from ..distributed import all_reduce_sum, say, world_size
from ..errors import UserError, check_limits, check_share
from ..model import factory
from ..model.ema import EMA
from ..model.encoder import Encoder
from ..model.heads import ENOUGH_IMAGES, PrototypeHead, differences, koleo
from ..model.objective import Objective
from .keys.dino import DEFAULTS as DEFAULTS
from .keys.dino import PRESETS as PRESETS
from .keys.dino import SMALL as SMALL
from .keys.dino import WORKS as WORKS
from .keys.dino import Config as Config

Resolutions = list[tuple[Tensor, Tensor]]  # crops [R, C, h, w] of one size and their keys [R], for each size
PARTS = 8  # of the student's crops, for crop_wise_backward; by more the memory hardly falls, as the weights stay


def views(config: Config, data_config: data.Config) -> Views:
    """Two global crops and several local ones (section 3.1, multi-crop), with BYOL's photometric augmentation (section
    3.2)."""
    crop = partial(
        Crop, flip_prob=config.flip_prob, vertical_flip_prob=config.vertical_flip_prob, rotate_prob=config.rotate_prob,
        jitter=config.jitter, channel_jitter=config.channel_jitter, jitter_prob=config.jitter_prob,
        gray_prob=config.gray_prob, blur_sigma=config.blur_sigma,
    )  # fmt: skip
    size, scale = data.pair(config.global_crop_size or data_config.image_size), config.global_crop_scale
    first = crop(size, scale, blur_prob=config.blur_prob[0])
    second = crop(size, scale, blur_prob=config.blur_prob[1], solarize_prob=config.solarize_prob)
    crops = {"global": [first, second]}
    if config.local_crops:
        local = crop(data.pair(config.local_crop_size), config.local_crop_scale, blur_prob=config.blur_prob[2])
        crops["local"] = [local] * config.local_crops
    return crops


def check(config: Config, epochs: float) -> None:
    """Raises UserError for values that cannot be used in a run of so many epochs."""
    check_limits("objective.", config)
    check_share("objective.", config, "global_crop_scale", "local_crop_scale")
    if not 0 < config.blur_sigma[0] <= config.blur_sigma[1]:
        raise UserError(f"objective.blur_sigma={list(config.blur_sigma)} must be two widths, 0 < low <= high.")
    if config.teacher_temp_warmup_epochs > epochs:
        raise UserError(
            f"objective.teacher_temp_warmup_epochs={config.teacher_temp_warmup_epochs:g} is longer than the run of "
            f"{epochs:g} epochs: lower it, or set it to 0 and teacher_temp to the value that you want."
        )


def build(config: Config, model: factory.Config, data_config: data.Config, steps_per_epoch: int, steps: int) -> "DINO":
    """Raises UserError for settings and models that cannot work."""
    check(config, steps / steps_per_epoch)
    size = data.image_size(data_config)
    student = factory.create(model, size, data_config.in_chans, drop_path=config.drop_path)
    teacher = factory.create(model, size, data_config.in_chans)
    if config.pool != "auto":
        if config.pool not in student.pools():
            raise UserError(f"objective.pool={config.pool} is not something that {model.name} has: use pool=auto.")
        student.pool = teacher.pool = config.pool
    if config.student_keep < 1 and (reason := student.why_tokens_cannot_be_dropped()):
        raise UserError(
            f"objective.student_keep={config.student_keep} drops patches, and {model.name} cannot: {reason}."
        )
    if config.init == "mae":
        student.init_xavier_sincos("objective.init=mae")
    if config.crop_wise_backward:
        _refuse_batch_norm(student, model.name)
    sizes = {crops[0].size for crops in views(config, data_config).values()}
    if sizes != {size} or not student.is_vit:
        _try_crops(sorted(sizes), teacher, model.name, config)
    return DINO(config, student, teacher, steps_per_epoch, steps)


@torch.no_grad()
def _try_crops(sizes: list[tuple[int, int]], encoder: Encoder, name: str, config: Config) -> None:
    """Run the model on crops of these sizes: model families accept different sizes, and few of them say which. Warn if
    local crops are larger than global ones."""
    (h, w), (H, W) = data.pair(config.local_crop_size), data.pair(config.global_crop_size or encoder.image_size)
    if config.local_crops and h * w > H * W:
        patch = encoder.patch_size[0] if encoder.is_vit else 32
        say(
            f"Warning: local crops of {h}x{w} pixels are larger than the global ones of {H}x{W}. The paper's share "
            f"would be objective.local_crop_size={max(1, round(H * 96 / 224 / patch)) * patch}."
        )
    for h, w in sizes:
        try:
            encoder.eval().features(torch.zeros(1, encoder.in_chans, h, w))
        except Exception as error:
            raise UserError(
                f"{name} for {'x'.join(map(str, encoder.image_size))} pixels does not take crops of {h}x{w} "
                f"({first_line(error)}): set objective.local_crop_size to a size that it takes, or objective."
                "local_crops=0."
            ) from error
    encoder.train()


class Network(nn.Module):
    """An encoder and a head: what the student and the teacher are."""

    def __init__(self, config: Config, encoder: Encoder, train_gain: bool) -> None:
        super().__init__()
        self.encoder, self.resampling = encoder, config.position_resampling
        widths = config.prototypes, config.hidden_dim, config.bottleneck_dim, config.head_layers
        self.head = PrototypeHead(encoder.feature_dim(), *widths, train_gain)

    def features(self, resolutions: Resolutions, keep: float = 1.0, encoder: Encoder | None = None) -> Tensor:
        """For each resolution crops [R, C, h, w] and their keys [R] -> [sum of R, D] float32 features.

        Crops of one resolution pass the encoder together (section 3.2). keep: share of the patches of the first
        resolution that the encoder sees, others for each crop. encoder: another one, in the place of its own.
        """
        encoder, features = encoder or self.encoder, []
        for i, (crops, key) in enumerate(resolutions):
            kept = None
            if keep < 1 and i == 0:
                num_patches = math.prod(encoder.grid((crops.shape[-2], crops.shape[-1])))
                kept = rng.permutation(rng.fold_in(key, "mask"), num_patches)[:, : max(1, round(num_patches * keep))]
            features.append(encoder.features(crops, key=key, keep=kept, resampling=self.resampling).float())
        return torch.cat(features)

    def forward(self, resolutions: Resolutions) -> Tensor:
        """The same -> [sum of R, K] float32 logits; all crops pass the head together."""
        return self.head(self.features(resolutions))


class DINO(Objective):
    takes_anchor = True
    center: Tensor
    logit_sum: Tensor
    logit_count: Tensor

    def __init__(self, config: Config, student: Encoder, teacher: Encoder, steps_per_epoch: int, steps: int) -> None:
        super().__init__()
        self.config, self.steps_per_epoch = config, steps_per_epoch
        self.ema = EMA(config.momentum, config.momentum_end, steps)
        self.student = Network(config, student, train_gain=not config.norm_last_layer)
        self.teacher = Network(config, teacher, train_gain=False)
        cls_token = getattr(student.model, "cls_token", None)
        if config.init == "vit" and cls_token is not None:
            # As the released ViT draws it; timm's standard deviation is 1e-6. By timm's function, as the numbers that
            # torch's draws differ between versions.
            trunc_normal_(cls_token, std=0.02)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, config.prototypes))
        # What the micro-batches of a step leave for after_step.
        self.register_buffer("logit_sum", torch.zeros(1, config.prototypes), persistent=False)
        self.register_buffer("logit_count", torch.zeros(()), persistent=False)

    def forward(self, views: dict[str, Any], step: int) -> dict[str, Tensor]:
        """{"key": [B], "global": [2, B, C, H, W], "local": [V, B, C, h, w]}, or one of `split` -> {"loss": scalar}."""
        if "part" in views:
            return self._forward_part(views["part"], step)
        resolutions = _resolutions(views)
        teacher_logits = self._teach(resolutions)
        features = self.student.features(resolutions, self.config.student_keep)
        values = self.loss(self.student.head(features), teacher_logits, self.teacher_temp(step))
        values |= differences(views["global"][0], features[: len(teacher_logits)])
        if self.config.koleo_weight:
            spread = koleo(features[: len(teacher_logits)].unflatten(0, (2, -1)))
            values["koleo"] = spread
            values["loss"] = values["loss"] + self.config.koleo_weight * spread
        if self.anchor:
            self._hold(values, features[: len(teacher_logits)], resolutions[:1])
        return values

    def _hold(self, values: dict[str, Tensor], features: Tensor, resolutions: Resolutions) -> None:
        """Add the anchor's term for the global crops, of which the frozen encoder sees the same patches."""
        assert self.anchor is not None
        keep = self.config.student_keep
        self.anchor.add(values, features, lambda start: self.student.features(resolutions, keep, start))

    def loss(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> dict[str, Tensor]:
        """[(2 + V) * B, K] and [2 * B, K], view after view -> the cross-entropy -P_t log P_s (equation 3): the mean
        of the 2 (1 + V) pairs of a teacher crop t and another student crop s."""
        target = self._target(teacher_logits, teacher_temp)
        first, second = target.chunk(2)
        num_views = len(student_logits) // len(first)
        # For student crop s the targets of all its pairs add up: the other global crop, or for a local crop both.
        targets = torch.cat([second, first, *[first + second] * (num_views - 2)])
        log_p = (student_logits / self.config.student_temp).log_softmax(dim=-1)
        pairs = 2 * (num_views - 1)
        loss = -(targets * log_p).sum() / (len(first) * pairs)
        return {"loss": loss, **_entropies(target)}

    def _target(self, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        return ((teacher_logits - self.center) / teacher_temp).softmax(dim=-1)

    @torch.no_grad()
    def _teach(self, resolutions: Resolutions, parts: int = 1) -> Tensor:
        """The teacher's logits of the global crops, which count for the center. parts: the encoder takes the crops in
        so many parts, to save memory. The head takes them together: each call reads all prototypes, which is slow."""
        size = math.ceil(len(resolutions[0][0]) / parts)
        pieces = zip(*(tensor.split(size) for tensor in resolutions[0]), strict=True)
        logits: Tensor = self.teacher.head(torch.cat([self.teacher.features([piece]) for piece in pieces]))
        self.logit_sum += logits.sum(dim=0, keepdim=True)
        self.logit_count += len(logits)
        return logits

    def split(self, views: dict[str, Tensor]) -> list[dict[str, Any]]:
        """With crop_wise_backward about PARTS of them: rows of one resolution. KoLeo needs global crops whole."""
        return self._cut(views) if self.config.crop_wise_backward else [views]

    def _cut(self, views: dict[str, Tensor]) -> list[dict[str, Any]]:
        batch = Batch(_resolutions(views), len(views["key"]))
        sizes = [crops.numel() for crops, _ in batch.resolutions]
        parts = []
        for i, (crops, _) in enumerate(batch.resolutions):
            crop_whole = i == 0 and self.config.koleo_weight
            length = batch.images if crop_whole else math.ceil(len(crops) / math.ceil(PARTS * sizes[i] / sum(sizes)))
            parts += [{"part": Part(batch, i, slice(k, k + length))} for k in range(0, len(crops), length)]
        return parts

    def _forward_part(self, part: "Part", step: int) -> dict[str, Tensor]:
        """The share of these crops in what `forward` gives. The first part asks the teacher. The last part of global
        crops adds the measures of `differences`."""
        config, batch = self.config, part.batch
        values: dict[str, Tensor] = {}
        if batch.target is None:
            batch.target = self._target(self._teach(batch.resolutions, PARTS), self.teacher_temp(step))
            values = _entropies(batch.target)
        crops, keys = (tensor[part.rows] for tensor in batch.resolutions[part.resolution])
        is_global = part.resolution == 0
        features = self.student.features([(crops, keys)], config.student_keep if is_global else 1.0)
        log_p = (self.student.head(features) / config.student_temp).log_softmax(dim=-1)
        # The image of each crop, or for a global crop the other one of its image, in the order of the targets.
        rows = torch.arange(part.rows.start, part.rows.start + len(crops), device=crops.device)
        rows = (rows + batch.images) % (2 * batch.images) if is_global else rows % batch.images
        targets = batch.target[rows] if is_global else batch.target[rows] + batch.target[rows + batch.images]
        num_views = sum(len(crops) for crops, _ in batch.resolutions) // batch.images
        values["loss"] = -(targets * log_p).sum() / (batch.images * 2 * (num_views - 1))
        if is_global:
            batch.features.append(features.detach())
            if part.rows.stop >= 2 * batch.images:
                values |= differences(batch.resolutions[0][0][: batch.images], torch.cat(batch.features))
        if is_global and config.koleo_weight:
            values["koleo"] = koleo(features.unsqueeze(0))
            values["loss"] = values["loss"] + config.koleo_weight * values["koleo"]
        if is_global and self.anchor:  # a mean over the crops of the part, so these are their share of it
            held = {"loss": features.new_zeros(())}
            self._hold(held, features, [(crops, keys)])
            share = len(crops) / (2 * batch.images)
            values |= {name: values.get(name, 0.0) + share * value for name, value in held.items()}
        return values

    def save_memory(self) -> Config | None:
        if self.config.crop_wise_backward is not None or _has_batch_norm(self.student):
            return None
        self.config = replace(self.config, crop_wise_backward=True)
        return self.config

    def teacher_temp(self, step: int) -> float:
        """Rises linearly. A warm-up of whole epochs is a linspace that includes both ends and changes once an epoch, as
        in the released code. Another one changes every step."""
        config, warmup = self.config, self.config.teacher_temp_warmup_epochs
        epoch, whole = step / self.steps_per_epoch, warmup == int(warmup)
        if epoch >= warmup:
            return config.teacher_temp
        share = int(epoch) / max(1, warmup - 1) if whole else epoch / warmup
        return config.teacher_temp_start + (config.teacher_temp - config.teacher_temp_start) * share

    def before_step(self, step: int) -> None:
        """Freeze the prototypes at first, as in the released code. AdamW skips what has no gradient; with a gradient of
        zeros it would decay them."""
        if step < self.config.freeze_last_layer_epochs * self.steps_per_epoch:
            for parameter in self.student.head.last_layer.parameters():
                parameter.grad = None

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the teacher and the center (algorithm 1). The center of a step is the one before it: equation 4 comes
        after the loss."""
        self.ema.update(self.teacher, self.student, step)
        mean = all_reduce_sum(self.logit_sum) / (self.logit_count * world_size())
        self.center.lerp_(mean, 1 - self.config.center_momentum)
        self.logit_sum.zero_()
        self.logit_count.zero_()

    def exported_encoder(self) -> Encoder:
        return self.teacher.encoder

    def shard_units(self) -> list[nn.Module]:
        return [self.student.head, self.teacher.head]

    def set_steps(self, steps: int) -> bool:
        self.ema = replace(self.ema, steps=steps)
        return True

    def scheduled(self, step: int) -> dict[str, float]:
        return {"momentum": self.ema.momentum(step), "teacher_temp": self.teacher_temp(step)}

    def alarm(self, values: dict[str, float]) -> str | None:
        return alarm(self.config, values)


def alarm(config: Config, values: dict[str, float]) -> str | None:
    """See section 5.3, "avoiding collapse". With KoLeo nothing is said: its runs learn all the same."""
    if getattr(config, "koleo_weight", 0):
        return None
    highest = math.log(config.prototypes)
    if values["teacher_entropy"] > 0.99 * highest:
        return (
            f"DINO has collapsed to one even answer: the teacher's entropy is {values['teacher_entropy']:.3f} of "
            f"ln({config.prototypes}) = {highest:.3f}, so it tells no images apart. Lower objective."
            "teacher_temp or optim.base_lr, or raise optim.warmup_epochs."
        )
    if values.get("teacher_mean_entropy", highest) < 0.1:
        return (
            "DINO has collapsed to one prototype: the teacher gives it to all images (entropy of its mean answer "
            f"{values['teacher_mean_entropy']:.3f}). Lower objective.center_momentum to 0.9, raise objective."
            "teacher_temp, lower optim.base_lr, or freeze the prototypes longer (freeze_last_layer_epochs)."
        )
    return None


@dataclass
class Batch:
    """A micro-batch that is cut into parts."""

    resolutions: Resolutions
    images: int
    target: Tensor | None = None  # [2 * B, K] of the teacher, which the first part computes
    features: list[Tensor] = field(default_factory=list)  # of the student, of the parts of global crops so far


@dataclass
class Part:
    batch: Batch
    resolution: int
    rows: slice  # of the resolution's crops


def _resolutions(views: dict[str, Tensor]) -> Resolutions:
    """Global crops, then local ones, each with their keys: view after view, the images of a view side by side."""
    return [
        (views[name].flatten(0, 1), torch.cat([crop_key(views["key"], name, v) for v in range(len(views[name]))]))
        for name in ("global", "local")
        if name in views
    ]


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in module.modules())


def _refuse_batch_norm(encoder: Encoder, name: str) -> None:
    if _has_batch_norm(encoder):
        raise UserError(
            f"objective.crop_wise_backward=true cuts a batch into parts, and {name} normalises whole batches "
            "(BatchNorm): leave it out, and give a smaller batch_size to save memory."
        )


def _entropies(target: Tensor) -> dict[str, Tensor]:
    """[2 * B, K] -> what is logged of the teacher's answers."""
    first, second = target.argmax(dim=-1).chunk(2)
    values = {"teacher_entropy": _entropy(target).mean(), "teacher_agreement": (first == second).float().mean()}
    if len(target) >= 2 * ENOUGH_IMAGES:
        values["teacher_mean_entropy"] = _entropy(target.mean(dim=0))
    return values


def _entropy(p: Tensor) -> Tensor:
    """[..., K] probabilities -> [...] nats."""
    return -(p * p.clamp(min=1e-12).log()).sum(dim=-1)
