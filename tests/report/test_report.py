"""The report of runs: real ones, broken ones, and those of somebody who means harm."""

import base64
import hashlib
import importlib.util
import io
import json
import math
import re
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

from sslvit import report
from sslvit import run as run_module
from sslvit.report import curves, live
from sslvit.report.facts import gather, measured_of

from ..conftest import words

HOSTILE = "</script><script>alert(1)</script>'\"<img src=x onerror=alert(2)>.png"


def write_run(folder, lines=(), **settings):
    folder.mkdir(parents=True)
    values = {"method": "mae", "global_batch_size": 8, "steps": 100, "seed": 0, **settings}
    (folder / "config.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def lines(count: int, **more):
    for n in range(1, count + 1):
        record = {
            "step": n,
            "epoch": n / 10,
            "images": 8 * n,
            "seconds": 0.5 * n,
            "loss": 1 + 1 / n,
            "lr": 0.001,
            **more,
        }
        yield json.dumps(record) + "\n"


def text_of(*paths, **settings) -> str:
    out = paths[0].parent / "report.html"
    report.report([str(path) for path in paths], report.Config(out=str(out), pictures=False, **settings))
    return out.read_text()


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def whole(colour_run, tmp_path_factory):
    """The report with pictures of a finished run, measured by k-NN."""
    out = tmp_path_factory.mktemp("report") / "whole.html"
    report.report([str(colour_run)], report.Config(out=str(out)))
    assert out.stat().st_size < 5_000_000
    return out.read_text()


def test_every_picture_is_in_the_file_and_can_be_read(whole):
    addresses = re.findall(r'src="([^"]*)"', whole) + [data_of(whole)["maps"]["0"]["sheet"]]
    assert len(addresses) > 100
    for address in addresses:
        head, _, content = address.partition(",")
        assert head == "data:image/webp;base64"
        Image.open(io.BytesIO(base64.b64decode(content))).load()
    for title in ("What it predicts", "What it attends to", "Nearest neighbours", "Map of the images", "Clusters"):
        assert f"<h2>{title}</h2>" in whole
    assert "There is no picture" not in whole
    if importlib.util.find_spec("umap") is None:
        assert "(PCA)" in whole
        assert "After <code>pip install &#x27;sslvit[umap]&#x27;</code>, <code>sslvit report</code> draws it" in whole


def test_labels_are_said_in_words(whole):
    assert "✓ same" in whole
    assert data_of(whole)["maps"]["0"]["classes"] == ["class0", "class1", "class2"]


def test_the_page_allows_its_script_and_no_connection(whole):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', whole)[1].replace("&#x27;", "'")
    script = re.findall(r"<script>(.*?)</script>", whole, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert not re.search(r'(src|href)="(?!data:|#)', whole)


def test_a_run_writes_its_report_at_its_end(colour_run, cli, images, tmp_path):
    text = (colour_run / "report.html").read_text()
    assert report.MARK in text
    assert 'data-state="' in text
    assert len(text) < 300_000
    assert (
        cli(
            "pretrain",
            images,
            *words("mae", "steps=1", "warmup_epochs=0", "log.report=false", f"out={tmp_path / 'run'}"),
        )[0]
        == 0
    )
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_report_that_fails_does_not_fail_its_run(tmp_path, capsys):
    assert report.of_run(tmp_path / "missing", False, None) < 5
    assert "No report" in capsys.readouterr().out


def test_names_and_settings_are_escaped(tmp_path):
    run = write_run(tmp_path / HOSTILE.replace("/", "_"), lines(5, **{HOSTILE: 1}), **{"data": {"train": HOSTILE}})
    (run / "bad_images.txt").write_text(f"{HOSTILE}\t{HOSTILE}\n")
    (run / "starts.jsonl").write_text(json.dumps({"command": HOSTILE, "device": HOSTILE}) + "\n")
    (run / "eval").mkdir()
    result = {"results": {"top1": 50, "by_class": {HOSTILE: 1.0}}, "test": {"data": HOSTILE, "images": 3}}
    (run / "eval" / "linear.json").write_text(json.dumps(result))
    text = text_of(run)
    assert text.count("<script") == 2
    assert "<img" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5
    data_of(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "There are no curves"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "has not written a line"),
        (
            lambda run: (run / "metrics.jsonl").open("a").write('{"step": 6, "lo'),
            "One line of metrics.jsonl cannot be read",
        ),
        (lambda run: (run / "config.yaml").write_text("[1"), "The settings are not known"),
        (lambda run: None, "There is no checkpoint"),
        (
            lambda run: (run / "eval").mkdir() or (run / "eval" / "knn.json").write_text("[]"),
            "eval/knn.json is no result",
        ),
        (
            lambda run: (
                (run / "eval").mkdir() or (run / "eval" / "knn.json").write_text('{"results": {"neighbours": 7}}')
            ),
            "no result",
        ),
    ],
)
def test_what_is_missing_or_broken_is_said(change, said, tmp_path):
    run = write_run(tmp_path / "run", lines(5))
    change(run)
    assert said in text_of(run)


def test_values_that_are_no_numbers_become_gaps(tmp_path):
    odd = [
        '{"step": 6, "loss": NaN, "lr": Infinity}\n',
        '{"step": 7, "loss": "x"}\n',
        '{"step": true}\n',
        '{"step": -1}\n',
        "[]\n",
        "7\n",
        f'{{"step": 8, "loss": {10**400}}}\n',
        '{"step": 9, "loss": 1.0}\n',
        '{"step": 3, "loss": 5.0}\n',
        "[" * 100_000 + "\n",
    ]
    text = text_of(write_run(tmp_path / "run", [*lines(5), *odd]))
    steps, values = data_of(text)["curves"]["runs"][0]["columns"]["loss"]
    assert steps == sorted(steps)
    assert None in values
    assert "4 lines of metrics.jsonl cannot be read" in text


def test_a_link_is_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    write_run(secret / "run", lines(5), note="xyzzy")
    (secret / "bad").write_text("xyzzy\txyzzy\n")
    run = write_run(tmp_path / "runs" / "run", lines(5))
    for name, target in (
        ("metrics.jsonl", "run/metrics.jsonl"),
        ("config.yaml", "run/config.yaml"),
        ("bad_images.txt", "bad"),
    ):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(secret / target)
    (run / "starts.jsonl").write_text("")
    assert "xyzzy" not in text_of(run)
    out = tmp_path / "runs" / "link.html"
    out.symlink_to(secret / "bad")
    with pytest.raises(report.UserError, match="is no report of sslvit"):
        report.report([str(run)], report.Config(out=str(out), pictures=False))


def test_only_images_of_this_machine_are_opened(tmp_path):
    run = write_run(tmp_path / "run", lines(5), data={"train": "https://example.com/images.tar"})
    out = tmp_path / "report.html"
    report.report([str(run)], report.Config(out=str(out)))
    assert "is no file or folder here: give data=" in out.read_text() or "has no section" in out.read_text()


def test_twenty_runs_take_seconds_and_little_room(tmp_path):
    for n in range(20):
        write_run(tmp_path / "runs" / f"run{n}", lines(300, grad_norm=1.0, koleo=0.1 * n), optim={"base_lr": n})
    began = time.perf_counter()
    text = text_of(tmp_path / "runs")
    assert time.perf_counter() - began < 10
    assert len(text) < 300_000
    assert '<button type="button">optim.base_lr</button>' in text
    assert len(data_of(text)["curves"]["runs"]) == 20


def test_mistakes_are_one_sentence(fails, tmp_path):
    assert "report needs runs" in fails("report")
    assert "is no folder" in fails("report", tmp_path / "none")
    assert "is no run, and holds none" in fails("report", tmp_path)
    (tmp_path / "mine.html").write_text("<p>mine")
    run = write_run(tmp_path / "run", lines(3))
    assert "is no report of sslvit" in fails("report", run, f"out={tmp_path / 'mine.html'}")
    assert "must be a file in a folder that exists" in fails("report", run, f"out={tmp_path / 'none' / 'r.html'}")


def test_the_energy_is_said_as_far_as_it_was_counted(tmp_path):
    run = write_run(tmp_path / "run", lines(4, cpu_kwh=0.0125, gpu_kwh=3.5))
    text = text_of(run)
    assert "12.50 Wh (whole CPU packages, without memory and fans), 3.50 kWh (GPUs)" in text
    assert "cpu_kwh" not in data_of(text)["curves"]["runs"][0]["columns"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "seconds": 9.0, "gpu_kwh": 4.0}) + "\n")
    assert "12.50 Wh (whole CPU packages, without memory and fans, until step 4), 4.00 kWh (GPUs)" in text_of(run)
    other = write_run(tmp_path / "other", lines(4, cpu_kwh=0.0, gpu_kwh=math.nan))  # a counter that stands still
    assert "CPU packages" not in text_of(other)


def test_peaks_survive_thinning():
    values = np.ones(100_000)
    values[51_234], values[70_000] = 9.0, np.nan
    steps, kept = curves.thin(np.arange(100_000.0), values, 200)
    assert len(steps) < 410
    assert (steps[0], steps[-1]) == (0, 99_999)
    assert max(value for value in kept if value is not None) == 9
    assert None in kept


@pytest.mark.slow
def test_half_a_million_lines_take_less_than_ten_seconds(tmp_path):
    more = dict.fromkeys(
        ("grad_norm", "koleo", "reconstruction", "weight_decay", "images_per_second", "data_wait"), 0.1234567
    )
    run = write_run(tmp_path / "run", lines(500_000, **more))
    began = time.process_time()
    text = text_of(run)
    assert time.process_time() - began < 10
    assert len(text) < 300_000


def test_a_lock_that_is_held_is_a_run_that_goes_on(tmp_path):
    run = write_run(tmp_path / "run", lines(5))
    assert gather(run).verdict.state == "stopped"
    assert gather(run, running=True).verdict.state == "learning"


def test_settings_of_somebody_else_cannot_take_all_memory(colour_run, images, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(colour_run, run)
    text = (run / "config.yaml").read_text()
    for change in (("image_size: 32", "image_size: 1000000"), ("decoder_depth: 1", "decoder_depth: 1000000000")):
        assert change[0] in text
        (run / "config.yaml").write_text(text.replace(*change))
        out = tmp_path / "report.html"
        report.report([str(run)], report.Config(out=str(out), data=str(images)))
        assert "too many for a picture" in out.read_text() or "too large" in out.read_text()


def test_the_alarm_of_a_method_makes_the_verdict(tmp_path):
    objective = {"prototypes": 512, "center_momentum": 0.9}
    run = write_run(tmp_path / "run", lines(30, teacher_entropy=6.2383), method="dino", objective=objective)
    verdict = gather(run).verdict
    assert verdict.state == "collapsed"
    assert "DINO has collapsed to one even answer" in verdict.evidence[0]
    assert "The first line that shows it is of step 1." in verdict.evidence[0]
    assert verdict.advice[0].startswith("Spread the features: objective.koleo_weight=0.3")
    assert "Lower objective.teacher_temp" in verdict.advice[2]
    odd = write_run(tmp_path / "odd", lines(30, teacher_entropy=6.2), method="dino", objective={"prototypes": "many"})
    assert gather(odd).verdict.state == "stopped"


def test_baselines_stand_beside_the_result(tmp_path):
    first, *rest = lines(10)
    knn = [json.dumps({"step": step, "knn/top1": value}) + "\n" for step, value in ((0, 31.25), (10, 44.5))]
    for init, said in (("", "untrained"), ("timm:vit_tiny", "frozen start (model.init)")):
        run = write_run(
            tmp_path / f"run{len(init)}", [knn[0], first, *rest, knn[1]], model={"init": init}, eval={"test": "x"}
        )
        text = text_of(run)
        assert f"<td>{said}</td><td>31.25 %</td>" in text
        assert "<td>this run, step 10</td><td>44.50 %</td>" in text
        assert "run=untrained:" not in text


def test_pixels_stand_beside_the_result_and_a_page_without_them_says_how(cli, labelled, tmp_path):
    knn = (json.dumps({"step": step, "knn/top1": 30.0}) + "\n" for step in (0, 5))
    run, sets = write_run(tmp_path / "run", knn, data={"image_size": 32}), f"data.train={labelled / 'train'}"
    words = re.search("<code>sslvit (knn run=pixels:[^ <]*) [^<]*</code>", text_of(run))[1].split()
    assert cli(*words, sets, "k=[3,20]")[0] == 0
    text = text_of(run)
    assert "k-NN k=20 T=0.07</td><td>pixels</td>" in text
    assert "run=pixels" not in text
    assert "k-NN k=20 T=0.07, pixels: by class" in text
    assert text.count("which class is taken for which") == 1
    shutil.copy(run / "eval" / "pixels" / "knn.json", run / "eval" / "knn.json")
    assert "; raw pixels have" in text_of(run)
    found = measured_of(gather(run)).pixels
    assert found is not None, "they are of the same test images"
    assert found[0] == found[1]
    for part in ("train", "test"):
        other = json.loads((run / "eval" / "pixels" / "knn.json").read_text()) | {part: {"data": "others", "images": 7}}
        (run / "eval" / "knn.json").write_text(json.dumps(other))
        assert measured_of(gather(run)).pixels is None
    (run / "eval" / "pixels" / "knn.json").write_text("{}")
    assert "eval/pixels/knn.json is no result that can be read" in text_of(run)


@pytest.mark.parametrize("odd", [[[1]], [[1, 2], [3]], [[1, 2], "ab"], [[1, "x"], [2, 3]], "matrix", [[[], 2], [3, 4]]])
def test_a_confusion_is_a_table_and_a_damaged_one_is_none(odd, tmp_path):
    run = write_run(tmp_path / "run", lines(5))
    (run / "eval").mkdir()
    result = {"top1": 80.0, "by_class": {"cat": 90.0, HOSTILE: 70.0}, "confusion": [[9, 1], [3, 7]]}
    (run / "eval" / "linear.json").write_text(json.dumps({"results": result, "test": {"data": "x", "images": 20}}))
    text = text_of(run)
    assert '<td>cat</td><td style="--share:90%">9</td><td style="--share:10%">1</td>' in text
    assert text.count("<script") == 2
    result["confusion"] = odd
    (run / "eval" / "linear.json").write_text(json.dumps({"results": result, "test": {"data": "x", "images": 20}}))
    assert '<table class="matrix">' not in text_of(run) or odd == [[1]]


def test_a_model_is_as_before_when_it_has_been_drawn():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    before, modes = torch.get_rng_state(), [one.training for one in model.modules()]
    with live._as_in_evaluation(model):
        assert not any(one.training for one in model.modules())
        torch.rand(3)
    assert [one.training for one in model.modules()] == modes == [True, True, False]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_pictures_while_training_go_to_tensorboard_and_change_nothing(method, cli, images, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = []
    for name, every in (("with", 0.0), ("without", 1e9)):
        monkeypatch.setattr(run_module, "REPORT_EVERY", every)
        out = tmp_path / name
        more = words(
            method,
            "steps=4",
            "warmup_epochs=0",
            "log.every_steps=1",
            "log.tensorboard=true",
            "log.report=true",
            f"out={out}",
        )
        status, said, error = cli("pretrain", images, *more)
        assert (status, error) == (0, "")
        assert "No pictures" not in said
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").open() if '"loss"' in line])
        board = EventAccumulator(str(out / "tensorboard"))
        board.Reload()
        wanted = {"mae": "reconstructions", "dino": "attention"}[method]
        assert board.Tags()["images"] == ([wanted] if name == "with" else [])
        for event in board.Images(wanted) if name == "with" else ():
            assert Image.open(io.BytesIO(event.encoded_image_string)).height > 8 * 100
    assert losses[0] == losses[1]
