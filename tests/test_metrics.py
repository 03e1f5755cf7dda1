"""What is written about a run, and how it is timed."""

import time

import pytest
import torch

from sslvit import metrics
from sslvit.metrics import Stopwatch, Window


def test_a_window_averages_over_steps_and_goes_on_from_its_state():
    window, resumed = Window(), Window()
    for value in (1.0, 2.0):
        window.add({"loss": torch.tensor(value)})
        window.end_step(torch.tensor(0.0))
    resumed.load(window.state())
    for each in (window, resumed):
        each.add({"loss": torch.tensor(6.0)}, 0.5)
        each.add({"loss": torch.tensor(8.0)}, 0.5)  # two micro-batches of one step
        each.end_step(torch.tensor(0.0))
        assert each.close() == {"loss": pytest.approx(10 / 3)}
        assert each.close() == {}


def test_skipped_steps_count_for_nothing_but_their_number():
    window = Window()
    for value, skip in ((1.0, 0.0), (float("nan"), 1.0), (3.0, 0.0)):
        window.add({"loss": torch.tensor(value)})
        window.end_step(torch.tensor(skip))
    assert window.close() == {"loss": 2.0, "skipped": 1}
    window.add({"loss": torch.tensor(float("inf"))})
    window.end_step(torch.tensor(1.0))
    assert window.close() == {"skipped": 1}


def test_a_window_is_reduced_on_the_device_of_its_values(monkeypatch):
    """NCCL reduces nothing that lies on the host."""
    devices = []
    monkeypatch.setattr(metrics, "all_reduce_sum", lambda x: devices.append(x.device.type) or torch.zeros(x.shape))
    window = Window()
    window.load({"steps": 1, "sums": {"loss": 1.0, "seen once": 2.0}})
    window.add({"loss": torch.tensor(1.0, device="meta")})
    window.end_step(torch.tensor(0.0, device="meta"))
    window.close()
    assert devices == ["meta"]


def test_a_pause_counts_for_nothing():
    watch = Stopwatch()
    time.sleep(0.05)
    with watch.pausing():
        time.sleep(0.3)
    time.sleep(0.05)
    assert 10 / 0.3 < watch.lap(10)["images_per_second"] <= 10 / 0.1


def test_tensorboard_reads_what_is_written_and_hides_what_a_killed_run_wrote(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begin, last in ((0, 5), (3, 4)):  # goes on from step 3, when 4 and 5 were written
        log = metrics.MetricsLog(tmp_path, begin, tensorboard=True)
        for step in range(begin + 1, last + 1):
            log.write({"step": step, "loss": 0.5 * step + begin, "images": 8 * step})
        log.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 0.5), (2, 1), (3, 1.5), (4, 5)]
    assert read.Tags()["scalars"] == ["loss", "images"]
