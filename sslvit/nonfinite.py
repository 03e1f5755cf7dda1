"""Steps whose loss or gradients are not finite: skipped on the device, written down, and too many in a row end the run.

Whether a step is skipped is decided by a number that stays on the device (AdamW's fused kernel reads it), so no step
waits for it; the host looks when a line of the log or a checkpoint is due.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from .checkpoints.journal import NONFINITE
from .checkpoints.state import RunState, steps_saved
from .data import Source
from .distributed import gather_objects
from .errors import UserError
from .metrics import Window


class SkippedSteps:
    """Names the images of skipped steps in nonfinite.jsonl, with the losses, and stops a run that has too many of them
    in a row."""

    def __init__(self, run_dir: Path, source: Source, limit: int) -> None:
        self.run_dir, self.source, self.limit = run_dir, source, limit
        self.index: list[Tensor] = []  # of the micro-batches since the last look

    def note(self, index: Tensor) -> None:
        """Image numbers of a micro-batch."""
        self.index.append(index)

    def poll(self, window: Window, run: RunState) -> tuple[list[str], list[str]]:
        """(lines for nonfinite.jsonl, sentences to say), on all processes, when they meet at a line or a checkpoint.
        The counts in `run` go on."""
        recent, window.recent = window.recent, []
        index, self.index = self.index, []
        flags = torch.stack([skip for skip, _ in recent]).tolist() if recent else []
        lines, first = [], run.step - len(recent) + 1
        for place, flag in enumerate(flags):
            run.skipped_in_a_row = run.skipped_in_a_row + 1 if flag else 0
            run.skipped += bool(flag)
            if flag:  # the same on all processes
                losses = recent[place][1]
                at = place * len(losses)
                names = [[self.source.name(i) for i in micro.tolist()] for micro in index[at : at + len(losses)]]
                mine = {"losses": [str(loss.item()) for loss in losses], "images": names}  # JSON has no nan
                lines.append(json.dumps({"step": first + place, "processes": gather_objects(mine)}) + "\n")
        if not lines:
            return [], []
        return lines, [
            f"Warning: {len(lines)} of the last {len(recent)} steps skipped: loss or gradients not finite; "
            f"see {self.run_dir / NONFINITE}."
        ]

    def stop_if_too_many(self, run: RunState) -> None:
        """Raises UserError."""
        if run.skipped_in_a_row < self.limit:
            return
        saved = steps_saved(self.run_dir)
        good = f"The last checkpoint, of step {saved[-1]}, is from before" if saved else "There is no checkpoint yet"
        raise UserError(
            f"The run has diverged: the last {run.skipped_in_a_row} steps up to {run.step} were skipped, as their "
            f"loss or gradients are not finite (log.max_nonfinite={self.limit}). {good}; the images are in "
            f"{self.run_dir / NONFINITE}. Lower optim.base_lr, lengthen optim.warmup_epochs, set optim.clip=1, or try "
            "precision=float32, in another out=."
        )
