"""Whole runs of the command give the stored numbers; see golden_runs.py for what they are and how to renew them."""

import pytest

from . import golden_runs


@pytest.mark.parametrize("name", golden_runs.RUNS)
def test_a_run_gives_the_stored_numbers(name, tmp_path):
    assert golden_runs.stored(name)["arguments"] == golden_runs.RUNS[name]
    assert golden_runs.changed(golden_runs.stored(name), golden_runs.run(name, tmp_path)) == []


@pytest.mark.parametrize("name", ["dino", "mae"])
def test_two_processes_give_the_numbers_of_two_micro_batches(name, tmp_path):
    assert golden_runs.changed(golden_runs.stored(name), golden_runs.run_on_two(name, tmp_path)) == []
