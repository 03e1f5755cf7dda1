"""One process with all cores beside several that share them: images/s of the whole training loop, loader included.

    python -m tests.benchmarks.scaling                      the two CIFAR-10 recipes on fractals, 1 and 2 processes
    python -m tests.benchmarks.scaling --processes 1 2 4 --rounds 5
    python -m tests.benchmarks.scaling --report mae_cifar10 --words images=100000    log.report=true beside false, in
                                                 whole runs, which must take more than five minutes: else none is made

The same global batch each time, so the same training. Rounds alternate between the numbers of processes; the ratio is
the median over rounds. On GPUs, where processes share nothing, the efficiency is that ratio over the number of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
RECIPES = ["mae_cifar10", "dino_cifar10"]


def images_per_second(recipe: str, processes: int, seconds: float, words: list[str]) -> float:
    threads = max(1, (os.cpu_count() or 1) // processes)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "sslvit", "bench", f"{ROOT}/configs/{recipe}.yaml", "data.train=fractals:train"]
        command += [f"seconds={seconds}", f"report={report}", *words]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        return json.loads(report.read_text())["images_per_second"]


def whole_run(recipe: str, report: bool, words: list[str]) -> tuple[float, float, float]:
    """Seconds of training, of the whole command, and of its processes' CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sslvit", "pretrain", f"{ROOT}/configs/{recipe}.yaml", f"out={folder}/run"]
        before, words = os.times(), ["data.train=fractals:train", f"log.report={str(report).lower()}", *words]
        subprocess.run([*command, *words], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        after, log = os.times(), Path(folder, "run", "metrics.jsonl").read_text()
    training = max(json.loads(line).get("seconds", 0.0) for line in log.splitlines())
    return training, after.elapsed - before.elapsed, sum(after[2:4]) - sum(before[2:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES, help="names of files in configs/")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--words", nargs="*", default=[], help="more key=value words for all of them")
    parser.add_argument("--report", action="store_true", help="instead: what the report costs whole runs")
    args = parser.parse_args()
    for recipe in args.recipes if args.report else []:
        for n in range(args.rounds):
            runs = {on: whole_run(recipe, on, args.words) for on in ((False, True), (True, False))[n % 2]}
            for what, without, with_report in zip(
                ("training", "command", "CPU time"), runs[False], runs[True], strict=True
            ):
                times = f"{without:.1f} s, with the report {with_report:.1f} s"
                print(f"{recipe:14s} {what:8s} {times} ({with_report / without - 1:+.2%})", flush=True)
    if args.report:
        return
    shared = 1 if not torch.cuda.is_available() else None  # the cores are shared; GPUs are not
    for recipe in args.recipes:
        rates: dict[int, list[float]] = {n: [] for n in args.processes}
        for _ in range(args.rounds):
            for n in args.processes:
                rates[n].append(images_per_second(recipe, n, args.seconds, args.words))
        first = args.processes[0]
        for n in args.processes:
            ratio = statistics.median(b / a for a, b in zip(rates[first], rates[n], strict=True))
            efficiency = ratio if shared else ratio * first / n
            print(
                f"{recipe:14s} {n} process{'es' if n > 1 else '  '} {statistics.median(rates[n]):9.1f} images/s  "
                f"{ratio:5.2f} times {first}  efficiency {efficiency:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
