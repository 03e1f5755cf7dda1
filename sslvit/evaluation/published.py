"""The papers' own linear probes, for comparison with their tables: `sslvit linear protocol=mae` or `protocol=dino`.

Each epoch passes a new random crop of every image through the frozen encoder and trains one head.

mae   He et al., appendix A.1, and the released code: class token after the final norm, BatchNorm without affine
      parameters (eps 1e-6), LARS at 0.1 x batch / 256, batch 16384, no weight decay, 90 epochs of which 10 warm up,
      half a cosine for each step, crops of 0.08 to 1 of the area (one draw, clamped to the image, bicubic), flips.
dino  Caron et al., section 4.1, and the released code: class tokens of the last four blocks, SGD with momentum 0.9 at
      0.001 x batch / 256, batch 1024, no weight decay, 100 epochs, half a cosine for each epoch, crops of 0.08 to 1 of
      the area (bilinear), flips. For a ViT-B the code takes `pool=cls+mean`.

BatchNorm sees 512 features at once, as on each of the paper's GPUs. A shorter run warms up for the same share of its
epochs. The result is that of the last epoch, so the test images are used once. Both released codes report the best
epoch on the test images instead. `epochs=`, `global_batch_size=`, `lr=[...]` (one rate, at a batch of 256) and `pool=`
change the protocol, and the result says so. The encoder runs in the configured precision, theirs in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import optim, rng
from ..data.augment import augment
from ..data.crops import Crop, Views
from ..data.loader import Layout, make_loader
from ..distributed import gather_objects, on_first_process, rank, say, world_size
from ..errors import UserError
from ..hardware import default_workers
from ..model.encoder import Pool
from ..optim import LARS
from . import pictures, protocol
from .classes import check_readable, labels_of
from .frozen import Frozen, describe_pool
from .probes import ProbeConfig, report
from .records import describe_set

IGNORED = -1  # the label of an image without one
NORMED = 512  # features that BatchNorm normalises together


@dataclass(frozen=True)
class Published:
    """One paper's protocol."""

    pool: Pool
    lr: float  # at a batch of 256 images
    global_batch_size: int
    epochs: int
    warmup_epochs: int
    batch_norm: bool
    crop: dict[str, Any]
    by_epoch: bool  # whether the learning rate changes between epochs only


PROTOCOLS = {
    "mae": Published("cls", 0.1, 16384, 90, 10, True, {"interpolation": "bicubic", "tries": 1}, False),
    "dino": Published("last4", 0.001, 1024, 100, 0, False, {"interpolation": "bilinear"}, True),
}


def run(
    config: ProbeConfig, name: str, lr: float | None, epochs: int | None, global_batch_size: int | None
) -> dict[str, Any]:
    """Train the head on random crops, test it once; prints and writes <run>/eval/linear_<name>.json. Raises UserError.

    lr (at a batch of 256 images), epochs, global_batch_size: None for the published value.
    """
    pictures.check(config.picture)
    published = PROTOCOLS[name]
    frozen, split = protocol.open_split(config, "linear")
    encoder, accelerator, train = frozen.encoder, frozen.accelerator, split.train
    if not encoder.is_vit:
        raise UserError(f"protocol={name} is for plain ViTs, and run={config.run} is none: leave protocol= out.")
    pool = published.pool if config.pool == "auto" else frozen.pool
    if pool not in encoder.pools():
        raise UserError(
            f"protocol={name} reads {describe_pool(pool)}, which {config.run} has not: give pool= one of "
            f"{', '.join(encoder.pools())}."
        )
    lr = lr or published.lr
    asked = global_batch_size or published.global_batch_size
    layout = _layout(config, min(asked, len(train)))
    total = layout.global_batch_size
    epochs, steps_per_epoch = epochs or published.epochs, len(train) // total
    warmup_steps = round(published.warmup_epochs * epochs / published.epochs * steps_per_epoch)
    instead = "" if total == asked else f" instead of {asked}"
    say(
        f"linear probe of {config.run}, protocol {name}: {describe_pool(pool)}, {frozen.precision}; {epochs} "
        f"epochs of {steps_per_epoch} steps, batch {total}{instead}, learning rate {lr * total / 256:g}"
    )
    head = Head(encoder.feature_dim(pool), len(train.classes), published.batch_norm, config.seed).to(accelerator.device)
    make = LARS if published.batch_norm else partial(torch.optim.SGD, momentum=0.9)
    optimizer = make(list(head.parameters()), lr=0.0, weight_decay=0.0)
    views = {"view": [Crop(encoder.image_size, (0.08, 1.0), **published.crop)]}
    workers = default_workers(accelerator.device) if config.workers is None else config.workers
    steps = epochs * steps_per_epoch
    batches = iter(make_loader(train, views, layout, config.seed, (0, steps), workers, accelerator.device))
    labels = labels_of(train)
    encoder.eval()
    for step in range(steps):
        epoch, place = divmod(step, steps_per_epoch)
        at = epoch * steps_per_epoch if published.by_epoch else step
        optimizer.param_groups[0]["lr"] = optim.warmup_cosine(at, lr * total / 256, 0.0, warmup_steps, steps)
        features, targets = _global_batch(batches, layout, frozen, views, pool, labels, split.specs[0])
        optimizer.zero_grad()
        loss = head.loss(features.to(accelerator.device), targets.to(accelerator.device))
        loss.backward()
        optimizer.step()
        if place == steps_per_epoch - 1:
            say(f"epoch {epoch + 1}/{epochs}  loss {loss.item():.4f} in the last step")
    test = frozen.extract(split.test, (pool,), config.cache)[pool]
    check_readable(labels, test.labels, split.specs)
    has_label = test.labels >= 0
    head.eval().cpu()
    with torch.no_grad():
        predictions = head(test.values[has_label]).argmax(dim=1)
    how = f"by the protocol of {name}"
    results = on_first_process(lambda: report(config, train.classes, predictions, test.labels[has_label], how))
    changed = {"epochs": (epochs, published.epochs), "global_batch_size": (total, published.global_batch_size),
               "lr": (lr, published.lr), "pool": (pool, published.pool)}  # fmt: skip
    departures = {key: {"here": here, "published": theirs} for key, (here, theirs) in changed.items() if here != theirs}
    for key, values in departures.items():
        say(f"not as published: {key} is {values['here']}, published {values['published']}")
    frozen.save(
        f"linear_{name}", results, train=describe_set(split.specs[0], len(train)),
        test=describe_set(split.specs[1], len(test), test.unreadable), classes=len(train.classes),
        features=describe_pool(pool), departures=departures,
    )  # fmt: skip
    return results


class Head(nn.Module):
    """BatchNorm without affine parameters, if the protocol has it, and a linear classifier: N(0, 0.01), bias 0."""

    def __init__(self, width: int, num_classes: int, batch_norm: bool, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6) if batch_norm else nn.Identity()
        self.linear = nn.Linear(width, num_classes)
        torch.manual_seed(int(rng.fold_in(seed, "published")))
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """[B, D] features of a global batch, [B] -> mean cross-entropy. BatchNorm sees parts of 512, as on each of the
        paper's GPUs, for any number of processes and micro-batches."""
        size = NORMED if len(x) % NORMED != 1 else NORMED + 1
        logits = torch.cat([self(part) for part in x.split(size)])
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / len(x)


def _layout(config: ProbeConfig, total: int) -> Layout:
    """How a global batch of at most `total` images is split into processes and micro-batches."""
    size = min(config.batch_size, max(1, total // world_size()))
    return Layout(size, max(1, total // (size * world_size())), world_size(), rank())


def _global_batch(
    batches: Iterator[dict[str, Any]], layout: Layout, frozen: Frozen, views: Views, pool: Pool, labels: Tensor,
    spec: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Frozen features and labels of one step's crops, of all processes in the global order. Raises UserError on all of
    them."""
    encoder, accelerator = frozen.encoder, frozen.accelerator
    mine, failed = [], False
    for _ in range(layout.accumulate):
        batch = next(batches)
        batch.pop("bad")  # another image took the place of each, with its own label
        failed |= batch.pop("failed", False)
        if failed:
            break
        targets = labels[batch["index"]]
        x = augment(batch, views, frozen.normalize, accelerator.device)["view"][0]
        with torch.inference_mode(), accelerator.autocast():
            mine.append((encoder.features(x, pool).float().cpu(), targets))
    parts = gather_objects((mine, failed))
    if any(failed for _, failed in parts):
        raise UserError(f"Many images in a row of {spec} cannot be read.")
    in_order = [parts[process][0][micro] for micro in range(layout.accumulate) for process in range(layout.world_size)]
    return torch.cat([features for features, _ in in_order]).clone(), torch.cat([targets for _, targets in in_order])
