"""What a command shows while it works: a live line on a terminal, plain lines elsewhere, in time and not in steps."""

import itertools
import os
import pty
import re
import select
import sys
import termios
from contextlib import redirect_stderr, redirect_stdout

import pytest

from sslvit import progress
from sslvit.distributed import say


@pytest.fixture
def terminal(monkeypatch):
    """Standard output is a terminal of 120 columns. Gives a function that returns what was shown."""
    main, other = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    termios.tcsetwinsize(main, (24, 120))
    with os.fdopen(other, "w") as output:

        def shown(work):
            with redirect_stdout(output), redirect_stderr(output):
                work()
                output.flush()
            shown = b""
            while select.select([main], [], [], 0.1)[0]:
                shown += os.read(main, 4096)
            return shown.decode()

        yield shown
    os.close(main)


RECORD = {"step": 5, "epoch": 1.25, "loss": 0.5, "images_per_second": 123.4, "data_wait": 0.02, "seconds_left": 391.0}


def test_a_terminal_has_one_live_line_below_what_is_said(terminal):
    def work():
        run = progress.RunProgress(0, 10)
        run.show(RECORD, 10, 2.5, ["1.2 GiB", "k-NN 41.0%"])
        say("a sentence")
        print("a warning", file=sys.stderr)
        run.show(RECORD | {"step": 6, "loss": 0.3}, 10, 2.5, ["1.2 GiB", "k-NN 41.0%"])
        progress.close_bars()
        assert not isinstance(sys.stderr, progress.Above)

    text = terminal(work)
    lines = [part.strip() for part in re.split(r"[\r\n]|\x1b\[A", text) if part.strip()]
    assert "a sentence" in lines  # a line of its own
    assert "a warning" in lines
    last = lines[-1]
    assert last.startswith("6/10  60%")
    assert "6m31s left  epoch 1.25/2.5  loss 0.3000 falls  123 images/s  wait 2%  1.2 GiB" in last


def test_elsewhere_lines_are_plain(capsys):
    run = progress.RunProgress(0, 10)
    run.show(RECORD, 10, 2.5, ["1.2 GiB"])
    with progress.counting("features", 10) as show:
        show(5)
    assert capsys.readouterr().out == "step 5/10  epoch 1.25/2.5  loss 0.5000  123 images/s  wait 2%  6m31s left\n"


def test_lines_come_by_time_and_more_and_more_seldom(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    run, shown = progress.RunProgress(7, 10**9), []
    for step in range(8, 40_000):  # a second each
        now += 1
        if run.due(step):
            shown.append(int(now))
            run.shown = now
    assert shown[0] == 1  # after the first step
    pauses = [b - a for a, b in itertools.pairwise(shown)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (1, 300)
    assert 30 in pauses
    assert len(shown) < 200


def test_long_work_counts_on_a_terminal_and_leaves_nothing(terminal, monkeypatch):
    monkeypatch.setattr(progress, "REDRAW", 0.0)

    def work():
        with progress.counting("features", 40) as show:
            show(10)

    text = terminal(work)
    assert "features  25%" in text
    assert "10 of 40 images" in text
    assert text.endswith(" \r")  # the line is empty again


def test_long_work_elsewhere_says_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SAY_EVERY", 0.0)
    with progress.counting("features", 40) as show:
        show(10)
    assert re.fullmatch(r"features: 10 of 40 images, [\d,]+ a second, 0m00s left\n", capsys.readouterr().out)


@pytest.mark.parametrize(("seconds", "days"), [(3.0, "3.5 days"), (0.01, None), (60.0, "69.4 days")])
def test_a_run_of_days_says_so_after_some_seconds_and_not_by_its_first_micro_batch(monkeypatch, seconds, days):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    run, said = progress.LongRun(100_000), []
    for number in range(3000):
        said += [(now, sentence) for sentence in run.note()]
        now += 50.0 if number == 0 else seconds
    assert len(said) == (1 if days else 0)
    if days:
        assert said[0][1].endswith(f"this run will take {days} from here.")
        assert said[0][0] < 50 + 10 + 2 * seconds
