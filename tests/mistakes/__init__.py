"""Named one-line mistakes in the source, and the ordinary tests that catch each of them.

`python -m pytest -m slow tests/test_mistakes.py` puts each mistake into a copy of the package and shows that its tests
fail. A list of mistakes is a file here: training.py, evaluation.py and safety.py.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One edit of one file. `before` occurs exactly once in the file; `after` takes its place."""

    name: str  # what is wrong, in words: unique
    file: str  # relative to sslvit/
    before: str
    after: str
    tests: str  # of the ordinary suite, as pytest takes them, separated by spaces; the fastest that fail
    issue: bool = False  # one of the fifteen that once passed every test
