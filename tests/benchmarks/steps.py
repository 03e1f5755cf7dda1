"""sslvit's training step beside the plain one's, on this machine, in one run.

    python -m tests.benchmarks.steps                  all cases (ten minutes on two cores)
    python -m tests.benchmarks.steps mae-tiny dino-tiny --rounds 7

Both sides get the same batches, and with --losses begin with the same weights. In each round every variant takes a few
steps, one variant after another, so that a drift of the machine's clock meets all of them; the ratio is the median over
rounds. A fresh process measures the memory of each variant: the peak of all that it holds.
"""

import argparse
import json
import multiprocessing
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sslvit import config as configuration
from sslvit import objectives, optim, pretraining
from sslvit.hardware import choose_attention, keep_memory, peak_memory, start_accelerator
from sslvit.metrics import Window
from sslvit.model import masks
from sslvit.step import train_step
from sslvit.tools.bench import matmul_rate

from . import plain

TINY = ["model.name=vit_tiny_patch16_224", "model.args={patch_size: 4}", "image_size=32", "in_chans=3"]
SMALL = ["model.name=vit_small_patch16_224", "image_size=224"]
BASE = ["model.name=vit_base_patch16_224", "image_size=224"]
LARGE = ["model.name=vit_large_patch16_224", "image_size=224"]


@dataclass(frozen=True)
class Case:
    """What is trained. shape: image size, patch, width, depth, heads of the encoder."""

    method: str
    words: list[str]
    shape: tuple[int, int, int, int, int]
    batch_size: int
    on: str = "cpu"  # the device for which the case is meant
    decoder: tuple[int, int, int] = (512, 8, 16)  # MAE: width, depth, heads
    local: tuple[int, int] = (8, 96)  # DINO: local crops, their size
    prototypes: int = 65536


CASES = {
    "mae-tiny": Case("mae", TINY, (32, 4, 192, 12, 3), 128, decoder=(192, 4, 3)),
    "dino-tiny": Case("dino", TINY, (32, 4, 192, 12, 3), 128, local=(6, 16), prototypes=4096),
    "mae-small": Case("mae", SMALL, (224, 16, 384, 12, 6), 16),
    "dino-small": Case("dino", SMALL, (224, 16, 384, 12, 6), 4),
    "mae-base-gpu": Case("mae", BASE, (224, 16, 768, 12, 12), 256, "cuda"),
    "mae-large-gpu": Case("mae", LARGE, (224, 16, 1024, 24, 16), 256, "cuda"),
    "dino-small-gpu": Case("dino", SMALL, (224, 16, 384, 12, 6), 64, "cuda"),
    "dino-base-gpu": Case("dino", BASE, (224, 16, 768, 12, 12), 32, "cuda"),
    "dino-small-64px-gpu": Case("dino", [SMALL[0], "image_size=64"], (64, 16, 384, 12, 6), 512, "cuda", local=(8, 32)),
}
LR = 1e-4
MOMENTUM = 0.996

Step = Callable[[dict[str, Tensor], int], Tensor | float]


def batch(case: Case, step: int, device: torch.device) -> dict[str, Tensor]:
    """Augmented crops, as both sides get them: {"key": [B], name: [V, B, 3, h, w]}."""
    generator = torch.Generator().manual_seed(step)
    b, size = case.batch_size, case.shape[0]

    def crops(count: int, size: int) -> Tensor:
        # Smooth images: of white noise there is nothing to learn, and the losses would say little.
        coarse = torch.randn(count * b, 3, 6, 6, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
        return fine.view(count, b, 3, size, size).to(device)

    key = torch.randint(2**62, (b,), generator=generator)
    if case.method == "mae":
        return {"key": key.to(device), "image": crops(1, size)}
    return {"key": key.to(device), "global": crops(2, size), "local": crops(*case.local)}


def settings(case: Case, precision: str, drop_path: float) -> configuration.RunConfig:
    words = [f"method={case.method}", f"precision={precision}", f"global_batch_size={case.batch_size}", "steps=1000"]
    words += [*case.words, "data.train=fractals:train", "warmup_epochs=0"]
    if case.method == "mae":
        width, depth, heads = case.decoder
        words += [f"decoder_width={width}", f"decoder_depth={depth}", f"decoder_heads={heads}"]
    else:
        words += [f"prototypes={case.prototypes}", f"local_crops={case.local[0]}", f"local_crop_size={case.local[1]}"]
        words += [f"drop_path={drop_path}", f"momentum={MOMENTUM}", f"momentum_end={MOMENTUM}"]
        words += ["weight_decay_end=null", "freeze_last_layer_epochs=0"]  # most of a run is after that
    return configuration.load(words)


def ours(
    case: Case, precision: str, drop_path: float, compiled: bool = False
) -> tuple[Step, dict[str, Tensor], objectives.Objective]:
    """A function that takes a step, the weights that it starts from, and the objective."""
    config = settings(case, precision, drop_path)
    accelerator = start_accelerator(config.precision)
    plan = configuration.make_plan(config, 10**6, accelerator.num_processes, accelerator.process_index)
    objective = objectives.start(config, plan.steps_per_epoch, plan.steps).to(accelerator.device)
    choose_attention(objective, accelerator.device, accelerator.mixed_precision)
    optimizer = optim.make_optimizer(config.optim, objective)
    weights = {name: value.clone() for name, value in objective.state_dict().items()}
    model, optimizer = accelerator.prepare(objective, optimizer)
    if compiled:
        views = objectives.find(config.method).views(config.objective, config.data)
        print(pretraining.compiled(config, plan, accelerator, model, optimizer, views), flush=True)
    objective.train()
    keep_memory(accelerator.device)
    window = Window()

    def step(batch: dict[str, Tensor], number: int) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = LR
        before = window.sums.get("loss", 0)
        train_step(
            accelerator, model, optimizer, [batch], number, window, accumulate=1, seed=config.seed, config=config.optim
        )
        return window.sums["loss"] - before

    return step, weights, objective


class Saved:
    """Bytes that forward passes hold for their backward passes, on any device: now, and the most so far."""

    def __init__(self, module: nn.Module) -> None:
        """Without the module's own weights."""
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self.now = self.most = 0
        self.uses: Counter[int] = Counter()  # {address of a storage: tensors of it that are held}

    def pack(self, tensor: Tensor) -> "Held":
        held, storage = Held(tensor), tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        size = 0 if address in self.weights else size
        self.now += 0 if self.uses[address] else size
        self.most = max(self.most, self.now)
        self.uses[address] += 1
        weakref.finalize(held, self.release, address, size)
        return held

    def release(self, address: int, size: int) -> None:
        self.uses[address] -= 1
        self.now -= 0 if self.uses[address] else size


class Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def crop_wise(case: Case, chosen: bool, precision: str, count: int = 2) -> tuple[list[float], dict[str, Tensor], int]:
    """Some steps with crop-wise backward or without: their losses, the weights after them, and the most bytes that
    were held for a backward pass."""
    torch.manual_seed(0)
    words = [*case.words, f"crop_wise_backward={str(chosen).lower()}"]
    step, _, objective = ours(replace(case, words=words), precision, 0.1)
    device = next(objective.parameters()).device
    found = Saved(objective)
    with torch.autograd.graph.saved_tensors_hooks(found.pack, lambda held: held.tensor):
        losses = [float(step(batch(case, i, device), i)) for i in range(count)]
    return losses, objective.state_dict(), found.most


def theirs(case: Case, bf16: bool, drop_path: float, weights: dict[str, Tensor] | None, device: torch.device) -> Step:
    size, patch, width, depth, heads = case.shape
    if case.method == "mae":
        model = plain.MAE(size, patch, width, depth, heads, case.decoder, 0.75)
        if weights:
            model.load_state_dict({name.replace("encoder.model.", ""): value for name, value in weights.items()})
        mae = plain.MAETraining(model.to(device).train(), LR, bf16)
        patches = (size // patch) ** 2
        # The noise whose order is ours: the position of each patch in it.
        return lambda batch, _: mae.step(
            batch["image"][0], masks.random_order(batch["key"], patches).argsort(dim=1).float()
        )

    def network(drop_path: float) -> plain.Network:
        head = plain.Head(width, case.prototypes, 2048, 256)
        return plain.Network(plain.ViT(size, patch, width, depth, heads, drop_path), head)

    student, teacher = network(drop_path), network(0.0)
    if weights:
        mine = {name[8:]: value for name, value in weights.items() if name.startswith("student.")}
        student.load_state_dict({name.replace("encoder.model.", "backbone."): value for name, value in mine.items()})
    dino = plain.DINOTraining(
        student.to(device).train(), teacher.to(device).train(), case.prototypes, LR, MOMENTUM, freeze=False, bf16=bf16
    )
    return lambda batch, _: dino.step([*batch["global"], *batch["local"]])


def variants(case: Case, drop_path: float, names: list[str]) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    weights = None
    for name in names:
        if name.startswith("sslvit"):
            torch.manual_seed(0)
            steps[name], weights, _ = ours(case, name.split()[1], drop_path, compiled=name.endswith("compiled"))
    device = start_accelerator("float32").device
    for name in names:
        if name.startswith("plain"):
            steps[name] = theirs(case, name == "plain bf16", drop_path, weights, device)
    return steps


def timed(step: Step, batches: list[dict[str, Tensor]], first: int, count: int) -> float:
    """Seconds a step."""
    start = time.perf_counter()
    for i in range(count):
        step(batches[i % len(batches)], first + i)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def _serve(case: Case, variant: str, pipe: Connection) -> None:
    """Take as many steps as is asked for, and answer with the seconds that each took."""
    step, device = variants(case, 0.1, [variant])[variant], start_accelerator("float32").device
    batches = [batch(case, i, device) for i in range(3)]
    timed(step, batches, 0, 1)
    with FlopCounterMode(display=False) as counter:
        step(batches[0], 1)
    pipe.send(counter.get_total_flops())
    done = 2
    while count := pipe.recv():
        pipe.send(timed(step, batches, done, count))
        done += count


def compare(case: Case, rounds: int, seconds: float) -> Iterator[dict]:
    """Each variant has a process of its own, as what one tells the C library of memory holds for a process; those whose
    turn it is not wait."""
    device = start_accelerator("float32").device
    names = ["plain float32", "plain bf16", "sslvit float32", "sslvit bf16"]
    rates = {precision: matmul_rate(device, precision) for precision in (torch.float32, torch.bfloat16)}
    context = multiprocessing.get_context("spawn")
    pipes, flops, counts = {}, {}, {}
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=_serve, args=(case, name, theirs), daemon=True).start()
        flops[name] = pipes[name].recv()
    for name, pipe in pipes.items():
        pipe.send(1)
        counts[name] = max(1, round(seconds / pipe.recv()))
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(counts[name])
            times[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(0)
    for name in names:
        median = statistics.median(times[name])
        yield {
            "variant": name,
            "images_per_second": case.batch_size / median,
            "times_plain_float32": statistics.median(
                a / b for a, b in zip(times["plain float32"], times[name], strict=True)
            ),
            "times_plain_bf16": statistics.median(a / b for a, b in zip(times["plain bf16"], times[name], strict=True)),
            "gflop_per_image": flops[name] / case.batch_size / 1e9,
            "of_matmul_rate": flops[name] / median / rates[torch.bfloat16 if "bf16" in name else torch.float32],
        }


def losses(case: Case, steps: int = 20) -> dict[str, list[float]]:
    """{variant: the loss of each step}, without drop path: it draws from other generators."""
    device = start_accelerator("float32").device
    batches = [batch(case, i, device) for i in range(steps)]
    found = {}
    for name, step in variants(case, 0.0, ["plain float32", "plain bf16", "sslvit float32", "sslvit bf16"]).items():
        found[name] = [float(step(batches[i], i)) for i in range(steps)]
    return found


def _memory(name: str, variant: str, queue: multiprocessing.Queue) -> None:
    case = CASES[name]
    device = start_accelerator("float32").device
    step = variants(case, 0.1, [variant])[variant]
    batches = [batch(case, i, device) for i in range(2)]
    step(batches[0], 0)
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step(batches[1], 1)
    queue.put(peak_memory(device) / 2**20)


def memory(name: str, variant: str) -> float:
    """MiB: the peak of a process that holds the model and takes three steps, everything included."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_memory, args=(name, variant, queue))
    process.start()
    peak = queue.get(timeout=600)
    process.join()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; those for this device without")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each variant in a round, at least one step")
    parser.add_argument("--losses", action="store_true", help="the losses of 20 steps instead of their time")
    parser.add_argument("--json", help="a file to write the rows to")
    args = parser.parse_args()
    device = start_accelerator("float32").device
    rows = []
    for name in args.cases or [name for name, case in CASES.items() if case.on == device.type]:
        if args.losses:
            for variant, values in losses(CASES[name]).items():
                print(f"{name:12s} {variant:15s}", " ".join(f"{value:.4f}" for value in values), flush=True)
            continue
        print(f"{name}: images/s, times plain float32, times plain bf16, GFLOP/image, of matmul rate, peak MiB")
        for row in compare(CASES[name], args.rounds, args.seconds):
            row["peak_mib"] = memory(name, row["variant"])
            print(
                f"  {row['variant']:15s} {row['images_per_second']:8.1f} {row['times_plain_float32']:7.2f} "
                f"{row['times_plain_bf16']:7.2f} {row['gflop_per_image']:8.2f} {row['of_matmul_rate']:7.0%} "
                f"{row['peak_mib']:8.0f}",
                flush=True,
            )
            rows.append({"case": name, **row})
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"torch": torch.__version__, "device": str(device), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
