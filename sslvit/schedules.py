"""Learning rate, weight decay, momentum and temperature as pure functions of the step.

Nothing here remembers anything, so a run resumes and is extended without replaying a scheduler.
"""

import math


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1, constant after."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(progress, 1.0)))


def warmup_cosine(step: int, peak: float, end: float, warmup_steps: int, total_steps: int) -> float:
    """MAE's learning rate: linear from exactly 0 at step 0 to `peak` at step `warmup_steps`, then half a cosine that
    would reach `end` at step `total_steps`, one step after the last (MAE, appendix A.1, evaluated at each step)."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return cosine(peak, end, (step - warmup_steps) / max(1, total_steps - warmup_steps))


def linspace_cosine(step: int, peak: float, end: float, warmup_steps: int, total_steps: int) -> float:
    """DINO's learning rate: the warm-up is a linspace that includes the peak, so step `warmup_steps - 1` and step
    `warmup_steps` both have it; then half a cosine over the remaining steps (DINO, section 3.2 and its released
    code)."""
    if step < warmup_steps:
        return peak * step / (warmup_steps - 1) if warmup_steps > 1 else 0.0
    return cosine(peak, end, (step - warmup_steps) / max(1, total_steps - warmup_steps))


def teacher_temperature(epoch: float, start: float, end: float, warmup_epochs: float) -> float:
    """DINO's teacher temperature: a linspace over the warm-up epochs that includes both ends, then constant. The
    published code changes it once an epoch: pass whole epochs for that. A warm-up of a fraction of epochs is linear."""
    if epoch >= warmup_epochs:
        return end
    if warmup_epochs != int(warmup_epochs):
        return start + (end - start) * epoch / warmup_epochs
    return start + (end - start) * min(1.0, epoch / (warmup_epochs - 1)) if warmup_epochs > 1 else start
