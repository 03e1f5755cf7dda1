"""Settings that the user did not give: look.py (facts of the images), speed.py (of the machine), choose.py (the rules,
with their evidence: facts, machine and time -> choices). `load` puts them together for `sslvit pretrain`.

May import everything but the command line; torch only inside of functions.
"""

from .. import config as configuration
from ..config import DURATIONS, RunConfig

TIMES = {"minutes", "hours"}
ASKED = ("minutes=", "hours=")


def load(arguments: list[str], began: float) -> RunConfig:
    """The configuration of `sslvit pretrain`: as it is written if it names a recipe or a length. Otherwise, or for
    settings=auto, what is not given is chosen. With a time, the length follows in any case. Raises UserError.
    began: when the command did, by time.monotonic()."""
    recipe, _, pairs = configuration.sort(arguments)
    timed, length = (not set(dict(pairs)).isdisjoint(names) for names in (TIMES, DURATIONS))
    free = recipe is None and (timed or not length)
    automatic = dict(pairs).get("settings", "auto" if free else "") == "auto"
    if not automatic and not timed:
        return configuration.load(arguments)
    configuration.check(configuration.load([word for word in arguments if not word.lstrip("-").startswith(ASKED)]))
    from . import resolve  # imports torch, which takes seconds: mistakes in the arguments are found before

    return (resolve.automatic if automatic else resolve.timed)(arguments, pairs, began)
