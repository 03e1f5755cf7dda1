"""What a user sees: help, and one sentence for each mistake, before anything is trained or lost."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from sslvit import evaluation
from sslvit.checkpoints import state
from sslvit.tools import bench

from . import processes
from .conftest import words


def test_help_is_printed_for_every_command(cli):
    status, usage, _ = cli()
    assert status == 0
    others = ("compare", "data", "bench", "export", "embed", "search")
    for command in ("pretrain", "submit", *evaluation.commands(), *others):
        assert command in usage
        status, text, _ = cli(command, "--help")
        assert status == 0
        assert "type: ignore" not in text
        assert "run=" in text or command in ("pretrain", "submit", "compare", "data", "bench")
    assert "objective.prototypes=65536" in cli("pretrain", "method=dino", "--help")[1]


def test_help_of_a_recipe_is_that_of_its_method(cli, tmp_path):
    (tmp_path / "mine.yaml").write_text("method: dino\nobjective: {preset: xray}\n")
    text = cli("pretrain", tmp_path / "mine.yaml", "--help")[1]
    assert "method=dino preset=xray" in text
    assert "objective.prototypes=65536" in text
    assert "objective.gray_prob=0.0" in text


@pytest.mark.parametrize("arguments", [["data", "--sample=5"], ["bench", "--seconds=0.05", "--seed=1"]])
def test_tools_take_their_keys_with_dashes_as_pretrain_does(cli, images, tmp_path, arguments, monkeypatch):
    monkeypatch.setattr(bench, "matmul_rate", lambda *device: 1e9)  # it takes two seconds
    command, *more = arguments
    status, printed, error = cli(command, images, *words("mae", f"out={tmp_path / 'run'}"), *more)
    assert status == 0, error
    assert "examined 5 of them" in printed or "images/s" in printed


@pytest.mark.parametrize(("command", "key"), [("bench", "seconds"), ("data", "sample"), ("submit", "hours")])
def test_a_misspelt_key_of_a_tool_is_recognised(fails, images, command, key):
    hint = f"There is no key {key[:-1]}. Did you mean {key}? `sslvit {command} --help` lists them all."
    assert hint in fails(command, images, f"--{key[:-1]}=3")
    assert "Did you mean objective.mask_ratio?" in fails(command, images, "mask_rato=0.5")


def test_a_misspelt_command_is_recognised(fails):
    assert "Did you mean pretrain?" in fails("pretrian")


MISTAKES = [
    (["mask_rato=0.7"], "There is no key mask_rato. Did you mean objective.mask_ratio?"),
    (["mask_ratio=1.5"], "objective.mask_ratio=1.5 must lie between 0 and 1"),
    (["image_size=30"], "30x30 is not divisible by the patch size 8: use 24 or 32"),
    (["warmup_epochs=2"], "optim.warmup_epochs=2 is not shorter than the run of 2 epochs"),
    (["global_batch_size=38"], "global_batch_size=38 is larger than the 37 images"),
    (["data.train=/no/such/folder"], "/no/such/folder does not exist"),
    (["model.name=vit_tiny_patch16_244"], "Did you mean vit_tiny_patch16_224"),
    (["model.args.patchsize=4"], "patchsize"),
    (["in_chans=5"], "data.in_chans=5, but the images of a folder"),
    (["mean=[0.5]"], "data.mean has 1 numbers for data.in_chans=3"),
    (["precision=fp16"], "precision=fp16 needs a CUDA GPU"),
    (["base_lr=0"], "optim.base_lr=0.0 must be above 0"),
    (["eval.train=fractals"], "eval.test is empty"),
    (["epochs=0.01"], "less than one step"),
    (["workers=-1"], "data.workers=-1"),
    (["decoder_heads=0"], "decoder_heads=0 must be 1 or above"),
    (["crop_scale=[2,3]"], "two shares of the area"),
    (["model.args.drop_path_rate=0.1"], "set objective.drop_path"),
    (["epochs=5", "steps=9"], "not epochs=5 and steps=9 at once"),
    (["method=.x"], "cannot be imported"),
    (["log.every_steps=0"], "log.every_steps=0"),
    (["data.train="], "data.train is missing: name the images"),
    (["warmup_epochs=.inf"], "optim.warmup_epochs=inf must be finite and below 9.2e+18"),
    (["image_size=10000000000000000000"], "data.image_size=10000000000000000000 must be finite and below 9.2e+18"),
    (["pack=true"], "objective.pack=True is no longer supported: leave it out"),
    (["eval.every_epochs=0.1"], "eval.every_epochs=0.1 is less than one step: give at least 0.25."),
]


@pytest.mark.parametrize(("more", "expected"), MISTAKES)
def test_a_mistake_is_one_sentence_before_the_first_step(fails, images, tmp_path, more, expected):
    out = tmp_path / "run"
    assert expected in fails("pretrain", images, *words("mae", f"out={out}", *more))
    assert not (out / "checkpoints").exists()


def test_a_recipe_without_images_is_refused_and_nothing_is_written(fails, tmp_path):
    (tmp_path / "mine.yaml").write_text("method: dino\n")
    message = fails("pretrain", tmp_path / "mine.yaml", f"out={tmp_path / 'run'}")
    assert "data.train is missing: name the images to train on" in message
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_says_what_it_found(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "the folder is empty" in fails("pretrain", tmp_path / "empty", *words("mae", f"out={tmp_path / 'run'}"))
    (tmp_path / "empty" / "scan.nii.gz").write_bytes(b"")
    assert "1 .gz" in fails("pretrain", tmp_path / "empty", *words("mae", f"out={tmp_path / 'run'}"))


def test_a_k_larger_than_the_training_set_is_refused_before_the_run(fails, labelled, tmp_path):
    sets = [f"eval.train={labelled / 'train'}", f"eval.test={labelled / 'test'}"]
    message = fails("pretrain", labelled / "train", *words("mae", f"out={tmp_path / 'run'}", "eval.k=40", *sets))
    assert "eval.k=40 is larger than the 36 images" in message


def test_a_checkpoint_with_no_matching_key_is_refused(fails, colour_run, labelled, tmp_path):
    """A run whose stored weights belong to another encoder."""
    other = tmp_path / "run"
    shutil.copytree(colour_run, other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("embed_dim: 48", "embed_dim: 64"))
    sets = [f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"]
    message = fails("knn", f"run={other}", *sets, "k=[3]")
    assert "has 0 of the" in message or "weights that this encoder needs" in message
    assert "It belongs to another model" in message


@pytest.fixture
def open_folder():
    """A folder that every user of the machine may read and write. pytest's own are for one."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def test_a_directory_that_this_user_may_not_use_is_one_sentence(colour_run, labelled, open_folder):
    run, images = (Path(shutil.copytree(old, open_folder / old.name)) for old in (colour_run, labelled))
    (run / "tensorboard").mkdir()
    for path in (open_folder, *open_folder.rglob("*")):
        path.chmod(path.stat().st_mode | 0o666)
        if os.geteuid() == 0:
            os.chown(path, 65534, 65534)
    more = [*words("mae", f"out={run}", "epochs=3", "workers=0"), "log.tensorboard=true"]
    sets = [f"data.train={images / 'train'}", f"data.test={images / 'test'}", "k=[3]", "workers=0"]
    commands = [
        *[(run, 0, argv) for argv in (["pretrain", images / "train", *more], ["compare", run, run])],
        *[(run, 0, ["knn", f"run={name}", *sets]) for name in (run, f"untrained:{run}", run / "checkpoints" / "x")],
        (run / "metrics.jsonl", 0o444, ["pretrain", images / "train", *more]),
        (run / "tensorboard", 0o555, ["pretrain", images / "train", *more]),
    ]
    log = open_folder / "log"
    printed = processes.finish(processes.begin(processes.as_nobody, commands, output=log), log)
    assert printed.count(": status 2\n") == len(commands), printed
    assert printed.count(": Permission denied.\n") == len(commands), printed
    assert f"sslvit pretrain: {run / 'metrics.jsonl'} cannot be read or written: Permission denied.\n" in printed


class Trap:
    """What unpickling would run."""

    def __reduce__(self):
        return (Path.touch, (Path(TRAP),))


TRAP = "sprung"


def test_a_pickle_never_runs(fails, colour_run, labelled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "run"
    shutil.copytree(colour_run, other)
    torch.save({"model": Trap()}, state.folder_of(other, 8) / state.MODEL)
    sets = [f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"]
    assert "can be read" in fails("knn", f"run={other}", *sets, "k=[3]")
    torch.save({"model": Trap()}, tmp_path / "foreign.pth")
    assert "neither a run" in fails("knn", f"run={tmp_path / 'foreign.pth'}", *sets)
    assert not (tmp_path / TRAP).exists()


def test_a_real_process_prints_the_sentence_and_nothing_else(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sslvit", "pretrain", "mask_rato=0.7"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("sslvit pretrain: There is no key mask_rato.")
    assert done.stderr.count("\n") == 1


def test_the_list_of_commands_is_printed_without_waiting_for_torch():
    code = "import sys; from sslvit.__main__ import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    for word in ("--help", "pretrian"):
        subprocess.run([sys.executable, "-c", code, word], check=True, capture_output=True)


def test_help_and_a_misspelt_key_need_no_torch():
    """Importing torch takes seconds, and nobody waits so long to read a sentence."""
    code = """
import contextlib, io, sys
from sslvit.__main__ import COMMANDS, main
from sslvit.evaluation import commands
names = [*COMMANDS, *commands()]
asked = [[], ["--help"], ["--version"], ["pretrian"], ["completion", "bash"], ["pretrain", "quickstart", "epohcs=3"]]
asked += [[name, "--help"] for name in names] + [[name, "epohcs=3"] for name in names]
for words in asked:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        main(words)
    heavy = {"torch", "timm", "torchvision", "faiss", "sklearn", "scipy", "PIL", "accelerate"} & set(sys.modules)
    assert not heavy, (words, heavy)
    assert "epohcs=3" not in words or "There is no key epohcs" in output.getvalue() or words[0] in COMMANDS, words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_of_pretrain_begins_with_what_is_changed_first(cli):
    first, _, rest = cli("pretrain", "--help")[1].partition("All keys with their defaults for method=mae:")
    assert "  minutes=30 " in first
    assert len(first.splitlines()) < 16
    for title in ("The run", "The encoder", "The images", "The method", "The optimizer", "Checkpoints"):
        assert f"\n{title}:\n  " in rest
    assert "objective.mask_ratio=0.75" in rest


def test_a_reader_that_has_read_enough_is_no_error():
    code = f"{sys.executable} -m sslvit pretrain --help | true"
    assert subprocess.run(["bash", "-c", code], capture_output=True, text=True).stderr == ""
