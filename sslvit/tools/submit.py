"""`sslvit submit`: a pretraining as a job of a SLURM cluster, through submitit.

When its time is over, or when it must make room for another job, the run saves a checkpoint and ends. The job is queued
again until the run is done. Read pretraining.py and stopping.py first.

One task of the job is one process of the training, without torchrun: torchrun would take the scheduler's signal for a
failure, and kill its processes half a minute later, saved or not.
"""

import os
import re
import shlex
import shutil
import signal
import sys
import time
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import config as configuration
from .. import data, objectives
from ..checkpoints import state
from ..config import RunConfig
from ..data.cache import MemoryBudget
from ..data.loader import make_layout
from ..distributed import rank, say
from ..errors import UserError, printable, require
from ..evaluation.online import KnnMonitor
from ..hardware import blocks_of, resolve_precision, start_accelerator
from ..pretraining import pretrain, summary
from ..run import check_directory, check_images
from ..stopping import EXIT_REQUEUE, Stopped
from .config import Submit as Config

HELD = 3600  # seconds that a process waits for SLURM to end it: longer than the GraceTime of clusters


def run(config: RunConfig, settings: Config, arguments: list[str]) -> None:
    """Queue the run and print where it is. Raises UserError."""
    print("\n".join(submit(config, settings)))


def submit(config: RunConfig, settings: Config) -> list[str]:
    """Check everything, queue the job, and return lines that say where to look. Raises UserError."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("submit starts the processes itself: call it without accelerate launch or torchrun.")
    options = check_settings(settings)
    os.environ.pop("SUBMITIT_PREEMPT_SIGNAL", None)  # its default is SIGUSR2, which stopping.py handles
    submitit = require("submitit", "slurm", "sslvit submit")
    if settings.cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError(
            "submit.cluster=slurm needs sbatch and srun, and one of them is not on this machine: log in to a machine "
            "that has them, or give submit.cluster=local to run here."
        )
    check(config, settings)

    run_dir = Path(config.out)
    folder = _new_folder(run_dir)
    try:
        configuration.save(config, folder / "config.yaml")
        executor = _executor(submitit, folder, run_dir.name, settings, options)
        # Inside a job, sbatch would take the variables of that job for options of the new one.
        outside = submitit.helpers.clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext()
        with outside, redirect_stderr(StringIO()):
            job = executor.submit(Job(str((folder / "config.yaml").absolute()), settings.cpus, config.method))
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        for empty in (folder.parent, run_dir):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
        if not isinstance(error, submitit.core.utils.FailedJobError):
            raise
        reason = "; ".join(re.sub(r"^sbatch: (error: )?", "", line) for line in str(error).strip().splitlines())
        raise UserError(f"SLURM refused the job: {reason.rstrip('.')}.") from error
    return describe(job.job_id, folder, config, settings)


def describe(job: str, folder: Path, config: RunConfig, settings: Config) -> list[str]:
    """Sentences: what was queued, and where to look."""
    log, slurm = folder / f"{job}_0_log.out", settings.cluster == "slurm"
    machines = f"{settings.nodes} machines with " if settings.nodes > 1 else ""
    one = tasks(settings) == 1
    each = (
        f"{tasks(settings)} "
        + ("GPU" if settings.gpus else "process")
        + ("" if one else "s" if settings.gpus else "es")
    )
    return [
        f"Job {job}: {machines}{each}, {settings.hours:g} hours a start, until the run in {config.out} is done.",
        f"  log    tail -F {log}",
        f"  state  {f'squeue -j {job}' if slurm else f'ps {job}'}",
        f"  stop   {f'scancel {job}' if slurm else f'kill {job}'} (it saves); submit the same again to continue",
    ]


def check_settings(settings: Config) -> dict[str, Any]:
    """Raises UserError for settings that cannot be. Returns the further options of sbatch by name."""
    for name, least in {"nodes": 1, "gpus": 0, "processes": 1, "cpus": 1, "restarts": 0}.items():
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"submit.{name}={value} must be {least} or above.")
    for name in ("hours", "warn_minutes", "memory"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise UserError(f"submit.{name}={value} must be above 0.")
    if settings.gpus and settings.processes is not None:
        raise UserError(f"submit.processes={settings.processes} is for submit.gpus=0: each GPU has one process.")
    if settings.warn_minutes >= 60 * settings.hours:
        raise UserError(
            f"submit.warn_minutes={settings.warn_minutes:g} is not less than submit.hours={settings.hours:g}: the run "
            "would have to stop before it begins."
        )
    if settings.cluster == "local" and settings.nodes > 1:
        raise UserError(f"submit.nodes={settings.nodes}: submit.cluster=local has one machine.")
    options: dict[str, Any] = {}
    for word in shlex.split(settings.sbatch):
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"--[a-z][a-z-]*", name):
            raise UserError(f"submit.sbatch: {word} is not of the form --name or --name=value.")
        options[name[2:].replace("-", "_")] = value if equals else True
    return options


def check(config: RunConfig, settings: Config) -> None:
    """Refuse what pretrain refuses before its first step, as far as this machine can tell. Raises UserError."""
    configuration.check(config)
    if not settings.gpus:
        resolve_precision(config.precision, torch.device("cpu"))
        if config.batch_size == "auto":
            raise UserError("batch_size=auto tries sizes on a GPU, and submit.gpus=0: give a number, or leave it out.")
    processes, run_dir, steps = settings.nodes * tasks(settings), Path(config.out), None
    check_directory(run_dir, config)
    if settings.check_images:
        source = data.open_source(config.data.train, config.data)
        plan = configuration.make_plan(config, len(source), processes, 0)
        per_epoch, steps = plan.steps_per_epoch, plan.steps
        if config.eval.train or config.eval.test:
            KnnMonitor(config.eval, config.data, config.seed, MemoryBudget(), start_accelerator("float32"))
    else:  # the number of images is not known: check what does not depend on it
        size = config.batch_size if isinstance(config.batch_size, int) else None
        make_layout(config.global_batch_size, size, config.global_batch_size, processes, 0, config.data.train)
        per_epoch, steps = 1, 10**6
    objectives.find(config.method).views(config.objective, config.data)
    data.normalization(config.data)
    objective = objectives.start(config, per_epoch, steps)
    if config.compile:
        blocks_of(objective)
    if settings.check_images and state.steps_saved(run_dir):
        saved = state.latest(run_dir)[1]
        check_images(saved, source, config.data.train)
        if saved["step"] >= steps:
            raise UserError(
                f"{run_dir} has done all of its {steps} steps: give a larger epochs=, steps= or images= to extend it."
            )


def tasks(settings: Config) -> int:
    """Processes on each machine."""
    return settings.gpus or settings.processes or 1


def _new_folder(run_dir: Path) -> Path:
    """Make <run_dir>/submit/<n> with the first free number. Raises UserError."""
    number = 1
    while True:
        folder = run_dir / "submit" / str(number)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"out={run_dir} cannot be written: {error.strerror}.") from error


def _executor(submitit: Any, folder: Path, name: str, settings: Config, options: dict[str, Any]) -> Any:
    warn_seconds, setup = round(60 * settings.warn_minutes), [settings.setup] if settings.setup else []
    if settings.cluster == "local":
        words = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        visible = [int(word) for word in words] if all(word.isdigit() for word in words) else ()
        if visible and settings.gpus > len(visible):
            raise UserError(f"submit.gpus={settings.gpus}, but CUDA_VISIBLE_DEVICES={','.join(words)} names fewer.")
        executor = submitit.LocalExecutor(folder, max_num_timeout=settings.restarts)
        executor.update_parameters(
            timeout_min=60 * settings.hours, signal_delay_s=warn_seconds, gpus_per_node=settings.gpus,
            visible_gpus=visible, tasks_per_node=tasks(settings), stderr_to_stdout=True, setup=setup,
        )  # fmt: skip
        return executor
    executor = submitit.SlurmExecutor(folder, max_num_timeout=settings.restarts)
    wanted = {
        "partition": settings.partition,
        "account": settings.account,
        "gpus_per_node": None if options.keys() & {"gres", "gpus", "gpus_per_task"} else settings.gpus or None,
        "mem": None if settings.memory is None else f"{round(1024 * settings.memory)}M",
        "setup": setup or None,
    }
    executor.update_parameters(
        job_name=name, time=round(60 * settings.hours), nodes=settings.nodes, ntasks_per_node=tasks(settings),
        cpus_per_task=settings.cpus, signal_delay_s=warn_seconds, stderr_to_stdout=True,
        # requeue: the cluster may also start it again, after a preemption or the loss of a machine.
        additional_parameters={"requeue": True, **options},
        # Newer versions of srun ignore sbatch's cores. A process that is bound to its own cores would divide them by
        # the number of processes (hardware.py). When one process fails, the others must not wait for it.
        srun_args=[f"--cpus-per-task={settings.cpus}", "--cpu-bind=none", "--kill-on-bad-exit=1"],
        **{key: value for key, value in wanted.items() if value is not None},
    )  # fmt: skip
    return executor


@dataclass
class Job:
    """What each process of the job calls at each start."""

    recipe: str  # a copy of the configuration: edits while the job waits do not matter
    cpus: int
    method: str = ""  # of the configuration: a recipe cannot choose a module of your own

    def __call__(self) -> None:
        """Train. A mistake of the user ends the process with status 2: another start would repeat it."""
        import submitit

        environment = submitit.JobEnvironment()
        if environment.num_tasks > 1:
            # All GPUs of the machine stay visible: accelerate takes the one of LOCAL_RANK.
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(self.cpus)  # torch's default is all cores of the machine
        words = [self.recipe] + ([f"method={self.method}"] if self.method else [])
        sys.argv = ["sslvit", "pretrain", *words]  # starts.jsonl records it
        try:
            result = pretrain(configuration.load(words))
            if result.stopped:
                saved = f"Stopped by {result.stopped} after step {result.steps}, which is saved in {result.run_dir}."
                raise Stopped(saved, result.stopped)
        except UserError as error:
            print(printable(f"sslvit pretrain: {error}"), file=sys.stderr)
            sys.exit(2)
        except Stopped as error:
            self.leave(error, environment)
        say(*summary(result))

    def leave(self, stopped: Stopped, environment: Any) -> NoReturn:
        """End a process whose run was asked to stop.

        Inside `pretrain` the run handles the signals (stopping.py). Now submitit handles them again, and gets the one
        that makes it queue the job again. Not after SIGTERM: `scancel` sends it to end the job for good. SLURM also
        sends it when the job must make room, and queues it again itself, if it still runs after its time of grace.
        """
        if stopped.reason == "SIGTERM":
            say(f"{stopped} Submit it again to continue, unless the cluster does so by itself.")
            if environment.name() == "slurm":
                time.sleep(HELD)
            sys.exit(EXIT_REQUEUE)
        say(f"{stopped} The job is queued again.")
        if rank() == 0:
            signal.raise_signal(getattr(signal, f"SIG{environment.USR_SIG}"))  # ends this process
        sys.exit(0)

    def checkpoint(self) -> Any:
        """What submitit calls at the next start."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)
