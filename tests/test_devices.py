"""What can be known of a run on a GPU without one, by the pretend one of pretend_gpu.py."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils import backend_registration

from sslvit.__main__ import main
from sslvit.checkpoints import state

from .conftest import words

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch registers no devices that are written in Python",
)
STEPS = 5
PRETEND = "import runpy; runpy.run_module('tests.pretend_gpu', run_name='__main__', alter_sys=True)"
RUNS = {
    "mae": ["mae", "koleo_weight=0.05"],
    "dino": ["dino", "koleo_weight=0.1", "student_keep=0.5", "drop_path=0.1"],
    "cached": ["dino", "batch_size=4", "cache=device"],
}
EVALUATIONS = {
    "knn": ["cache=false", "k=[3]", "shots=[2]"],
    "linear": ["cache=false", "epochs=2"],
    "logistic": ["cache=false", "l2=[0.01]", "pools=[mean]"],  # of equally good ways rounding would choose
    "attentive": ["cache=false", "epochs=1"],
    "robustness": ["cache=false", "epochs=1", "images=6", "corruptions=[contrast]", "eps=[4.0]", "steps=2"],
    "finetune": ["epochs=1", "warmup_epochs=0", "global_batch_size=8"],
    "retrieval": ["cache=false"],
}


def pretraining(name: str, images: Path, labelled: Path, out: Path) -> list[str]:
    method, *more = RUNS[name]
    fixed = ["precision=float32", "workers=0", "log.every_steps=2", "log.rank_every_steps=3", f"steps={STEPS}"]
    sets = [f"eval.train={labelled / 'train'}", f"eval.test={labelled / 'test'}", "eval.k=3", "save.every_steps=4"]
    if not any(word.startswith("cache=") for word in more):
        more = [*more, "cache=ram"]
    return ["pretrain", str(images), *words(method, *fixed, *sets, *more, f"out={out}")]


def evaluation(name: str, run: Path, labelled: Path, out: Path) -> list[str]:
    sets = [f"train={labelled / 'train'}", f"test={labelled / 'test'}", "precision=float32", "workers=0"]
    return [name, f"run={run}", *sets, *EVALUATIONS[name], f"out={out}"]


def without_times(record: Any) -> Any:
    if isinstance(record, list):
        return [without_times(value) for value in record]
    if not isinstance(record, dict):
        return record
    return {name: without_times(value) for name, value in record.items() if "second" not in name}


@pytest.fixture(scope="module")
def there(images, labelled, colour_run, quick_python, tmp_path_factory):
    """{name: (status, waits, where its output lies)} of all commands on the pretend device, in one process: forked from
    one that has imported torch and not sslvit."""
    folder = tmp_path_factory.mktemp("device")
    commands = {name: pretraining(name, images, labelled, folder / name) for name in RUNS}
    commands |= {name: evaluation(name, colour_run, labelled, folder / f"{name}.json") for name in EVALUATIONS}
    (folder / "commands.json").write_text(json.dumps(list(commands.values())))
    done = subprocess.run(
        [quick_python.executable, "-c", PRETEND, str(folder / "commands.json")],
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"status"')]
    assert len(results) == len(commands), done.stdout[-2000:] + done.stderr[-4000:]
    return {name: (r["status"], r["waits"], folder) for name, r in zip(commands, results, strict=True)}


@pytest.mark.parametrize("name", RUNS)
def test_no_step_waits_for_the_device_but_the_first_and_those_of_a_line(name, there):
    status, waits, _ = there[name]
    assert status == 0
    assert [wait for wait in waits if wait["step"]] == []
    first = {wait["place"].split(" <- ")[0].split(" ")[0].split(":")[0] for wait in waits if wait["step"] == 0}
    assert first <= {"augment.py", "resample.py"}, "constants are brought there once"
    assert any(wait["step"] is None for wait in waits)  # of lines, checkpoints and evaluations: it does look


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_the_device_is_the_run_on_the_cpu(name, there, images, labelled, tmp_path):
    folder = there[name][2]
    assert main(pretraining(name, images, labelled, tmp_path / "run")) == 0
    mine, theirs = (state.folder_of(run, STEPS) for run in (tmp_path / "run", folder / name))
    expected, found = (load_file(path / "model.safetensors") for path in (mine, theirs))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_on_the_device_finds_what_it_finds_on_the_cpu(name, there, colour_run, labelled, tmp_path):
    status, _, folder = there[name]
    assert status == 0
    out = tmp_path / "result.json"
    assert main(evaluation(name, colour_run, labelled, out)) == 0
    expected, found = (json.loads(path.read_text()) for path in (out, folder / f"{name}.json"))
    assert without_times(found) == without_times(expected)
