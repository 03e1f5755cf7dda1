"""One model split among all processes (FSDP2). Each process keeps its part of every weight, gradient and moment. It has
a block's whole weights while that block runs.

This uses torch's `fully_shard`. accelerate's plugin for it needs a GPU, so it could not be tested, and its extras are
not needed: clipping, skipped steps and the teacher's average work on the parts, and checkpoints are the run's own.

Weights are float32, also on the way between processes, and autocast casts them where they are used, as with DDP. So a
sharded run gives the same numbers, except for the order of additions. In bf16 the cast weights of the student, two
bytes each, stay until the backward pass.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from timm.models.vision_transformer import Block
from torch import nn

from .distributed import full_tensor, is_sharded, say, shard, world_size
from .errors import UserError
from .model.blocks import let_take_rows
from .model.encoder import Encoder
from .objectives import Objective


class EvalEncoder:
    """The exported encoder as evaluations run it: `with eval_encoder() as encoder`, on all processes together.

    For a sharded objective it is a copy, which has weights as long as the `with` lasts. The parts themselves would need
    all processes for each batch, and processes have different numbers of batches.
    """

    def __init__(self, encoder: Encoder, device: torch.device | None = None) -> None:
        """device: of the copy; None: give the encoder itself."""
        self.encoder = encoder
        # Copied now, as torch copies no modules that are sharded.
        self.copy = None if device is None else copy.deepcopy(encoder)
        if self.copy is not None:
            self._empty(self.copy)
            self.copy.to(device)

    @contextmanager
    def __call__(self) -> Iterator[Encoder]:
        if self.copy is None:
            yield self.encoder
            return
        with torch.no_grad():
            for mine, sharded in zip(self.copy.parameters(), self.encoder.parameters(), strict=True):
                mine.data = full_tensor(sharded.detach())
            for own, buffer in zip(self.copy.buffers(), self.encoder.buffers(), strict=True):
                own.copy_(buffer)
        try:
            yield self.copy
        finally:
            self._empty(self.copy)

    @staticmethod
    def _empty(encoder: Encoder) -> None:
        for parameter in encoder.parameters():
            parameter.data = parameter.data.new_empty(0)


def place(objective: Objective, device: torch.device, wanted: bool) -> EvalEncoder:
    """Bring an objective to the device, split if that is wanted and there are several processes. Raises UserError."""
    if wanted and world_size() > 1:
        eval_encoder = EvalEncoder(objective.exported_encoder(), device)
        split(objective, device)
        return eval_encoder
    if wanted:
        say("shard=true splits the model among processes, and this is the only one: it has no effect.")
    objective.to(device)
    return EvalEncoder(objective.exported_encoder())


def split(objective: Objective, device: torch.device) -> None:
    """Unit by unit: the device never holds the whole model."""
    for name, parameter in objective.named_parameters():
        if parameter.ndim == 0:
            raise UserError(f"shard=true cannot split {name}, which is a single number: leave it out for this model.")
    parts = units(objective)
    for module in parts:
        let_take_rows(module)
    shard([*parts, objective], device)


def units(objective: Objective) -> list[nn.Module]:
    """The modules whose weights come and go together, inner ones first: the blocks of student, teacher and decoder, and
    `objective.shard_units()`. What lies outside of them (embeddings, norms) is whole from a forward to the end of its
    backward pass."""
    found = set(objective.shard_units())
    for module in objective.modules():
        for name, child in module.named_children():
            if name.endswith("blocks") and isinstance(child, (nn.ModuleList, nn.Sequential)):
                found |= set(child)  # families have blocks of their own
    return [module for module in objective.modules() if module in found or isinstance(module, Block)][::-1]


def prepare(
    accelerator: Accelerator, objective: Objective, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As accelerate wraps them for training. A sharded objective only gets autocast. It averages its gradients itself,
    after each micro-batch: whole gradients, kept until the last one, would take the memory that sharding saves."""
    if not any(map(is_sharded, objective.parameters())):
        return accelerator.prepare(objective, optimizer)
    model = accelerator.prepare_model(objective, device_placement=False, evaluation_mode=True)
    return model, accelerator.prepare_optimizer(optimizer)
