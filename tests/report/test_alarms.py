"""How often the alarms are right: `judge` reads the logs of the campaign's runs again, line by line.

The runs are those of tests/benchmarks/alarms.py, of which alarms.json.xz holds what `judge` reads. A threshold that is
moved too far makes one of these fail.
"""

import pytest

from sslvit.__main__ import main

from ..benchmarks import alarms
from ..benchmarks.alarms import first_alarm, first_words, harmed

RUNS = alarms.stored()


def of(kind: str) -> list[dict]:
    return [run for run in RUNS if not run["name"].startswith("healed_") and (
        not run["sabotage"] if kind == "healthy" else run["sabotage"] and harmed(run, RUNS) == (kind == "harmed"))]


def test_no_healthy_run_has_an_alarm():
    for run in of("healthy"):
        assert first_alarm(run, 3) is None, (run["name"], run["seed"], first_alarm(run))


def test_nearly_every_harmed_run_is_said_and_most_of_them_early():
    said = {(run["name"], run["seed"]): first_alarm(run) for run in of("harmed")}
    missed = [run for run, alarm in said.items() if alarm is None]
    early = [run for run, alarm in said.items() if alarm and alarm[0] <= 0.05]
    assert (len(said), len(missed), len(early)) == (0, 0, 0), missed
