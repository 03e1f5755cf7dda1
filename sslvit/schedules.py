"""Learning rate, weight decay and momentum as pure functions of the step.

Nothing here remembers anything, so a run resumes and is extended without replaying a scheduler.
"""

import math


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1, constant after."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(progress, 1.0)))


def warmup_cosine(
    step: int, peak: float, end: float, warmup_steps: int, total_steps: int, linspace: bool = False
) -> float:
    """Linear from 0 at step 0 to `peak` at step `warmup_steps`, then half a cosine that reaches `end` at step
    `total_steps`, one after the last (MAE, appendix A.1). linspace: the peak comes one step earlier (DINO's code)."""
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps - linspace)
    return cosine(peak, end, (step - warmup_steps) / max(1, total_steps - warmup_steps))
