"""The energy of a run, from counters of pretended packages and GPUs."""

import json
import sys
import types
from unittest.mock import Mock

import pytest
import torch

from sslvit import energy, run
from sslvit.checkpoints.state import RunState
from sslvit.energy import ENERGY_COLUMNS, Meter

from .conftest import words

CPU = torch.device("cpu")
WH = 3_600_000_000  # microjoules
END = 262_143_328_850  # of a package's counter, as Intel's


def add(folder, zone: str, name: str, microjoules: int) -> None:
    (folder / zone).mkdir(parents=True, exist_ok=True)
    for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", END)):
        (folder / zone / file).write_text(f"{value}\n")


def two_packages(folder, first: int = 0, second: int = 0) -> None:
    add(folder, "intel-rapl:0", "package-0", first)
    add(folder, "intel-rapl:1", "package-1", second)
    for zone, name in (("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram"), ("intel-rapl:2", "psys")):
        add(folder, zone, name, 99 * first)
    add(folder, "intel-rapl-mmio:0", "package-0", first)  # the same package once more


def test_packages_are_summed_and_count_on_when_they_start_again(tmp_path):
    two_packages(tmp_path, END - WH, 5 * WH)
    meter = Meter(CPU, tmp_path)
    two_packages(tmp_path, 2 * WH, 9 * WH)
    assert meter.lap() == {"cpu_kwh": pytest.approx(0.003 + 0.004)}
    assert meter.lap() == {"cpu_kwh": 0}


def test_a_counter_may_start_again_several_times_between_two_lines(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(energy.time, "monotonic", lambda: clock[0])
    two_packages(tmp_path)
    meter = Meter(CPU, tmp_path)
    for n in range(1, 11):
        two_packages(tmp_path, n * 3 * END // 4 % END)
        clock[0] += 31
        meter.poll()
    assert meter.lap() == {"cpu_kwh": pytest.approx(7.5 * END / 3.6e12)}


def test_one_counter_that_cannot_be_read_ends_all_of_its_kind(tmp_path):
    assert Meter(CPU, tmp_path).lap() == Meter(CPU, tmp_path / "missing").lap() == {}
    two_packages(tmp_path)
    meter = Meter(CPU, tmp_path)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert meter.lap() == {}
    two_packages(tmp_path)
    assert meter.lap() == {}, "what it did not see in between is not known"
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("none\n")
    assert Meter(CPU, tmp_path).lap() == {}


def test_only_the_first_process_of_a_machine_counts_its_packages(tmp_path, monkeypatch):
    two_packages(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    meter = Meter(CPU, tmp_path)
    two_packages(tmp_path, WH)
    assert meter.lap() == {"cpu_kwh": 0}


def test_a_gpu_is_found_by_its_identity(tmp_path, monkeypatch):
    counted = {"GPU-7-2": 5}

    def read(handle):
        counted[handle] += 7_200_000  # millijoules
        return counted[handle]

    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=str, nvmlDeviceGetTotalEnergyConsumption=read
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="7-2"))
    meter = Meter(torch.device("cuda"), tmp_path)
    meter.lap()
    assert meter.lap() == {"gpu_kwh": pytest.approx(0.002)}
    assert Meter(CPU, tmp_path).lap() == {}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="another"))
    assert Meter(torch.device("cuda"), tmp_path).lap() == {}


def test_a_run_has_what_all_its_processes_use_and_nothing_if_one_cannot_tell(monkeypatch):
    shares = [{"cpu_kwh": 1.0, "gpu_kwh": 0.5}, {"cpu_kwh": 0.0, "gpu_kwh": 0.25}, {"cpu_kwh": 2.0}]
    monkeypatch.setattr(run, "gather_objects", lambda mine: shares)
    progress, recorder = RunState(energy={"cpu_kwh": 4.0, "gpu_kwh": 8.0}), types.SimpleNamespace(meter=Mock())
    run.Recorder.count_energy(recorder, progress)
    assert progress.energy == {"cpu_kwh": 7.0}
    recorder.meter = None
    run.Recorder.count_energy(recorder, RunState())  # nothing is read any more


def test_a_run_that_goes_on_counts_on_and_one_that_has_missed_some_says_no_more(cli, images, tmp_path, monkeypatch):
    class Pretended(Meter):
        laps = vanished = 0

        def lap(self):
            self.laps += 1
            return {} if self.laps == self.vanished else {"cpu_kwh": 0.001, "gpu_kwh": 0.002}

    def lines(steps: int) -> list[list[float] | None]:
        more = [f"out={tmp_path / 'run'}", f"steps={steps}", "warmup_epochs=0", "rank_every_steps=null", "workers=0"]
        status, _, error = cli("pretrain", images, *words("mae", *more, "report=false", "tensorboard=false"))
        assert status == 0, error
        records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        return [[record[name] for name in ENERGY_COLUMNS] if "cpu_kwh" in record else None for record in records]

    monkeypatch.setattr(run, "Meter", Pretended)
    found = [[0.001, 0.002], [0.002, 0.004]]
    assert lines(2) == found
    Pretended.vanished = 2
    found += [[0.004, 0.008], None]  # with what was used between the last line and the checkpoint
    assert lines(4) == found
    Pretended.vanished = 0
    assert lines(5) == [*found, None]
