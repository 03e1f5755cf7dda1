"""Writing safetensors files."""

from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A new file, which others may read as any other file of this user: safetensors' own are for their owner only.
    Raises OSError or SafetensorError."""
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    with suppress(OSError):  # file systems without modes
        path.chmod(mode)
