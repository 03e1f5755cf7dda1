"""The judgement of a run, on curves made by hand. Real runs: test_report.py, and the campaign."""

import numpy as np
import pytest

from sslvit.report.verdict import Measured, judge

STEPS = np.arange(10.0, 1001, 10)


def curve(*values: float) -> tuple[np.ndarray, np.ndarray]:
    """Through these values at even distances, with a little noise."""
    smooth = np.interp(STEPS, np.linspace(10, 1000, len(values)), values)
    return STEPS, smooth + 0.001 * np.sin(STEPS)


def measured(**changes) -> Measured:
    usual = {
        "step": 1000,
        "total": 1000,
        "loss": curve(2.0, 1.2, 1.1, 1.05, 1.04, 1.03),
        "warmup": 100.0,
        "epochs": 80.0,
    }
    return Measured(**(usual | changes))


@pytest.mark.parametrize(
    ("state", "changes"),
    [
        ("no metrics", {"step": None, "loss": (np.empty(0), np.empty(0))}),
        ("learned", {}),
        ("learned", {"knn": (np.array([0.0, 1000.0]), np.array([20.0, 60.0]))}),
        ("learning", {"step": 500, "running": True}),
        ("learning", {"step": 500, "running": True, "knn": (np.array([0.0, 400.0]), np.array([20.0, 19.0]))}),
        ("warming up", {"step": 60, "running": True}),
        ("stopped", {"step": 600}),
        ("undertrained", {"loss": curve(2.0, 1.8, 1.6, 1.4, 1.2, 1.0)}),
        ("undertrained", {"knn": (np.array([0.0, 1000.0]), np.array([20.0, 20.4]))}),
        ("undertrained", {"knn": (np.array([0.0, 1000.0]), np.array([25.0, 26.9]))}),
        ("learned", {"knn": (np.array([0.0, 1000.0]), np.array([1.0, 2.0]))}),  # of a thousand classes
        ("learned", {"knn": (np.array([0.0, 1000.0]), np.array([70.0, 71.5])), "pretrained": True}),
        ("learned", {"pixels": (47.0, 45.8)}),
        ("undertrained", {"pixels": (44.1, 45.8)}),
        ("undertrained", {"knn": (np.array([0.0, 500.0, 1000.0]), np.array([20.0, 30.0, 40.0]))}),
        ("undertrained", {"loss": curve(1.0, 1.0, 1.0, 1.0)}),
        ("diverged", {"loss": curve(2.0, 1.2, 1.1, 1.9, 2.4, 2.5)}),
        ("diverged", {"loss": (STEPS, np.where(STEPS < 990, 1.0, np.nan))}),
        ("diverged", {"skipped": 0.8}),
        ("collapsed", {"alarm": "DINO has collapsed to one prototype."}),
        ("collapsed", {"rankme": (np.array([500.0, 1000.0]), np.array([20.0, 1.1]))}),
        ("collapsed", {"rankme": (np.array([500.0, 1000.0]), np.array([90.0, 3.0]))}),
        ("collapsed", {"prototypes": 1.8}),
    ],
)
def test_the_state_follows_from_the_numbers(state, changes):
    verdict = judge(measured(**changes))
    assert verdict.state == state, verdict
    assert verdict.headline.endswith((".", ":"))
    assert verdict.advice or state in ("no metrics", "learning")


def test_dino_may_rise_again_in_its_first_lines():
    """The recipe on CIFAR-10: its loss rises from 4.3 to 5.3 when the prototypes begin to learn."""
    values = (np.array([50.0, 100, 150, 200, 250, 300]), np.array([6.69, 4.30, 5.29, 4.89, 4.47, 4.65]))
    assert judge(measured(step=300, total=1250, running=True, loss=values)).state == "learning"


def test_a_run_that_ends_in_time_gets_more_minutes():
    advice = " ".join(judge(measured(loss=curve(2.0, 1.8, 1.6, 1.4, 1.2, 1.0), settings={"minutes": 10.0})).advice)
    assert "the same command with minutes=20 goes on" in advice


def test_what_is_not_measured_is_said():
    sentences = " ".join(judge(measured()).evidence)
    assert "k-NN was not measured" in sentences
    assert "is not measured" in judge(measured()).headline
