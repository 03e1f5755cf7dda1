"""A run that ends in time (minutes=): its number of steps follows from its speed, and is corrected on the way.

A run has one number of steps, that of its config.yaml: starting from this file gives the same run, bit for bit. So a
correction must not change what is done. It is made only if every schedule has the same values at all steps so far with
the old number and with the new one (`unchanged`). optim.lr_schedule=hold leaves most room: nothing depends on the
length until 70 % of the run. With a cosine the warm-up is all, so the speed is measured before it, see settings/.
"""

import math
import time
from dataclasses import replace

from .checkpoints.state import RunState
from .config import Plan
from .distributed import gather_objects
from .objectives import Objective
from .schedule import HOLD, Schedule

BETWEEN = 1.15  # a correction comes after so many times the steps of the one before ...
EARLIEST = 0.04  # ... and not before this share of the time is over: the first steps say little
RECENT = 0.3  # share of the steps so far in which the speed is measured
CLOSE = 0.005  # of the number of steps; a smaller correction is not worth a new config.yaml
CLOSING = 4.0  # seconds for the last checkpoint and the end of the process
COMPARED = 100  # steps so far whose schedules are compared


class Pace:
    """Says after a step how many steps the whole run should have, to end in time."""

    def __init__(self, end: float, run: RunState, plan: Plan) -> None:
        """end: of the whole command, by time.monotonic(), if this is its first start. run: where this start begins."""
        self.end, self.next, self.warmup_steps = end - run.seconds - CLOSING, run.step + 1, plan.warmup_steps
        self.marks: list[tuple[int, float]] = []  # step, and when it was done

    def steps(self, step: int, steps: int, closing: float) -> int | None:
        """A better number than `steps`, after this step; None if none is due. All processes call it together.
        closing: seconds that the run needs after its last step."""
        if step < self.next:
            return None
        self.marks.append((step, time.monotonic()))  # the first step, which is slower than others, is not measured
        self.next = max(step + 1, math.ceil(self.marks[0][0] + BETWEEN * (step - self.marks[0][0])))
        now, end = self.marks[-1][1], self.end - closing
        since = step - RECENT * (step - self.marks[0][0])
        before, then = next(mark for mark in self.marks if mark[0] >= since)
        if before == step and len(self.marks) > 1:
            before, then = self.marks[-2]
        spent = now - self.marks[0][1]
        enough = spent > EARLIEST * (end - self.marks[0][1]) and step > before
        wanted = step + max(0.0, end - now) * (step - before) / max(1e-6, now - then) if enough else steps
        least = math.ceil(max(step, self.warmup_steps) / HOLD) + 1
        new = max(math.ceil(gather_objects(wanted)[0]), min(steps, least))
        return new if abs(new - steps) > CLOSE * steps and step < steps else None


def unchanged(schedule: Schedule, objective: Objective, step: int, steps: int) -> Schedule | None:
    """The schedule of a run of so many steps, which the objective then has too. None, and nothing is changed, if a step
    before `step` would have been another one."""
    new, old = replace(schedule, total_steps=steps), schedule.total_steps
    done = {*range(0, step, max(1, step // COMPARED)), step - 1}
    before = {s: (schedule.lr(s), schedule.weight_decay(s), objective.scheduled(s)) for s in done}
    if not objective.set_steps(steps):
        return None
    if before == {s: (new.lr(s), new.weight_decay(s), objective.scheduled(s)) for s in done}:
        return new
    objective.set_steps(old)
    return None
