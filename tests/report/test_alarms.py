"""How often the alarms are right: `judge` reads the logs of the campaign's runs again, line by line.

The runs are those of tests/benchmarks/alarms.py, of which alarms.json.xz holds what `judge` reads. A threshold that is
moved too far makes one of these fail.
"""

import dataclasses

import pytest

from ..benchmarks import alarms
from ..benchmarks.alarms import first_alarm, first_words
from ..conftest import words

RUNS = alarms.stored()
MISSED: list[tuple[str, int]] = []
# Known by the rank, when 40 % of the run is over.
LATE = {"dino_bare", "dino_paper_short", "dino_paper_fractals", "dino_16_images"}
KEYS = {
    "mae_rate_100": "optim.base_lr=0.002", "mae_rate_low": "optim.base_lr=0.002",
    "mae_decay": "optim.weight_decay=0.05",
    "mae_overflow": "optim.base_lr=0.002", "dino_rate_100": "optim.base_lr=0.003",
    "dino_center_off": "objective.center_momentum=0.9", "dino_hot_teacher": "objective.teacher_temp=0.04",
    "dino_frozen_teacher": "objective.momentum=0.98", "dino_momentum_0": "objective.momentum=0.98",
    "dino_bare": "objective.koleo_weight=0.3", "mae_mask_97": "objective.mask_ratio=0.75",
    "mae_no_warmup": "optim.base_lr=0.002", "dino_rate_low": "optim.base_lr=0.003",
    "dino_overflow": "optim.base_lr=0.003", "dino_cold_student": "objective.koleo_weight=0.3",
}  # fmt: skip


def of(kind: str) -> list[dict]:
    return [run for run in RUNS if alarms.kind_of(run, RUNS) == kind]


def test_no_healthy_run_has_an_alarm():
    healthy = of("healthy")
    assert len(healthy) >= 40
    for run in healthy:
        assert first_alarm(run, 4) is None, (run["name"], run["seed"], first_alarm(run, 4))


def test_every_harmed_run_is_said_and_most_of_them_early():
    said = {(run["name"], run["seed"]): first_alarm(run) for run in of("harmed")}
    assert len(said) >= 30
    assert [run for run, alarm in said.items() if alarm is None] == MISSED
    at_start = {run["name"] for run in RUNS if run["said_at_start"]}  # a warning before the first step
    late = {run for (run, _), alarm in said.items() if alarm and alarm[0] > 0.05} - at_start
    assert late == LATE


def test_the_first_advice_names_the_key_that_was_sabotaged():
    for name, key in KEYS.items():
        for run in RUNS:
            if run["name"] == name:
                alarm = first_alarm(run)
                assert alarm, name
                assert any(word.startswith(key) for word in first_words(alarm[1])), (name, alarm[1].advice)


def test_few_images_are_said_to_be_the_cause():
    for run in RUNS:
        if run["name"].endswith("_16_images"):
            alarm = first_alarm(run)
            assert alarm
            assert alarm[1].advice[0] == "It has 16 images, which are too few: give more as data.train."


def test_runs_with_the_first_advice_are_healed():
    healed = of("healed")
    assert len(healed) >= 10
    for run in healed:
        assert first_alarm(run, 4) is None, run["name"]
        assert not alarms.harmed(run, RUNS), (run["name"], run["knn"])


def test_what_a_run_says_of_its_lines_it_says_while_it_goes_on(cli, images, tmp_path):
    """Twenty times in all, so a fault of the first lines is on the console before a tenth of the run is over."""
    arguments = words(
        "mae", f"out={tmp_path / 'run'}", "steps=40", "log.every_steps=1", "optim.base_lr=3", "log.report=false"
    )
    status, printed, _ = cli("pretrain", images, *arguments)
    assert status == 0
    warnings = [line for line in printed.splitlines() if line.startswith("Warning at step")]
    assert len(warnings) == 1
    assert "Warning at step 2: It cannot learn like this: the learning rate is" in warnings[0]
    assert "Set optim.base_lr=" in warnings[0]


@pytest.mark.slow
def test_two_sabotaged_runs_and_a_healthy_one_trained_anew(tmp_path):
    """By the campaign's own code, so a change of the training that the stored logs do not know is seen."""
    alarms.make_fractals(tmp_path)
    cases = {case.name: case for case in alarms.cases()}
    said = {}
    for name in ("healthy_mae_fractals", "mae_rate_100", "dino_center_off"):
        case = dataclasses.replace(cases[name], images="fractals")
        said[name] = first_alarm(alarms.shortened(alarms.run(case, 1, tmp_path)))
    assert said.pop("healthy_mae_fractals") is None
    for name, alarm in said.items():
        assert alarm, name
        assert alarm[0] <= 0.05
        assert any(word.startswith(KEYS[name]) for word in first_words(alarm[1]))
