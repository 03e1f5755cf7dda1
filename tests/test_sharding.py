"""One model split among processes: the same numbers, half of the memory, checkpoints for any number of processes."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from sslvit import config as configuration
from sslvit import objectives, optim, sharding
from sslvit.checkpoints import state
from sslvit.data.crops import random_batch
from sslvit.distributed import full_tensor, is_sharded, local_shard
from sslvit.hardware import choose_attention, start_accelerator
from sslvit.metrics import Window
from sslvit.step import train_step

from . import processes
from .conftest import METHODS, words
from .processes import final_weights, moments

# What a step of a sharded objective is made of; each is compared with the step of a whole one.
STEPS = {
    "mae": words("mae", "precision=float32", "clip=0.1"),
    "mae bf16": words("mae", "precision=bf16", "koleo_weight=0.1"),
    "dino": words("dino", "precision=float32", "clip=0.1", "drop_path=0.5"),
    "dino bf16": words("dino", "precision=bf16", "freeze_last_layer_epochs=0", "norm_last_layer=false"),
    "recomputed": words("dino", "precision=float32", "grad_checkpointing=true", "drop_path=0.5", "student_keep=0.5"),
    "crop-wise": words("dino", "precision=float32", "drop_path=0.5", "crop_wise_backward=true"),
}
# Another family, whose blocks are not a ViT's.
STEPS["swin"] = [word for word in STEPS["dino"] if not word.startswith("model.")] + [
    "local_crop_size=32",
    "model.name=swin_tiny_patch4_window7_224",
    "model.args={embed_dim: 12, depths: [1, 1], num_heads: [1, 2], window_size: 4}",
]
NUM_STEPS = 2


def trained(settings: list[str], sharded: bool):
    """(objective, optimizer, values of the log, what evaluations are shown) after some steps, whose batches are the
    same on all processes."""
    config = configuration.load(settings)
    accelerator = start_accelerator(config.precision)
    device = accelerator.device
    plan = configuration.make_plan(config, 37, accelerator.num_processes, accelerator.process_index)
    objective = objectives.start(config, plan.steps_per_epoch, plan.steps)
    choose_attention(objective, device, accelerator.mixed_precision)
    shown = sharding.place(objective, device, sharded)
    optimizer = optim.make_optimizer(config.optim, objective)
    schedule = optim.Schedule(config.optim, 8, 0, plan.steps)
    model, optimizer = (
        sharding.prepare(accelerator, objective, optimizer)
        if sharded
        else (accelerator.prepare_model(objective, evaluation_mode=True), accelerator.prepare_optimizer(optimizer))
    )
    views = objectives.find(config.method).views(config.objective, config.data)
    window, lines = Window(), []
    objective.train()
    for step in range(NUM_STEPS):
        torch.manual_seed(step)
        batches = [random_batch(views, 2, 3, device) for _ in range(2)]
        optim.set_schedule(optimizer, schedule, step)
        train_step(
            accelerator, model, optimizer, batches, step, window, accumulate=2, seed=config.seed, config=config.optim
        )
        lines.append(window.close())
    return objective, optimizer.optimizer, lines, shown


def tensors(objective, optimizer) -> dict[str, torch.Tensor]:
    return objective.state_dict() | state.optimizer_tensors(objective, optimizer)


def compare(name: str) -> None:
    settings = [*STEPS[name], "base_lr=0.03", *(["momentum=0.5"] if "method=dino" in STEPS[name] else [])]
    ours, our_optimizer, our_lines, shown = trained(settings, True)
    theirs, their_optimizer, their_lines, _ = trained(settings, False)
    for mine, other in zip(our_lines, their_lines, strict=True):
        assert mine == pytest.approx(other, rel=1e-5), (mine, other)
    mine, other = tensors(ours, our_optimizer), tensors(theirs, their_optimizer)
    assert mine.keys() == other.keys()
    for key, value in other.items():
        if "qkv.bias" not in key:  # a key's bias has no gradient but rounding, which Adam blows up
            assert torch.allclose(full_tensor(mine[key]), value, rtol=1e-4, atol=1e-5 * float(value.abs().max())), key
    # every parameter and moment is split, those of the teacher as the student's ...
    assert all(is_sharded(value) for key, value in mine.items() if key.endswith(("weight", "_avg", "_avg_sq"))), name
    if name.startswith("dino"):
        parts = (
            {key: local_shard(p).shape for key, p in net.named_parameters()} for net in (ours.student, ours.teacher)
        )
        assert next(parts) == next(parts)
    # ... and no process has more than its half, but for rows that do not divide
    held = sum(local_shard(value.detach()).nbytes for value in mine.values() if is_sharded(value))
    total = sum(value.nbytes for value in other.values())
    assert 0.4 * total < held < 0.6 * total, (name, held, total)
    # what is evaluated is the whole encoder, on one process alone if it likes, and gone afterwards
    images = torch.randn(3, 3, 32, 32)
    with shown() as encoder:
        expected = theirs.exported_encoder().eval().features(images)
        if os.environ["RANK"] == "0":
            assert torch.allclose(encoder.eval().features(images), expected, atol=1e-4)
    assert sum(p.numel() for p in encoder.parameters()) == 0


def work(environment: dict[str, str], output: str) -> None:
    os.environ.update(environment)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    for name in STEPS:
        compare(name)
        print(name, "passed", flush=True)


def test_a_step_of_a_sharded_objective_is_that_of_a_whole_one_with_half_of_its_bytes_on_each_process(tmp_path):
    """Within 1e-5: losses, weights and moments; with both ways of clipping, frozen prototypes, drop path,
    recomputed blocks, and a family whose blocks are not a ViT's."""
    output = tmp_path / "log"
    started = [
        processes.CONTEXT.Process(target=work, args=(environment, str(output)))
        for environment in processes.environments(2)
    ]
    for process in started:
        process.start()
    for process in started:
        text = processes.finish(process, output, seconds=300)
    assert text.count("passed") == 2 * len(STEPS)


OF_MANY = ("teacher_mean_entropy", "feature_spread", "image_difference")  # those of few images at once are not logged


def assert_close(a: Path, b: Path) -> None:
    ours, theirs = (
        [{key: line[key] for key in line if key not in OF_MANY} for line in processes.learned(run)] for run in (a, b)
    )
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
    for read in (final_weights, moments):
        mine, other = read(a), read(b)
        assert mine.keys() == other.keys()
        for key, value in other.items():
            if not key.endswith("qkv.bias"):  # as above
                assert torch.allclose(mine[key], value, atol=1e-5), key


def keep_up_to(run_dir: Path, step: int) -> None:
    """What a run would have left that was killed after the checkpoint of a step."""
    for saved in state.steps_saved(run_dir):
        if saved > step:
            shutil.rmtree(state.folder_of(run_dir, saved))


@pytest.mark.parametrize("method", ["dino", pytest.param("mae", marks=pytest.mark.slow)])
def test_a_run_goes_on_sharded_or_not_whatever_it_was_before(cli, labelled, tmp_path, method):
    """Two sharded processes that are killed, one that is not sharded, two sharded ones again: one run."""
    arguments = [
        "pretrain", labelled / "train", *words(method, "precision=float32", "base_lr=1e-3", "epochs=3"), "keep_last=9",
        "workers=0", "save.every_steps=4", "rank_every_steps=6", f"eval.train={labelled / 'train'}",
        f"eval.test={labelled / 'test'}", "eval.k=3",
    ]  # fmt: skip
    expected, out, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert cli(*arguments, f"out={expected}")[0] == 0
    sharded = [*arguments, f"out={out}", "shard=true", "batch_size=2"]
    started = processes.start_several(sharded, log, 2)
    processes.kill_at(started[1], out, 6)
    assert "has ended, so process 0 ends too" in processes.finish(started[0], log, status=2)
    keep_up_to(out, 4)
    assert state.steps_saved(out) == [4]
    status, printed, _ = cli(*arguments, f"out={out}")
    assert status == 0
    assert "Resuming" in printed
    assert_close(out, expected)
    keep_up_to(out, 8)
    printed = processes.launch(sharded, log, 2)
    assert f"Resuming {out} at step 8 of 12" in printed
    assert_close(out, expected)


@pytest.mark.slow  # the compiler takes most of a minute for each
@pytest.mark.parametrize("method", METHODS)
def test_compiled_sharded_blocks_train_as_plain_ones(images, tmp_path, method):
    more = ["precision=float32", "steps=5", "warmup_epochs=0", "batch_size=2", "shard=true"]
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    arguments = ["pretrain", images, *words(method, *more)]
    processes.launch([*arguments, f"out={plain}"], tmp_path / "log", 2)
    printed = processes.launch([*arguments, f"out={compiled}", "compile=true"], tmp_path / "log2", 2, seconds=500)
    assert "Compiled" in printed
    assert_close(compiled, plain)


def test_one_process_says_that_there_is_nothing_to_split(cli, images, tmp_path):
    status, printed, _ = cli("pretrain", images, *words("mae", f"out={tmp_path}/run"), "shard=true")
    assert status == 0
    assert "it has no effect" in printed


@pytest.mark.parametrize(
    ("word", "said"),
    [("precision=fp16", "use bf16"), ("batch_size=auto", "give a number")],
    ids=["fp16", "auto"],
)
def test_what_cannot_be_sharded_is_refused(fails, images, tmp_path, word, said):
    assert said in fails("pretrain", images, *words("mae", f"out={tmp_path}/run"), "shard=true", word)
    assert not (tmp_path / "run").exists()


def test_an_accelerate_that_is_configured_for_its_own_sharding_is_refused(fails, images, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "pretrain shard=true splits" in fails("pretrain", images, *words("mae", f"out={tmp_path}/run"))
