"""`sslvit bench`: what it counts is right, and what it advises follows from what it measured."""

import dataclasses
import json
import re
import time

import pytest
import torch

from sslvit import config, data
from sslvit.__main__ import main
from sslvit.tools import bench
from tests.conftest import METHODS, words
from tests.processes import begin, environments, finish

PRODUCTS = (64,)  # their rate at the usual sizes takes two seconds


@pytest.fixture(scope="module")
def report(images):
    run = config.load([str(images), *words("mae", "precision=float32", "workers=0", "batch_size=4")])
    return bench.bench(run, bench.Config(seconds=0.05), PRODUCTS), run


def test_the_operations_of_a_step_are_those_of_the_equations(report):
    def block(tokens: int, rows: int, width: int) -> float:
        """Multiply-adds of a forward pass: keys and values of all tokens; for the rows whose output is wanted, queries,
        scores, weighted values, projection and MLP."""
        return 2 * tokens * width**2 + rows * (10 * width**2 + 2 * tokens * width)

    patches, kept, hidden, pixels = 16, 4, 12, 8 * 8 * 3
    inner = 2 * block(1 + kept, 1 + kept, 48) + (1 + kept) * 48 * 32
    inner += block(1 + patches, hidden, 32) + hidden * 32 * pixels  # the decoder's only block is its last
    stem = kept * pixels * 48  # its input needs no gradient, so its backward pass is one product instead of two
    assert report[0].flop == pytest.approx(2 * (3 * inner + 2 * stem), rel=0.01)


def test_the_report_names_every_stage_and_the_whole_run(report):
    text = "\n".join(bench.lines(*report))
    for stage in ("read and decode", "cut the crops", "colours", "forward", "backward", "update", "the loop"):
        assert re.search(rf"{stage}.* [0-9,]+ +[0-9.]+", text), text
    assert "the whole run: 64 images" in text
    assert "float32, 1 process" in text
    assert report[0].loop >= report[0].forward + report[0].backward


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"waiting": 0.5, "read": 0.02, "workers": 0}, "data.workers="),
        ({"waiting": 0.5, "workers": 0, "on_device": True}, "data.cache=ram does it on the cores"),
        ({"waiting": 0.5, "read": 0.02, "workers": 999}, "smaller image files"),
        ({"device": "cuda (a GPU)", "dtype": torch.bfloat16, "memory": 10, "memory_total": 100}, "batch_size"),
        ({"update": 9.0, "dtype": torch.bfloat16}, "a larger global_batch_size"),
        ({"dtype": torch.bfloat16, "update": 0.0}, "nothing stands out"),
    ],
)
def test_the_advice_follows_from_the_measurements(report, changes, expected):
    measured, run = report
    assert (
        expected in bench.advice(dataclasses.replace(measured, **{"cached": False, "waiting": 0.0, **changes}), run)[0]
    )


def with_small_products(argv: list[str]) -> int:
    measure = bench.matmul_rate
    bench.matmul_rate = lambda device, dtype, sizes: measure(device, dtype, PRODUCTS)
    return main(argv)


@pytest.mark.parametrize("method", list(METHODS))
def test_two_processes_measure_together_and_leave_nothing_behind(method, images, tmp_path):
    own = ["seconds=0.05", f"report={tmp_path / 'report.json'}"]
    command, log = ["bench", str(images), *words(method, f"out={tmp_path / 'run'}"), *own], tmp_path / "log"
    both = [begin(with_small_products, command, output=log, environment=one) for one in environments(2)]
    text = [finish(process, log) for process in both][-1]
    assert json.loads((tmp_path / "report.json").read_text())["processes"] == 2
    assert "2 processes" in text
    assert text.count("the whole run") == 1
    assert not (tmp_path / "run").exists()


def test_a_trace_of_three_steps_can_be_opened(cli, images, tmp_path):
    assert cli("pretrain", images, *words("mae", f"out={tmp_path / 'run'}", "profile=true"))[0] == 0
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"}


@pytest.mark.parametrize("seconds", ["0", "x"])
def test_a_length_without_a_meaning_is_refused(fails, images, seconds):
    assert "seconds" in fails("bench", images, *words("mae"), f"seconds={seconds}")


def test_a_report_that_cannot_be_written_is_refused_before_the_work(fails, images):
    assert "no folder" in fails("bench", images, *words("mae"), "report=/no/such/folder/x.json")


@pytest.mark.parametrize("command", ["bench", "pretrain"])
def test_a_model_without_blocks_is_not_compiled_and_nothing_is_written(fails, images, tmp_path, command):
    resnet = ["model.name=resnet18", "image_size=64", "local_crop_size=32", "compile=true"]
    given = [word for word in words("dino", *resnet) if not word.startswith("model.args=")]
    assert "this one has none" in fails(command, images, *given, f"out={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_images_on_the_device_are_cut_there_without_loader_processes(images):
    run = config.load([str(images), *words("mae", "batch_size=4", "data.cache=device")])
    found = bench.bench(run, bench.Config(seconds=0.05), PRODUCTS)
    assert found.on_device
    assert found.workers == 0
    assert re.search(r"cut the crops, on the device +[0-9,]+ +[0-9.]+", "\n".join(bench.lines(found, run)))


def test_images_that_stay_in_memory_are_decoded_in_the_first_epoch_only(images, monkeypatch):
    """The whole run is forecast from both; reading is made slow here."""

    class Slow(data.WrappedSource):
        def read(self, index: int) -> torch.Tensor:
            time.sleep(0.02)
            return self.source.read(index)

    opened = data.open_source
    monkeypatch.setattr(data, "open_source", lambda *words: Slow(opened(*words)))
    run = config.load([str(images), *words("mae", "precision=float32", "workers=0", "cache=ram", "epochs=10")])
    report = bench.bench(run, bench.Config(seconds=0.05), PRODUCTS)
    assert report.first > report.loop + 0.008  # of three steps one is of the second epoch
    assert (report.epoch, report.images) == (32, 320)
    assert report.whole == pytest.approx(32 * report.first + 288 * report.loop)
    assert "the loop, first epoch" in "\n".join(bench.lines(report, run))
