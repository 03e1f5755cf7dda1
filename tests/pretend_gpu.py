"""A pretend accelerator: tensors that lie on a device "gpu" and are computed on the CPU.

For what can be known of a GPU without having one: that no tensor is left on the wrong device (an operation on tensors
of two devices fails, as with CUDA), and where the host waits for the device, which is written down. It registers a
device with torch for the life of the process, so it has one of its own:

    python -m tests.pretend_gpu commands.json     [[words of `sslvit ...`], ...]; prints a JSON line for each
"""

import gc
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

# A tensor that wraps another cannot be an inference tensor. Before sslvit is imported, which decorates with it.
torch.inference_mode = lambda mode=True: torch.no_grad() if mode else nullcontext()

from accelerate.state import PartialState  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402
from torch.utils.backend_registration import (  # noqa: E402
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from sslvit import optim, pretraining  # noqa: E402
from sslvit.__main__ import main  # noqa: E402

aten = torch.ops.aten
NAME = "gpu"
PACKAGE = pretraining.__file__.rsplit("/", 1)[0] + "/"
# The host has to see their result, or how large it is.
LOOKS = {
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.bincount, aten.repeat_interleave,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
waits: list[dict] = []  # {"step": the training step that ran, or null, "place": file and line}
running: list[int] = []  # that step


class OnDevice(Tensor):
    """A tensor on the device; `inner`, on the CPU, has its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(func, args, kwargs or {})


class Operations(TorchDispatchMode):
    """Every operation while it is entered: those that make tensors on the device have none there to begin with."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(func, args, kwargs or {})


class Calls(TorchFunctionMode):
    """Calls that no dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and is_there(kwargs.get("device")):
            return func(*args, **{name: value for name, value in kwargs.items() if name != "device"}).to(NAME)
        if func is Tensor.tolist and isinstance(args[0], OnDevice):
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


class Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def waiting() -> None:
    frame, places = sys._getframe(1), []
    while frame and len(places) < 2:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGE):
            places.append(f"{path.rsplit('/', 1)[1]}:{frame.f_lineno}")
        frame = frame.f_back
    waits.append({"step": running[-1] if running else None, "place": " <- ".join(places)})


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)


def compute(func: Any, args: tuple, kwargs: dict) -> Any:
    """The operation, on the CPU; what it gives is on the device if it was asked to be, or if its arguments were."""
    packet, tensors = func.overloadpacket, list(tensors_of((*args, *kwargs.values())))
    here = [t for t in tensors if not isinstance(t, OnDevice)]
    there = {id(t.inner): t for t in tensors if isinstance(t, OnDevice)}
    if not there and "device" not in kwargs:
        return func(*args, **kwargs)
    device = kwargs.get("device")
    goes = bool(there) if device is None else is_there(device)
    if packet in (aten._to_copy, aten.copy_):
        crosses = bool(there) != goes if packet is aten._to_copy else bool(here and there)
        patient = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        if crosses and (patient or not goes or (packet is aten.copy_ and not isinstance(args[0], OnDevice))):
            waiting()
    elif there and any(t.ndim for t in here):  # numbers are passed on, as with CUDA
        raise RuntimeError(f"{func}: {[tuple(t.shape) for t in here]} is on the CPU, other tensors on {NAME}")
    elif there and (
        packet in LOOKS or (packet in INDEXING and any(t.dtype == torch.bool for t in tensors_of(args[1])))
    ):
        waiting()
    if is_there(device):
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if packet is aten.copy_:
        return args[0]

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return there[id(value)] if id(value) in there else OnDevice(value)

    return tree_map(wrap, out) if goes else out


@contextmanager
def present() -> Iterator[None]:
    """The device is there, and accelerate takes it."""
    _setup_privateuseone_for_python_backend(NAME, Module())
    optim.FUSED.add(NAME)
    PartialState(cpu=True).device = torch.device(NAME, 0)
    plain_step = pretraining.train_step

    def step(*args: Any, **keywords: Any) -> None:
        running.append(args[4])
        plain_step(*args, **keywords)
        running.clear()

    pretraining.train_step = step
    with torch.autograd.set_multithreading_enabled(False), Operations(), Calls():
        yield


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        commands = json.load(file)
    gc.freeze()  # as in conftest.py
    with present():
        for words in commands:
            waits.clear()
            status = main(words)
            print(json.dumps({"status": status, "waits": waits}), flush=True)
