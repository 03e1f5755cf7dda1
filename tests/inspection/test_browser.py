"""The page in Chromium: python -m pytest -n0 -m browser tests/inspection/test_browser.py"""

import pytest

from tests.report.test_browser import SIZES, browser, look, wait  # noqa: F401

from .test_inspect import RANDOM

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("size", SIZES)
def test_it_opens_without_complaint_and_fits(browser, cli, colour_run, labelled, tmp_path, size):  # noqa: F811
    out = tmp_path / "inspect.html"
    words = [f"other={colour_run}", f"data=[{labelled / 'train'},{labelled / 'test'}]", f"out={out}"]
    assert cli("inspect", *RANDOM, *words)[0] == 0
    assert look(browser, out, size) == ([], [])
    wait(browser, "[...document.images].every((one) => one.complete)")
    assert browser.execute_script("return [...document.images].filter((one) => !one.naturalWidth).length") == 0
    heights = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map((one) => one.getBoundingClientRect().height)"
    )
    assert len(heights) == 11
    assert min(heights) > 60
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    values = "return [...document.querySelectorAll('tbody tr')].map((row) => row.cells[0].textContent).slice(-2)"
    before = browser.execute_script(values)
    browser.execute_script("for (let n = 0; n < 2; n++) [...document.querySelectorAll('th button')].at(-7).click()")
    assert browser.execute_script(values) in (before, before[::-1])
