"""The energy that a run takes, where the machine counts it: CPU packages on Linux (RAPL), GPUs by NVML.

A column is written only while it counts everything: once a counter of any machine cannot be read, the column ends.
Steps that are lost by a kill are not counted, as in `seconds`.
"""

import importlib
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing torch takes seconds, and a page needs the names of the columns alone
    import torch

POWERCAP = Path("/sys/class/powercap")  # Intel and AMD; often only root may read it
ENERGY_COLUMNS = ("cpu_kwh", "gpu_kwh")  # of metrics.jsonl
OFTEN = (
    30.0  # seconds from one reading to the next. A counter of a package returns to 0, after a minute at the earliest
)
MICROJOULES = 3.6e12  # of a kWh
MOST_WATTS = 1000  # of a package

Counter = Callable[[], int]  # microjoules since the last call


class Meter:
    """Counts the energy of this process: its GPU, and all CPU packages of its machine if it is the first one there."""

    def __init__(self, device: "torch.device", powercap: Path = POWERCAP) -> None:
        self.counters: dict[str, list[Counter]] = {}
        self.used: dict[str, float] = {}  # kWh since the last `lap`
        for name, find in zip(ENERGY_COLUMNS, (partial(_packages, powercap), partial(_gpu, device)), strict=True):
            try:
                self.counters[name], self.used[name] = find(), 0.0
            except Exception:  # no such counter, no right to read it, no pynvml, or whatever NVML raises
                continue
        self.read()

    def read(self) -> None:
        self.next = time.monotonic() + OFTEN
        for name, counters in list(self.counters.items()):
            try:
                self.used[name] += sum(counter() for counter in counters) / MICROJOULES
            except Exception:  # it has vanished
                del self.counters[name], self.used[name]

    def poll(self) -> None:
        """Read the counters if it is time. Call it often: a counter must not return to 0 twice between two readings."""
        if time.monotonic() >= self.next:
            self.read()

    def lap(self) -> dict[str, float]:
        """{column: kWh used since the last call}. Columns that cannot be read are left out."""
        self.read()
        used, self.used = self.used, dict.fromkeys(self.used, 0.0)
        return used


def _since_last(read: Callable[[], int], end: int = 0) -> Counter:
    """A function that says what a counter has counted since its last call. end: where the counter returns to 0."""
    last, when = read(), time.monotonic()

    def more() -> int:
        nonlocal last, when
        before, last, then, when = last, read(), when, time.monotonic()
        if end and when - then > end / MOST_WATTS / 1e6:
            raise OSError("it may have returned to 0 twice")
        return last - before + (end if last < before else 0)

    return more


def _packages(powercap: Path) -> list[Counter]:
    """Only counters of whole packages. Others there are of cores, of memory, and of all together (psys)."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return []
    zones = [zone for zone in powercap.glob("intel-rapl:*") if (zone / "name").read_text().startswith("package")]
    if not zones:
        raise OSError(f"{powercap} has no counter of a package")
    return [_since_last(partial(_number, zone / "energy_uj"), _number(zone / "max_energy_range_uj")) for zone in zones]


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def _gpu(device: "torch.device") -> list[Counter]:
    """The GPU of this process. NVML finds it by its UUID, as CUDA may number the GPUs in another way."""
    if device.type != "cuda":
        raise OSError(f"{device} has no counter")
    import torch

    nvml: Any = importlib.import_module("pynvml")
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return [_since_last(lambda: 1000 * int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)))]
