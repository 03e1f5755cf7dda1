"""Steps whose loss or gradients are not finite: skipped by all processes together, written down, counted."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from sslvit import config as configuration
from sslvit import objectives, optim
from sslvit.checkpoints import state
from sslvit.data.crops import random_batch
from sslvit.metrics import Window
from sslvit.step import train_step

from . import processes
from .conftest import METHODS, TINY, words
from .processes import assert_same_run

SKIPS = [*TINY, "method=tests.nan_objective", "decoder_width=32", "decoder_depth=1", "decoder_heads=2",
         "global_batch_size=8", "epochs=2", "warmup_epochs=0", "log.every_steps=1", "base_lr=0.01"]  # fmt: skip


def stored(out, step):
    _, tensors = state.read(state.folder_of(out, step), state.MODEL, state.OPTIMIZER)
    return tensors[0] | tensors[1]


@pytest.mark.parametrize("images_too", ["false", "true"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(cli, images, tmp_path, images_too):
    """With nan_images DINO's teacher, center and moments would be lost for good."""
    out = tmp_path / "run"
    status, printed, _ = cli(
        "pretrain", images, *SKIPS, f"out={out}", "nan_steps=[3]", f"nan_images={images_too}", "save.every_steps=1",
        "keep_last=9", "batch_size=4",
    )  # fmt: skip
    assert status == 0
    assert printed.count("1 of the last 1 steps skipped") == 1
    assert "step 4/8  epoch 1.00/2  skipped" in printed
    before, after, later = (stored(out, step) for step in (3, 4, 5))
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert {key for key in moved if not key.startswith("teacher.")} == set()  # it follows the student, who stays
    assert any(not torch.equal(value, later[key]) for key, value in before.items())
    assert all(torch.isfinite(value).all() for value in stored(out, 8).values())
    (line,) = map(json.loads, (out / "nonfinite.jsonl").read_text().splitlines())
    assert line["step"] == 4
    assert [len(names) for names in line["processes"][0]["images"]] == [4, 4]
    assert line["processes"][0]["images"][0][0].startswith(str(images))
    assert line["processes"][0]["losses"] == ["nan", "nan"]
    records = processes.lines(out)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record.get("skipped", 0) for record in records] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert ["loss" in record for record in records] == [True, True, True, False, True, True, True, True]


@pytest.mark.parametrize("more", [[], ["shard=true", "nan_images=true"]], ids=["ddp", "sharded"])
def test_two_processes_skip_together_though_one_alone_is_at_fault(images, tmp_path, more):
    out = tmp_path / "run"
    arguments = ["pretrain", images, *SKIPS, f"out={out}", "nan_steps=[1,2]", "nan_rank=1", "log.every_steps=4", *more]
    printed = processes.launch(arguments, tmp_path / "log", world_size=2)
    assert printed.count("2 of the last 4 steps skipped") == 1
    first, second = map(json.loads, (out / "nonfinite.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (2, 3)
    assert [process["losses"] == ["nan"] for process in first["processes"]] == [False, True]
    assert sum(len(names) for process in first["processes"] for names in process["images"]) == 8
    assert [record.get("skipped") for record in processes.lines(out)] == [2, None]
    assert all(torch.isfinite(value).all() for value in stored(out, 8).values())


def test_two_processes_stop_together_after_too_many_in_a_row(images, tmp_path):
    out = tmp_path / "run"
    arguments = ["pretrain", images, *SKIPS, f"out={out}", "nan_steps=[3,4,5]", "nan_rank=1", "max_nonfinite=3"]
    printed = processes.launch([*arguments, "save.every_steps=2"], tmp_path / "log", world_size=2, status=2)
    assert printed.count("The run has diverged: the last 3 steps up to 6 were skipped") == 2
    assert "Traceback" not in printed
    assert state.steps_saved(out) == [2, 4]


def test_a_run_that_goes_on_counts_skipped_steps_as_if_it_had_not_stopped(cli, fails, images, tmp_path):
    """The checkpoint of step 5 lies inside a line of the log, and inside a row of skipped steps."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    lines = [word for word in SKIPS if word != "log.every_steps=1"] + ["log.every_steps=4"]
    arguments = ["pretrain", images, *lines, "nan_steps=[2,4,5,6,7]", "save.every_steps=5", "keep_last=9"]
    assert cli(*arguments, f"out={whole}")[0] == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(state.folder_of(resumed, 8))
    assert cli(*arguments, f"out={resumed}")[0] == 0
    assert_same_run(whole, resumed)
    assert (whole / "nonfinite.jsonl").read_text() == (resumed / "nonfinite.jsonl").read_text()
    record, _ = state.read(state.folder_of(resumed, 8))
    assert (record["skipped"], record["skipped_in_a_row"]) == (5, 4)
    assert state.read(state.folder_of(resumed, 5))[0]["skipped_in_a_row"] == 1
    shutil.rmtree(state.folder_of(resumed, 8))
    assert "the last 4 steps up to 8 were" in fails(*arguments, f"out={resumed}", "max_nonfinite=4")


class Calls(TorchDispatchMode):
    """Notes what would wait for a device: values brought to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if any(part in name for part in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_brings_nothing_to_the_host(method):
    config = configuration.load(words(method, "batch_size=4"))
    accelerator = Accelerator(cpu=True)
    plan = configuration.make_plan(config, 37, 1, 0)
    module = objectives.find(method)
    objective = objectives.start(config, plan.steps_per_epoch, plan.steps)
    optimizer = optim.make_optimizer(config.optim, objective)
    model, optimizer = accelerator.prepare(objective, optimizer)
    views = module.views(config.objective, config.data)
    batches = [random_batch(views, 4, 3, accelerator.device) for _ in range(2)]
    window = Window()
    same = {"accumulate": 2, "seed": config.seed, "config": config.optim}
    train_step(accelerator, model, optimizer, batches, 0, window, **same)  # makes the optimizer's state
    with Calls() as calls:
        train_step(accelerator, model, optimizer, batches, 1, window, **same)
    assert calls.waits == ["aten::_local_scalar_dense"] * 2  # the seed of each micro-batch, which lies on the host
