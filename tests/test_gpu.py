"""What only a GPU can show. `python -m tests.gpu` runs these; its rehearsal, on a CPU, those that a CPU can run."""

import dataclasses
import json
import os

import pytest
import torch

from sslvit import memory, sharding
from sslvit.arguments import read_yaml

from . import processes, test_sharding
from .benchmarks import steps
from .conftest import words
from .test_benchmarks import CASES as TINY
from .test_devices import EVALUATIONS, RUNS, evaluation, pretraining

REHEARSAL = bool(os.environ.get("SSLVIT_GPU_REHEARSAL"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or REHEARSAL), reason="needs a CUDA GPU; torch sees none here"),
]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU cannot rehearse this: it needs a CUDA GPU")
FIXED = ["precision=float32", "workers=0"]


def losses(run) -> list[float]:
    return [line["loss"] for line in processes.lines(run) if "loss" in line]


def test_training_is_on_the_gpu_and_goes_on_after_a_stop(cli, images, tmp_path):
    for out, lengths in (("whole", [6]), ("resumed", [3, 6])):
        for length in lengths:
            more = ["epochs=null", "warmup_epochs=0", f"steps={length}", f"out={tmp_path / out}"]
            status, printed, _ = cli("pretrain", images, *words("mae", *FIXED, *more))
            assert status == 0
            assert REHEARSAL or "cuda" in printed
    # The learning rate follows the length of the run, so the first three steps are shorter; the log must be whole.
    assert [line["step"] for line in processes.lines(tmp_path / "resumed") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert torch.tensor(losses(tmp_path / "resumed")).isfinite().all()
    assert losses(tmp_path / "whole")[0] == pytest.approx(losses(tmp_path / "resumed")[0], rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_runs_with_k_nn_also_from_images_on_the_device(cli, name, images, labelled, tmp_path):
    status, printed, error = cli(*pretraining(name, images, labelled, tmp_path / "run"))
    assert status == 0, error
    assert "k-NN" in printed


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations(cli, name, colour_run, labelled, tmp_path):
    status, _, error = cli(*evaluation(name, colour_run, labelled, tmp_path / "result.json"))
    assert status == 0, error
    assert json.loads((tmp_path / "result.json").read_text())


@on_a_gpu  # it starts Python once more, which a rehearsal would wait for
def test_export(cli, colour_run, tmp_path):
    status, _, error = cli("export", f"run={colour_run}", "to=timm", f"out={tmp_path / 'encoder'}")
    assert status == 0, error
    assert (tmp_path / "encoder" / "model.safetensors").is_file()


def test_one_rank_of_a_sharded_model_takes_the_steps_of_a_whole_one(monkeypatch, tmp_path):
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        monkeypatch.setattr(sharding, "world_size", lambda: 2)  # one process alone is not split
        settings = test_sharding.STEPS["dino bf16"]
        ours, theirs = (test_sharding.trained(settings, sharded)[2] for sharded in (True, False))
        for mine, other in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(other, rel=1e-3)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_no_step_waits_for_the_device(method):
    case = TINY[method]
    step = steps.variants(case, 0.1, ["sslvit bf16"])["sslvit bf16"]
    batch = steps.batch(case, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    step(batch, 0)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch, 1)
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_fp16_with_its_scaler(cli, images, tmp_path):
    for length in (3, 6):
        more = ["precision=fp16", "workers=0", "epochs=null", "warmup_epochs=0", f"steps={length}"]
        status, _, error = cli("pretrain", images, *words("dino", *more, f"out={tmp_path / 'run'}"))
        assert status == 0, error
    assert len(losses(tmp_path / "run")) == 6
    assert torch.tensor(losses(tmp_path / "run")).isfinite().all()


@on_a_gpu
@pytest.mark.parametrize("method", ["mae", "dino"])
def test_compiled_blocks(cli, images, method, tmp_path):
    for name in ("plain", "compiled"):
        more = [*FIXED, "steps=4", f"out={tmp_path / name}", f"compile={str(name == 'compiled').lower()}"]
        status, _, error = cli("pretrain", images, *words(method, *more))
        assert status == 0, error
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)


@pytest.fixture
def gpu_memory():
    """Allow this process some bytes of the GPU's memory beyond what `batch_size=auto` leaves free."""

    def allow(size: int) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory.RESERVE + size / total))

    yield allow
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


BIG = [
    "data.train=fractals:train,size=32,count=600", "model.name=vit_small_patch16_224", "image_size=224",
    "global_batch_size=512", "steps=2", "warmup_epochs=0", "cache=false", "log.tensorboard=false",
    "log.rank_every_steps=null",
]  # fmt: skip


@on_a_gpu
def test_memory_that_does_not_suffice_is_one_sentence(cli, gpu_memory, tmp_path):
    gpu_memory(2**30)
    given = ["batch_size=512", "precision=float32", f"out={tmp_path / 'run'}"]
    status, _, error = cli("pretrain", "method=mae", *BIG, *given)
    assert status == 2
    assert "The memory of the GPU is not enough for batch_size=512" in error
    assert "give batch_size=256" in error


@on_a_gpu
def test_batch_size_auto_finds_what_fits(cli, gpu_memory, tmp_path):
    gpu_memory(2 * 2**30)
    status, _, error = cli("pretrain", "method=mae", *BIG, "batch_size=auto", f"out={tmp_path / 'run'}")
    assert status == 0, error
    assert 1 <= read_yaml(tmp_path / "run" / "config.yaml")["batch_size"] < 512


def test_crop_wise_backward():
    gpu = torch.cuda.is_available()
    case = dataclasses.replace(steps.CASES["dino-small-gpu"], batch_size=16) if gpu else TINY["dino"]
    precision = "bf16" if gpu else "float32"  # most of what so small a model saves are bf16 copies of its weights
    found = {}
    for chosen in (False, True):
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        losses, _, most = steps.crop_wise(case, chosen, precision, 3)
        found[chosen] = losses, torch.cuda.max_memory_allocated() if gpu else most
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-3)
    assert found[True][1] < found[False][1] / (2 if gpu else 1.5)
