"""Running out of memory, for real: in processes whose address space is limited."""

import resource
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from sslvit import config, memory, objectives
from sslvit.__main__ import main
from sslvit.arguments import read_yaml
from sslvit.errors import UserError

from . import processes
from .conftest import words


def limit(more: int) -> None:
    """Bytes beyond what this process has mapped."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))


def limited_main(argv: list[str]) -> int:
    limit(600 << 20)
    return main(argv)


def test_a_step_that_does_not_fit_is_one_sentence_with_values_that_keep_the_global_batch(images, tmp_path):
    arguments = words("mae", f"out={tmp_path / 'run'}", "global_batch_size=36", "image_size=1024", "workers=0")
    arguments = [word for word in arguments if word != "global_batch_size=8"] + ["precision=float32", "cache=false"]
    log = tmp_path / "log"
    process = processes.begin(limited_main, ["pretrain", str(images), *arguments], output=log)
    printed = processes.finish(process, log, status=2)
    assert "Traceback" not in printed
    assert "memory of the machine is not enough for batch_size=36 (the peak was " in printed
    assert "give batch_size=18, of which 2 micro-batches on each process make the same global_batch_size=36" in printed
    assert "or model.grad_checkpointing=true" in printed


def largest(argv: list[str]) -> None:
    accelerator, cfg = Accelerator(cpu=True), config.load(argv)
    objective = objectives.start(cfg, 4, 8)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    views = objectives.find(cfg.method).views(cfg.objective, cfg.data)
    limit(700 << 20)
    print("found", memory.largest_fitting(cfg, accelerator, objective, views))
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_the_largest_batch_that_fits_is_found_by_trying_and_changes_nothing(tmp_path):
    big = ["precision=float32", "image_size=256", "global_crop_scale=[0.5,1]"]
    process = processes.begin(largest, [*words("dino", *big), "global_batch_size=768"], output=tmp_path / "log")
    printed = processes.finish(process, tmp_path / "log")
    found = int(printed.split("found ")[1])
    assert 1 < found < 768
    assert found in memory.sizes(768)


@pytest.mark.parametrize(("total", "expected"), [(1, [1]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 12]), (7, [1, 7])])
def test_candidates_divide_and_double(total, expected):
    assert memory.sizes(total) == expected


def test_other_errors_are_not_taken_for_memory():
    def trial(size: int) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        memory.grow([1, 2], trial, lambda: None)


def test_words_that_are_neither_a_number_nor_auto(fails, images, tmp_path):
    arguments = ["pretrain", images, *words("mae", f"out={tmp_path / 'run'}")]
    assert "batch_size" in fails(*arguments, "batch_size=many")


BIG = ["image_size=128", "global_batch_size=36", "precision=float32", "koleo_weight=0.1"]


def fitted(method: str, room: float, *more: str, monkeypatch) -> tuple[config.RunConfig, config.Plan, memory.Need]:
    """What becomes of a run, if so many times the memory of its step is left."""
    accelerator, cfg = Accelerator(cpu=True), config.load(words(method, *BIG, *more))
    objective = objectives.start(cfg, 4, 8)
    views = objectives.find(method).views(cfg.objective, cfg.data)
    need = memory.count(cfg, accelerator, objective, views)
    monkeypatch.setattr(memory, "memory_left", lambda device: room * need(36))
    plan = config.make_plan(cfg, 37, 1, 0)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    cfg, plan = memory.fit(cfg, plan, accelerator, objective, views)
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert objective.config == cfg.objective
    return cfg, plan, need


@pytest.mark.parametrize(
    ("room", "more", "crop_wise", "batch_size"),
    [
        (10.0, [], None, None),
        (10.0, ["batch_size=auto"], None, 36),
        (1.2, [], True, None),
        (1.2, ["batch_size=36"], True, 36),
        (1.2, ["crop_wise_backward=false"], False, 18),
        (1.2, ["crop_wise_backward=false", "batch_size=36"], False, 36),  # it fits, if hardly
        (0.3, [], True, 9),
    ],
)
def test_what_does_not_fit_goes_by_parts_and_then_in_smaller_micro_batches(
    room, more, crop_wise, batch_size, monkeypatch, capsys
):
    cfg, plan, _ = fitted("dino", room, *more, monkeypatch=monkeypatch)
    assert cfg.objective.crop_wise_backward is crop_wise
    assert cfg.batch_size == batch_size
    assert (plan.layout.batch_size, plan.layout.accumulate) == (batch_size or 36, 36 // (batch_size or 36))
    printed = capsys.readouterr().out
    assert ("Crop-wise backward: a step of 36 images needs about " in printed) == (crop_wise is True)
    smaller = batch_size in (9, 18)
    assert (f"batch_size={batch_size}, of which {plan.layout.accumulate} micro-batches make" in printed) == smaller
    assert ("KoLeo compares the images of a micro-batch, so now fewer of them." in printed) == smaller


def test_a_number_that_does_not_fit_on_a_cpu_is_refused_with_the_arithmetic(monkeypatch):
    with pytest.raises(UserError, match=r"a step of 36 images needs about .*, and .* are free\. .*batch_size=18"):
        fitted("mae", 0.9, "batch_size=36", monkeypatch=monkeypatch)
    with pytest.raises(UserError, match=r"take a smaller model or smaller images|grad_checkpointing"):
        fitted("mae", 0.001, monkeypatch=monkeypatch)


def test_a_run_that_was_cut_by_itself_goes_on_with_its_micro_batches(cli, images, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 0)
    monkeypatch.setattr(memory, "memory_left", lambda device: 4.4e6)
    fixed = ["workers=0", "precision=float32", "warmup_epochs=0", f"out={tmp_path / 'run'}"]
    status, printed, error = cli("pretrain", images, *words("dino", *fixed, "steps=1"))
    assert status == 0, error
    assert "Crop-wise backward: " in printed
    stored = read_yaml(tmp_path / "run" / "config.yaml")
    assert stored["objective"]["crop_wise_backward"] is True
    assert stored["batch_size"] == 4
    monkeypatch.setattr(memory, "memory_left", lambda device: 1e12)
    status, printed, error = cli("pretrain", images, *words("dino", *fixed, "steps=2"))
    assert status == 0, error
    assert "Resuming" in printed
    assert read_yaml(tmp_path / "run" / "config.yaml")["batch_size"] == stored["batch_size"]


def test_the_last_resort_is_named():
    cfg = config.load(words("mae", "batch_size=1", "model.grad_checkpointing=true"))
    assert "smaller model or smaller images" in memory.advice(cfg)


def test_several_processes_are_told_that_they_can_share_a_model(monkeypatch):
    cfg = config.load(words("mae", "batch_size=1", "model.grad_checkpointing=true"))
    monkeypatch.setattr(memory, "world_size", lambda: 2)
    assert "shard=true" in memory.advice(cfg)
    cfg.shard = True
    assert "shard=true" not in memory.advice(cfg)
