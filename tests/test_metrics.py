"""What is written about a run, and how it is timed."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import tracking
from PIL import Image

from sslvit import distributed, metrics
from sslvit.metrics import Stopwatch, Window

from .conftest import words


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
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda x: devices.append(x.device.type) or torch.zeros(x.shape))
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


def test_pictures_go_to_trackers_that_take_them_and_one_that_fails_is_left_out(tmp_path, capsys):
    class Numbers:
        def log(self, values, step=None):
            self.last = values

    class Pictures(Numbers):
        def log_images(self, values, step=None):
            self.seen = {name: [image.shape for image in images] for name, images in values.items()}, step

    class Full(Numbers):
        def log_images(self, values, step=None):
            raise OSError("no room")

    trackers = {"numbers": Numbers(), "pictures": (taking := Pictures()), "full": Full()}
    log = metrics.MetricsLog(tmp_path, 0, tensorboard=False, trackers=trackers)
    for step in (5, 6):
        log.write_pictures({"attention": Image.new("RGB", (12, 8))}, step)
    assert taking.seen == ({"attention": [(8, 12, 3)]}, 6)
    assert list(log.trackers) == ["numbers", "pictures"]
    assert capsys.readouterr().out.count("full takes no more") == 1


def test_pictures_go_to_mlflow_and_trackio_which_get_none_from_accelerate(tmp_path, monkeypatch):
    """Neither package is installed for the tests. Stand-ins have the functions of mlflow 3.17 and trackio 0.43."""
    seen = []

    class Tracker:
        def log(self, values, step=None):
            seen.append((values, step))

    def log_image(image, artifact_file=None, key=None, step=None, timestamp=None, synchronous=False):
        seen.append((image, key, step, synchronous))

    image = Image.new("RGB", (12, 8))
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(log_image=log_image))
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=lambda value: ("image", value)))
    log = metrics.MetricsLog(tmp_path, 0, tensorboard=False, trackers={"mlflow": Tracker(), "trackio": Tracker()})
    log.write_pictures({"attention": image}, 5)
    assert seen == [(image, "attention", 5, True), ({"attention": ("image", image)}, 5)]


def test_a_tracker_gets_the_numbers_and_goes_on_with_its_run(cli, fails, images, tmp_path, monkeypatch):
    """A tracker of accelerate in the place of W&B's, which needs its server; and one whose server fails."""
    seen: list[tuple] = []

    class Fake(tracking.GeneralTracker):
        name, requires_logging_directory, main_process_only, tracker = "wandb", False, False, None

        def __init__(self, project, **more):
            seen.append(("start", project, more["name"], more["id"], more["resume"]))

        def store_init_configuration(self, values):
            if values["steps"] == 3:  # as mlflow does when a run goes on
                raise ValueError("Changing param values is not allowed")
            seen.append(("settings", values["optim.warmup_epochs"]))

        def log(self, values, step=None, **more):
            seen.append(("log", step, values["loss"] > 0))

        def finish(self):
            seen.append(("finish",))

    class Broken(Fake):
        def __init__(self, folder, where):
            assert where == str(tmp_path / "run")

        requires_logging_directory = True

        def log(self, values, step=None, **more):
            raise ConnectionError("no route to the \x1b[31mhost")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "broken", Broken)
    out, more = f"out={tmp_path / 'run'}", ["rank_every_steps=null", "report=false", "workers=0", "warmup_epochs=0"]
    command = ["pretrain", images, *words("mae", out, "steps=2", *more)]
    status, printed, error = cli(*command, "log.trackers=[wandb,broken]")
    assert status == 0, error
    assert r"Warning: broken takes no more numbers (no route to the \x1b[31mhost). The run goes on." in printed
    assert printed.count("broken") == 1
    start = seen[0]
    assert start[:3] == ("start", "sslvit", "run")
    assert seen[1:] == [("settings", 0.0), ("settings", 0.0), ("log", 1, True), ("log", 2, True), ("finish",)]
    seen.clear()
    status, printed, error = cli(*command, "steps=3", "log.trackers=[wandb]")
    assert status == 0, error
    assert "wandb keeps the settings that it had (Changing param values is not allowed)" in printed
    assert seen[0] == start, "the same run of the tracker"
    assert ("log", 3, True) in seen
    assert ("log", 2, True) not in seen
    others = words("mae", f"out={tmp_path / 'other'}", "steps=2", *more)
    assert "wandbb is not one of" in fails("pretrain", images, *others, "log.trackers=[wandbb]")
    assert "Did you mean wandb?" in fails("pretrain", images, *others, "log.trackers=[wandbb]")
    (empty := tmp_path / "empty").mkdir()
    absent = fails("pretrain", empty, *others, "log.trackers=[mlflow]")
    assert "mlflow is not installed: pip install mlflow." in absent, "before images are opened"
