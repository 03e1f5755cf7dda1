"""One model split among all processes (FSDP2): each keeps its part of every weight, gradient and moment, and has the
whole of a block's weights while that block runs.

Through torch's own `fully_shard`, not accelerate's plugin for it, which knows no CPUs: without a GPU nothing of it
could be tested. What accelerate adds would not serve either: clipping of single tensors, the agreement on skipped steps
and the teacher's average work on the parts, and checkpoints are the run's own. What it does for autocast is used.

Weights are float32 and travel as such, and autocast casts them where they are used, as with DDP: a run gives the same
numbers whether it is sharded or not, but for the order of additions. In bf16 the casts of the student's weights, two
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

    Of a sharded objective it is a copy that has weights as long as the `with` lasts: a pass through the parts would
    need all processes for each batch, and they have different numbers of batches.
    """

    def __init__(self, encoder: Encoder, device: torch.device | None = None) -> None:
        """device: of the copy; None: show the encoder itself."""
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
    """Bring an objective to the device, split among the processes if that is wanted and there are several. Raises
    UserError."""
    if wanted and world_size() > 1:
        eval_encoder = EvalEncoder(objective.exported_encoder(), device)
        split(objective, device)
        return eval_encoder
    if wanted:
        say("shard=true splits the model among processes, and this is the only one: it has no effect.")
    objective.to(device)
    return EvalEncoder(objective.exported_encoder())


def split(objective: Objective, device: torch.device) -> None:
    """Unit by unit, so that what does not fit on the device as a whole never is there as a whole."""
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
    """As accelerate wraps them for training. A sharded objective only gets autocast: it averages its gradients itself,
    after each micro-batch, as keeping the whole ones until the last would take the memory that sharding saves."""
    if not any(map(is_sharded, objective.parameters())):
        return accelerator.prepare(objective, optimizer)
    model = accelerator.prepare_model(objective, device_placement=False, evaluation_mode=True)
    return model, accelerator.prepare_optimizer(optimizer)
