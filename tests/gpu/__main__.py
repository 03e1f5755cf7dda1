"""`python -m tests.gpu`: see __init__.py."""

import os
import signal
import sys
import zipfile
from pathlib import Path

from . import __doc__ as usage
from . import runner
from .runner import Job

ROOT = Path(__file__).parents[2]
PARTS = "tests.gpu.parts"
# By worth: what comes first is measured also where time is short. Shares are about seconds of nine minutes.
JOBS = [
    Job("machine", f"{PARTS}:machine", 60, needed=True),  # the first one also imports everything
    Job("golden", f"{PARTS}:golden", 30),
    Job("tests", f"{PARTS}:gpu_tests", 70),
    Job("steps mae-large", f"{PARTS}:steps", 60, ("mae-large-gpu",)),
    Job("steps dino-base", f"{PARTS}:steps", 60, ("dino-base-gpu",)),
    Job("steps dino-small", f"{PARTS}:steps", 35, ("dino-small-gpu",)),
    Job("steps mae-base", f"{PARTS}:steps", 30, ("mae-base-gpu",)),
    Job("steps dino-small-64px", f"{PARTS}:steps", 25, ("dino-small-64px-gpu",)),
    Job("input", f"{PARTS}:images", 45),
    Job("pretraining", f"{PARTS}:pretraining", 150),
    Job("trace mae", f"{PARTS}:trace", 15, ("mae-base-gpu",)),
    Job("trace dino", f"{PARTS}:trace", 15, ("dino-small-gpu",)),
]


def main(arguments: list[str]) -> int:
    given = dict(word.split("=", 1) for word in arguments if "=" in word)
    flags = {word for word in arguments if "=" not in word}
    known = {"out", "minutes", "wheels", "cifar10", "only", "fail"}
    if not given.get("out") or set(given) - known or flags - {"--dry-run"}:
        print(usage)
        return 2
    dry, minutes = "--dry-run" in flags, float(given.get("minutes", 9))
    out = Path(given["out"]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT)]
    if "wheels" in given:
        paths.insert(0, str(unpack(Path(given["wheels"]), out / "site")))
    # For the jobs and for what they start. Unpacked wheels come first.
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.path[:0] = paths
    os.chdir(ROOT)
    if dry:
        rehearse_on_a_cpu()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the job that runs is ended and the report written
    jobs = [job for job in JOBS if job.name.startswith(tuple(given.get("only", "").split(",")))]
    fail = dict(pair.split(":") for pair in given.get("fail", "").split(",") if pair)
    fail = {job.name: how for job in jobs for name, how in fail.items() if job.name.startswith(name)}
    report = runner.Report(out, ["python", "-m", "tests.gpu", *arguments], minutes, dry)
    cifar10 = Path(given["cifar10"]).resolve() if "cifar10" in given else ROOT / "cifar10.zip"
    runner.CONTEXT.set_forkserver_preload([PARTS])
    well = runner.run(jobs, report, 60 * minutes, fail, dry=dry, cifar10=cifar10 if cifar10.exists() else None)
    runner.remove(out / "site")
    print(report.out / "report.md")
    return 0 if well else 1


def rehearse_on_a_cpu() -> None:
    os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "SSLVIT_GPU_REHEARSAL": "1"}
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # the compiler takes minutes on a CPU


def unpack(wheels: Path, site: Path) -> Path:
    """The packages of a folder of wheels, in a folder to put on Python's path. A wheel for another Python is said and
    left out. Installers would refuse all for one."""
    runner.remove(site)
    site.mkdir()
    here = {"py3", f"py{sys.version_info[0]}{sys.version_info[1]}", f"cp{sys.version_info[0]}{sys.version_info[1]}"}
    for wheel in sorted(wheels.glob("*.whl")):
        tags = wheel.stem.split("-")[-3:]
        fits = here & set(tags[0].split(".")) or (tags[1] == "abi3" and tags[0].startswith("cp3"))
        print(f"{wheel.name}: {'unpacked' if fits else 'for another Python, left out'}", flush=True)
        if not fits:
            continue
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        for folder in site.glob("*.data/*lib"):  # as an installer would place them
            for path in folder.iterdir():
                path.rename(site / path.name)
    return site


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # a job that even SIGKILL does not end must not keep this process
