"""The page in Chromium, as a person uses it: python -m pytest -n0 -m browser tests/report/test_browser.py

Needs chromium and chromium-driver (Debian's names) and `pip install selenium`.
"""

import json
import shutil
import threading

import pytest

from sslvit import report
from sslvit.__main__ import main
from sslvit.report import watch
from sslvit.report.verdict import ALARMS

from ..conftest import words
from .test_report import lines, write_run

pytestmark = pytest.mark.browser
SIZES = ((390, 844), (1440, 900))


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("there is no chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--force-prefers-reduced-motion"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(colour_run, tmp_path_factory):
    """Of a real run with pictures, and three that were written by hand."""
    folder = tmp_path_factory.mktemp("browser")
    others = [write_run(folder / f"run{n}", lines(200, grad_norm=1.0), optim={"base_lr": n}) for n in (2, 10, 1)]
    out = folder / "report.html"
    report.report([str(colour_run), *map(str, others)], report.Config(out=str(out)))
    return out


def look(browser, page, size=SIZES[1]):
    """Open the page; returns what the browser complains of, and the requests that left the file."""
    browser.set_window_size(*size)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page.as_uri() if hasattr(page, "as_uri") else page)
    wait(browser, "'ready' in document.documentElement.dataset")
    complaints = [entry["message"] for entry in browser.get_log("browser")]
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return complaints, [url for url in sent if not url.startswith(("data:", "file:"))]


def wait(browser, condition):
    script = f"const done = arguments[0], look = () => ({condition}) ? done(true) : setTimeout(look, 50); look();"
    assert browser.execute_async_script(script)


@pytest.mark.parametrize("size", SIZES)
def test_it_opens_without_complaint_and_without_a_request(browser, page, size):
    assert look(browser, page, size) == ([], [])
    browser.execute_script("document.querySelectorAll('details').forEach((one) => one.open = true)")
    wait(browser, "[...document.images].every((one) => one.complete)")
    assert browser.execute_script("return [...document.images].filter((one) => !one.naturalWidth).length") == 0
    assert browser.execute_script("return document.images.length") > 100
    assert browser.execute_script("return document.documentElement.scrollWidth") <= browser.execute_script(
        "return innerWidth"
    )


def test_curves_answer_to_the_mouse(browser, page):
    from selenium.webdriver import ActionChains

    look(browser, page)
    over = browser.find_element("css selector", ".chart[data-name=loss] .u-over")
    shown = "return document.querySelector('.chart[data-name=loss] .u-legend').textContent"
    before = browser.execute_script(shown)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", over)
    ActionChains(browser).move_to_element(over).perform()
    assert browser.execute_script(shown) != before
    ticks = (
        "return [...document.querySelectorAll('.chart')].map((one) => one.querySelector('canvas').toDataURL().length)"
    )
    before = browser.execute_script(ticks)
    ActionChains(browser).move_to_element_with_offset(over, -60, 0).click_and_hold().move_by_offset(
        90, 0
    ).release().perform()
    after = browser.execute_script(ticks)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == len(before), "all curves are enlarged together"
    browser.find_element("id", "whole").click()


def test_curves_are_drawn_along_images_and_hours(browser, page):
    look(browser, page)
    for value in ("images", "hours"):
        browser.execute_script(
            "const one = document.getElementById('axis'); one.value = arguments[0];"
            "one.dispatchEvent(new Event('change'))",
            value,
        )
        assert value in browser.find_element("css selector", ".chart .u-legend").get_attribute("textContent")
    assert browser.get_log("browser") == []


def test_the_table_sorts_by_number(browser, tmp_path):
    for n in (2, 10, 1):
        write_run(tmp_path / "runs" / f"run{n}", lines(20), optim={"base_lr": n})
    out = tmp_path / "report.html"
    report.report([str(tmp_path / "runs")], report.Config(out=str(out), pictures=False))
    assert look(browser, out) == ([], [])
    values = "return [...document.querySelectorAll('#runs tbody tr')].map((row) => row.lastElementChild.textContent)"
    press = "[...document.querySelectorAll('#runs th button')].at(-1).click()"
    for wanted in (["1", "2", "10"], ["10", "2", "1"]):
        browser.execute_script(press)
        assert browser.execute_script(values) == wanted


def test_the_map_finds_a_file(browser, page):
    look(browser, page)
    browser.execute_script("document.querySelectorAll('details').forEach((one) => one.open = true)")
    name = browser.execute_script("return JSON.parse(document.getElementById('data').textContent).maps['0'].names[3]")
    find = browser.find_element("css selector", ".find")
    find.send_keys(name.upper())
    hits = browser.find_element("css selector", ".hits")
    assert hits.text.startswith("1 of ")
    find.clear()
    find.send_keys("there is no such file")
    assert hits.text.startswith("0 of ")


def test_the_verdict_is_the_first_thing_to_read(browser, colour_run, tmp_path):
    out = tmp_path / "one.html"
    report.report([str(colour_run)], report.Config(out=str(out), pictures=False))
    assert look(browser, out, SIZES[0]) == ([], [])
    box = browser.find_element("css selector", ".verdict")
    assert box.location["y"] < 200
    assert box.get_attribute("data-state") in box.text


FRACTALS = ("data.train=fractals:train,classes=4,count=128", "epochs=12", "base_lr=3e-3", "log.every_steps=2")


@pytest.mark.parametrize(
    ("arguments", "states"),
    [
        (words("mae", *FRACTALS, "koleo_weight=0.05"), ("learned", "undertrained")),
        (["quickstart", "images=3200", "log.every_steps=2"], ("learned", "undertrained")),  # DINO
        (words("dino", *FRACTALS, "center_momentum=1"), ALARMS),
    ],
)
def test_a_run_of_each_method_and_one_that_collapses_open_with_their_verdicts(browser, tmp_path, arguments, states):
    assert main(["pretrain", *arguments, "log.report=true", f"out={tmp_path / 'run'}"]) == 0
    out = tmp_path / "report.html"
    report.report([str(tmp_path / "run")], report.Config(out=str(out)))
    for size in SIZES:
        assert look(browser, out, size) == ([], [])
        assert browser.find_element("css selector", ".verdict").get_attribute("data-state") in states
    browser.execute_script("document.querySelectorAll('details').forEach((one) => one.open = true)")
    wait(browser, "[...document.images].every((one) => one.complete && one.naturalWidth)")


def test_watch_loads_itself_again(browser, tmp_path):
    run = write_run(tmp_path / "run", lines(5))
    with watch.serve([str(run)], 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        complaints, sent = look(browser, f"http://127.0.0.1:{server.server_port}/")
        assert [one for one in complaints if "favicon" not in one] == []
        assert all(url.startswith(f"http://127.0.0.1:{server.server_port}/") for url in sent)
        browser.execute_script("window.before = true")
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 77, "epoch": 7.7, "loss": 0.5}\n')
        wait(browser, "!window.before && document.body.textContent.includes('step 77')")
        server.shutdown()
