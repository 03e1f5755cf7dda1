"""Reach the Hugging Face hub, or say at once that it cannot be reached."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from .errors import printable

REACH = 5.0  # seconds in which the hub has to answer


@contextmanager
def without_retries() -> Iterator[str]:
    """Yields "", or the name of the hub if it cannot be reached. In that case only weights in the cache are found, and
    nothing waits: huggingface_hub alone would try again for a minute."""
    from huggingface_hub import constants, utils

    forget = getattr(utils, "reset_sessions", lambda: None)  # before version 1, a session stays offline or online
    hub, before, lost = urlsplit(constants.ENDPOINT), constants.HF_HUB_OFFLINE, ""
    if not getproxies():
        try:
            socket.create_connection((hub.hostname or "", hub.port or 443), timeout=REACH).close()
        except OSError:
            lost = str(hub.hostname)
    constants.HF_HUB_OFFLINE = before or bool(lost)
    forget()
    try:
        yield lost
    finally:
        constants.HF_HUB_OFFLINE = before
        forget()


def why(error: Exception, lost: str = "") -> str:
    """What went wrong, for a message. lost: what `without_retries` yielded."""
    if lost and (isinstance(error, OSError) or not isinstance(error, ValueError)):  # a name can be wrong without a hub
        return f"{lost} cannot be reached, and they are not in this machine's cache"
    return f"{type(error).__name__}: {printable((str(error).strip().splitlines() or [''])[0][:200])}"
