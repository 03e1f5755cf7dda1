"""Training beside other busy processes: images/s with each way in which threads may wait for one another.

    python -m tests.benchmarks.busy                           five minutes on two cores that do nothing else
    python -m tests.benchmarks.busy --rounds 1 --seconds 1    to try it

Each setting has a process of its own, as libgomp reads it once. In each round all take their turn alone, then beside
one and beside two processes that only count: with the lowest priority, in a session of their own, as a shell starts
them. Whatever ends the benchmark, they end too.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from sslvit import SPIN_COUNT

CORES = os.cpu_count() or 1
NEIGHBOURS = (0, 1, 2)
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
SETTINGS = {
    "libgomp's defaults": {"GOMP_SPINCOUNT": "300000"},  # what it takes if nothing is said; sslvit says something
    f"sslvit, {SPIN_COUNT} spins": {"GOMP_SPINCOUNT": str(SPIN_COUNT)},
    "10,000 spins": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
# It counts until its parent, whose number it is given, has ended, and for an hour at most.
LOOP = """
import os, sys, time
print(flush=True)
end = time.monotonic() + 3600
while os.getppid() == int(sys.argv[1]) and time.monotonic() < end:
    sum(range(10000))
"""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Within it so many other processes are busy."""
    command = ["nice", "-n", "19", sys.executable, "-c", LOOP, str(os.getpid())]
    started: list[subprocess.Popen] = []
    try:
        started.extend(subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) for _ in range(count))
        for process in started:
            assert process.stdout
            process.stdout.readline()  # it has begun
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def _serve(pipe: Connection) -> None:
    """Get a number of seconds, train for so long, one step at least, and answer with the images a second."""
    import torch

    from . import steps

    case = steps.CASES["mae-tiny"]
    step, _, _ = steps.ours(case, "auto", 0.1)
    batches = [steps.batch(case, i, torch.device("cpu")) for i in range(3)]
    steps.timed(step, batches, 0, 2)
    pipe.send(f"{torch.get_num_threads()} threads")
    while seconds := pipe.recv():
        count, began = 0, time.perf_counter()
        while (spent := time.perf_counter() - began) < seconds:
            step(batches[count % 3], count)
            count += 1
        pipe.send(count * case.batch_size / spent)


def start(setting: dict[str, str]) -> Connection:
    """A process with this setting that trains when it is asked to."""
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update({"OMP_NUM_THREADS": str(CORES)} | setting)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    context.Process(target=_serve, args=(theirs,), daemon=True).start()
    theirs.close()
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each setting beside each number of processes")
    args = parser.parse_args()
    pipes, threads = {}, {}
    for name, setting in SETTINGS.items():
        pipes[name] = start(setting)
        threads[name] = pipes[name].recv()
    rates: dict[tuple[str, int], list[float]] = {(name, count): [] for name in SETTINGS for count in NEIGHBOURS}
    for _ in range(args.rounds):
        for count in NEIGHBOURS:
            for name, pipe in pipes.items():
                with neighbours(count):
                    pipe.send(args.seconds)
                    rates[name, count].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(0.0)
    print(f"mae-tiny on {CORES} cores, images/s: alone, beside 1 and beside 2 busy processes")
    for name in SETTINGS:
        found = [statistics.median(rates[name, count]) for count in NEIGHBOURS]
        print(f"  {name:20s} {threads[name]:10s}" + "".join(f"{rate:8.1f}" for rate in found))


if __name__ == "__main__":
    main()
