"""MAE or DINO whose loss is not a number where the configuration says so: `method=tests.nan_objective`."""

from dataclasses import dataclass

import torch

from sslvit.distributed import rank
from sslvit.objectives import dino, mae

DEFAULTS = mae.DEFAULTS


@dataclass
class Config(mae.Config):
    nan_steps: tuple[int, ...] = ()  # steps, from 0, whose loss is broken ...
    nan_rank: int = 0  # ... on one process
    nan_images: bool = False  # DINO instead of MAE, whose images are broken: they reach the teacher and the center


def views(config, data_config):
    return dino.views(SMALL, data_config) if config.nan_images else mae.views(config, data_config)


SMALL = dino.Config(prototypes=64, hidden_dim=32, bottleneck_dim=16, local_crops=2, local_crop_size=16)


def build(config, model, data_config, steps_per_epoch, steps):
    method = dino if config.nan_images else mae
    objective = method.build(SMALL if config.nan_images else config, model, data_config, steps_per_epoch, steps)
    forward = objective.forward

    def broken(views, step):
        if step not in config.nan_steps or rank() != config.nan_rank:
            return forward(views, step)
        if config.nan_images:
            return forward({k: v if k == "key" else v * torch.nan for k, v in views.items()}, step)
        values = forward(views, step)
        return {**values, "loss": values["loss"] * torch.nan}

    objective.forward = broken
    return objective
