"""Fine-tuning equals the published rules, loses nothing when it is stopped, and does not depend on the processes."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from sslvit import stopping
from sslvit.checkpoints import state
from sslvit.errors import UserError
from sslvit.evaluation import finetune
from sslvit.evaluation.finetuning import training
from sslvit.evaluation.finetuning.targets import Targets
from tests import processes
from tests.conftest import TINY_MODEL

TINY = f"model_args={{{', '.join(f'{k}: {v}' for k, v in TINY_MODEL.items())}}}"


def sets(labelled) -> list[str]:
    return [f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"]


def words(run, labelled, *more: str) -> list[str]:
    """The words of a training that takes a second: 36 images in steps of 12."""
    length = [] if any(word.startswith("epochs=") for word in more) else ["epochs=2"]
    return [
        "finetune", f"run={run}", *sets(labelled), "global_batch_size=12", *length, "warmup_epochs=1", "workers=0",
        "precision=float32", *more,
    ]  # fmt: skip


def test_an_image_that_cannot_be_read_is_replaced_with_its_substitutes_own_label(labelled, tmp_path):
    from sslvit.data import Config, open_source
    from sslvit.data.crops import Crop
    from sslvit.data.loader import Cropped

    shutil.copytree(labelled / "train", tmp_path / "train")
    (tmp_path / "train" / "class0" / "0.png").write_bytes(b"no image")
    source = open_source(str(tmp_path / "train"), Config())
    crops = Cropped(source, {"image": [Crop((32, 32), (1.0, 1.0), flip_prob=0)]}, seed=0)
    replaced = 0
    for epoch in range(6):
        batch = crops[epoch, torch.tensor([0, 20])]
        colour = batch["image"][0].float().mean(dim=(2, 3)).argmax(dim=1)  # class i is brightest in channel i
        assert colour.tolist() == source.labels[batch["index"]].tolist()
        replaced += int(colour[0] != 0)
    assert replaced > 0


@pytest.mark.parametrize("recipe", ["mae", "small"])
def test_colours_are_told_apart(cli, labelled, colour_run, tmp_path, recipe):
    out = tmp_path / "result.json"
    more = {"mae": ["base_lr=0.02", "epochs=12", "layer_decay=0.8"], "small": ["epochs=6", "base_lr=0.02"]}[recipe]
    status, printed, _ = cli(
        *words(colour_run, labelled, f"recipe={recipe}", f"out={out}", "image_size=[32,48]", "holdout=0.34", *more)
    )
    assert status == 0
    record = json.loads(out.read_text())
    results = record["results"]
    assert results["top1"] > 90
    assert set(results["per_class"]) == {"class0", "class1", "class2"}
    assert (record["train"]["images"], record["train"]["held_out"]) == (24, 12)
    assert "held-out top1" in printed
    assert results["history"][-1]["held_out_top1"] > 90
    assert len(results["history"]) == len([line for line in printed.splitlines() if line.startswith("epoch ")])


def test_timm_classifies_with_the_model_that_was_written(cli, labelled, colour_run, tmp_path):
    """In bf16: accelerate's autocast around the model must not round what the export is compared with."""
    model = tmp_path / "model"
    length = ["base_lr=0.02", "epochs=12", "layer_decay=0.8", "image_size=[32,48]", "precision=bf16"]
    assert cli(*words(colour_run, labelled, *length, f"out={tmp_path / 'r.json'}", f"out_model={model}"))[0] == 0
    assert json.loads((model / "config.json").read_text())["source"]["step"] == 8
    again = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
    assert again.pretrained_cfg["label_names"] == ["class0", "class1", "class2"]
    mean, std = (torch.tensor(again.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    for c in range(3):
        with Image.open(labelled / "test" / f"class{c}" / "0.png") as image:
            x = torch.from_numpy(np.array(image.resize((48, 32)))).permute(2, 0, 1) / 255
        with torch.inference_mode():
            assert again(((x - mean) / std).unsqueeze(0)).argmax() == c


SWIN = "model_args={embed_dim: 12, depths: [1,1,1,1], num_heads: [1,1,1,1]}"


@pytest.mark.parametrize(
    "more",
    [
        ["run=random:swin_tiny_patch4_window7_224", SWIN],
        ["run=random:mobilevitv2_050"],
        pytest.param(["run=random:swin_tiny_patch4_window7_224", SWIN, "out_model=model"], marks=pytest.mark.slow),
        pytest.param(["run=random:mobilevitv2_050", "out_model=model"], marks=pytest.mark.slow),
    ],
)
def test_models_that_are_no_plain_vit_learn_too(cli, labelled, tmp_path, more, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, error = cli(
        *words("", labelled, "recipe=small", "image_size=64", "epochs=2", "head_epochs=0.5", "drop_path=0.1",
               "labels_share=0.7", "out=result.json", *more)
    )  # fmt: skip
    assert status == 0, error
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["train"]["images"] == 24
    assert record["features"] == "the model's pooled features"


def prepared(labelled, **more) -> tuple[finetune.Config, list]:
    config = finetune.Config(
        run="random:vit_tiny_patch16_224", model_args=TINY_MODEL, image_size=32, workers=0, precision="float32",
        recipe="small", epochs=6, base_lr=0.02, global_batch_size=12, **more,
    )  # fmt: skip
    config.data.train, config.data.test = str(labelled / "train"), str(labelled / "test")
    return config, finetune.prepare(config)


def test_several_labels_of_an_image_are_learned(labelled):
    """Which of red, green and blue an image is not: two labels each."""
    config, (frozen, sources, of_class) = prepared(labelled)
    train, test = (1 - F.one_hot(labels, 3).float() for labels in (of_class.train, of_class.test))
    targets = Targets("multilabel", train, test, ["not red", "not green", "not blue"])
    found, record = finetune.train_and_test(config, finetune.resolve(config), 0, frozen, sources, targets, None)
    assert found["map"] > 95
    assert found["auroc"] > 95
    assert record["task"] == "multilabel"


def test_tables_bring_labels_and_numbers(cli, fails, labelled, colour_run, tmp_path):
    """A row an image: which colours it is not, and how much it weighs."""
    names = {"class0": ("green|blue", 1000), "class1": ("red|blue", 1200), "class2": ("red|green", 1400)}
    for split in ("train", "test"):
        rows = [f"{path},{names[path.parent.name][0]},{names[path.parent.name][1]}"
                for path in sorted((labelled / split).glob("*/*.png"))]  # fmt: skip
        (tmp_path / f"{split}.csv").write_text("\n".join(["path,label,weight", *rows]) + "\n")
    out = tmp_path / "r.json"
    more = ["recipe=small", "epochs=12", "global_batch_size=12", "base_lr=0.02", "warmup_epochs=0", f"out={out}"]

    def train(task: str, column: str) -> dict:
        sets = [f"data.train={tmp_path / 'train.csv'}{column}", f"data.test={tmp_path / 'test.csv'}{column}"]
        assert cli("finetune", f"run={colour_run}", *sets, f"task={task}", *more)[0] == 0
        return json.loads(out.read_text())["results"]

    assert train("multilabel", "")["map"] > 90
    assert train("regression", ":weight")["r2"] > 0.5
    folders = [f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"]
    assert "have no label texts" in fails("finetune", f"run={colour_run}", *folders, "task=multilabel")


def test_numbers_are_learned_in_their_own_units_and_written_so(labelled, tmp_path):
    config, (frozen, sources, of_class) = prepared(labelled, out_model=str(tmp_path / "model"))
    train, test = (1000 + 200 * labels.float().unsqueeze(1) for labels in (of_class.train, of_class.test))
    targets = Targets("regression", train, test, ["weight"])
    found, record = finetune.train_and_test(config, finetune.resolve(config), 0, frozen, sources, targets, None)
    assert found["r2"] > 0.8
    assert found["mae"] < 80
    assert record["task"] == "regression"
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    x = (sources[1].read(0).float() / 255 - 0.45) / 0.225
    with torch.inference_mode():
        assert 800 < model(x.unsqueeze(0)).item() < 1600


def test_what_a_task_cannot_have_is_left_out_of_the_recipe_and_refused_as_a_word():
    recipe = finetune.resolve(finetune.Config(recipe="mae"), "regression")
    assert (recipe.mixup, recipe.cutmix, recipe.smoothing, recipe.erasing) == (0, 0, 0, 0.25)
    assert finetune.resolve(finetune.Config(recipe="mae"), "multilabel").mixup == 0.8
    with pytest.raises(UserError, match=r"mixup=0\.8 has no meaning for task=regression"):
        finetune.resolve(finetune.Config(mixup=0.8), "regression")


def test_one_and_two_processes_and_micro_batches_learn_the_same(labelled, colour_run, tmp_path):
    base = words(colour_run, labelled, "recipe=mae", "base_lr=0.01", "head_epochs=1", "unfreeze_epochs=0.34")
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    processes.finish(processes.start([*base, f"out={alone}"], tmp_path / "log"), tmp_path / "log")
    processes.launch([*base, f"out={together}", "batch_size=2"], tmp_path / "log2", world_size=2)
    one, two = (json.loads(path.read_text())["results"] for path in (alone, together))
    assert len(one["history"]) == 2
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    assert one["per_class"] == two["per_class"]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(state.folder_of(folder, state.steps_saved(folder)[-1]) / state.MODEL)


STOPPED = ["recipe=mae", "epochs=16", "head_epochs=3", "unfreeze_epochs=2", "image_size=48"]


@pytest.fixture(scope="module")
def whole(labelled, colour_run, tmp_path_factory) -> Path:
    """A training that nobody stopped: its checkpoints and whole.json."""
    folder = tmp_path_factory.mktemp("whole")
    asked = words(colour_run, labelled, *STOPPED, f"save={folder / 'save'}", f"out={folder / 'whole.json'}")
    processes.finish(processes.start(asked, folder / "log"), folder / "log")
    return folder


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(labelled, colour_run, whole, tmp_path, sent):
    result = tmp_path / "cut.json"
    cut = words(colour_run, labelled, *STOPPED, f"save={tmp_path / 'cut'}", f"out={result}")
    process, folder = processes.start(cut, tmp_path / "log"), tmp_path / "cut" / "seed_0"
    deadline = time.monotonic() + 60
    while not state.steps_saved(folder) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, sent)
    process.join(60)
    assert process.exitcode == (75 if sent == signal.SIGTERM else -9)
    assert not result.exists()
    printed = processes.finish(processes.start(cut, tmp_path / "log2"), tmp_path / "log2")
    assert re.search(r"Resuming .* at step \d+ of 48", printed)
    ours, theirs = weights(folder), weights(whole / "save" / "seed_0")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    results = [json.loads(path.read_text())["results"] for path in (result, whole / "whole.json")]
    assert {**results[0], "seconds": 0} == {**results[1], "seconds": 0}


@pytest.mark.parametrize("calls", [1, 4, 5, 6])
def test_a_step_is_left_between_any_two_micro_batches(cli, labelled, colour_run, tmp_path, monkeypatch, calls):
    """Two calls a step between its three micro-batches and one after it: the second step is left, or whole."""
    asked = stopping.StopRequest.reason_at

    def reason_at(self, step):
        self.calls = getattr(self, "calls", 0) + 1
        self.reason = "SIGTERM" if self.calls >= calls else None
        return asked(self, step)

    def arguments(name: str) -> list[str]:
        more = [
            "recipe=small",
            "epochs=2",
            "head_epochs=1",
            "batch_size=4",
            f"save={tmp_path / name}",
            f"out={tmp_path / name}.json",
        ]
        return words(colour_run, labelled, *more)

    with monkeypatch.context() as patch:
        patch.setattr(stopping.StopRequest, "reason_at", reason_at)
        status, printed, error = cli(*arguments("cut"))
    assert status == 75, error
    step = {1: 0, 4: 1, 5: 1, 6: 2}[calls]
    assert (f"after step {step} of 6, which is saved" if step else "in the first step: there is nothing") in printed
    assert cli(*arguments("cut"))[0] == 0
    assert cli(*arguments("whole"))[0] == 0
    ours, theirs = weights(tmp_path / "cut" / "seed_0"), weights(tmp_path / "whole" / "seed_0")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_statistics_of_batch_norm_survive_a_stop_of_two_processes_within_an_epoch(labelled, tmp_path):
    """Each process has those of its own images; the checkpoint has the mean."""

    def arguments(name: str) -> list[str]:
        return [
            "finetune", "run=random:test_resnet", *sets(labelled), "recipe=small", "image_size=32", "epochs=2",
            "global_batch_size=6", "head_epochs=0", "unfreeze_epochs=0", "workers=0", "precision=float32",
            "warmup_epochs=0", f"save={tmp_path / name}", f"out={tmp_path / name}.json",
        ]  # fmt: skip

    processes.launch(arguments("whole"), tmp_path / "log", world_size=2)
    log = tmp_path / "log2"
    started = processes.start_several(arguments("cut"), log, world_size=2)
    while not log.exists() or "epochs of" not in log.read_text():
        time.sleep(0.01)
    for process in started:
        os.kill(process.pid, signal.SIGTERM)
    for process in started:
        assert "after step 10 of 12" in processes.finish(process, log, status=75)
    processes.launch(arguments("cut"), tmp_path / "log3", world_size=2)
    ours, theirs = weights(tmp_path / "cut" / "seed_0"), weights(tmp_path / "whole" / "seed_0")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_a_finished_training_is_only_tested_again_and_other_settings_are_refused(
    cli, fails, labelled, colour_run, tmp_path
):
    base = words(colour_run, labelled, "recipe=small", f"save={tmp_path / 'save'}", f"out={tmp_path / 'r.json'}")
    assert cli(*base, "head_epochs=1")[0] == 0
    first = json.loads((tmp_path / "r.json").read_text())
    status, printed, _ = cli(*base, "head_epochs=1")
    assert status == 0
    assert "at step 6 of 6" in printed
    assert json.loads((tmp_path / "r.json").read_text()) == first
    assert "head_epochs was 1.0 and is 1.5" in fails(*base, "head_epochs=1.5")
    (tmp_path / "save" / "seed_1").mkdir()
    (tmp_path / "save" / "seed_1" / "mine.txt").write_text("mine")
    assert "holds other things" in fails(*base, "head_epochs=1", "seed=1")


def test_a_step_that_is_not_finite_is_skipped_and_said(cli, fails, labelled, colour_run, tmp_path, monkeypatch):
    """Of six steps the second; a training whose steps are all such ends with a message."""
    loss_of, calls = training.loss_of, []

    def nan_in_second_step(*arguments):
        calls.append(None)
        return loss_of(*arguments) * (torch.nan if len(calls) == 2 else 1.0)

    monkeypatch.setattr(training, "loss_of", nan_in_second_step)
    base = words(colour_run, labelled, "recipe=small", "head_epochs=1", f"out={tmp_path / 'r.json'}")
    status, printed, _ = cli(*base)
    assert status == 0
    assert "1 of 3 steps skipped in epoch 1" in printed
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [line.get("skipped") for line in results["history"]] == [1, None]
    assert all(np.isfinite([line["loss"] for line in results["history"]]))
    assert np.isfinite(results["loss"])
    monkeypatch.setattr(training, "loss_of", lambda *arguments: loss_of(*arguments) * torch.nan)
    assert "has diverged: no step of epoch 1" in fails(*base)


def test_seeds_are_trainings_of_their_own_with_mean_and_deviation(cli, labelled, colour_run, tmp_path):
    out = tmp_path / "r.json"
    base = words(colour_run, labelled, "recipe=small", "head_epochs=1", "labels_share=0.4", f"out={out}")
    assert cli(*base, "seeds=[3,4]")[0] == 0
    both = json.loads(out.read_text())["results"]
    assert cli(*base, "seed=4")[0] == 0
    alone = json.loads(out.read_text())["results"]
    assert {**both["seeds"][1], "seconds": 0} == {**alone, "seconds": 0}
    top1 = [one["top1"] for one in both["seeds"]]
    assert both["top1"] == pytest.approx(np.mean(top1), abs=1e-3)
    assert both["top1_deviation"] == pytest.approx(np.std(top1, ddof=1), abs=1e-3)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["global_batch_size=64"], "global_batch_size=64 is larger than the 36 images"),
        (["labels_share=0.1"], "global_batch_size=12 is larger than the 3 images"),
        (["image_size=30"], "30x30 is not divisible by the patch size 8"),
        (["labels_share=0"], "labels_share=0 must be above 0"),
        (["warmup_epochs=2"], "warmup_epochs=2 is not shorter than the run"),
        (["image_size=0"], "image_size=0 must be 1 or above"),
        (["batch_size=3"], "batch_size=3 is odd"),
        (["batch_size=5"], "not a multiple of batch_size=5"),
        (["randaugment=strong"], "randaugment=strong is not of timm's form"),
        (["recipe=small", "head_epochs=2"], "leaves none of epochs=2"),
        (["seeds=[1,1]"], "must differ"),
        (["seeds=[0,1]", "out_model=x"], "give one seed"),
        (["pool=cls+mean"], "use cls or mean"),
        (["recipe=small", "head_epochs=1", "pool=last4"], "pool=last4 is no pooling of timm's models"),
        (["holdout=0.99"], "global_batch_size=12 is larger than the 3 images"),
        (["drop_path=1"], "below 1"),
        (["base_lr=0"], "must be above 0"),
        (["out=/dev/null/x/r.json"], "out=/dev/null/x/r.json cannot be written"),
        (["data.test="], "data.test is missing"),
        (["run=pixels"], "run=pixels has nothing to train"),
        (["run=random:mobilevitv2_050", "image_size=64"], "recipe=mae is for plain ViTs"),
        (["run=random:vit_tiny_patch16_224", TINY.replace("}", ", in_chans: 2}"), "image_size=32"], "1 or 3 channels"),
    ],
)
def test_a_mistake_is_one_sentence(fails, labelled, colour_run, tmp_path, more, expected, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in fails(*words(colour_run, labelled, *more))


def test_wrong_labels_get_a_sentence(fails, labelled, images, colour_run, tmp_path):
    run = f"run={colour_run}"
    shutil.copytree(labelled / "test", tmp_path / "other")
    (tmp_path / "other" / "class2").rename(tmp_path / "other" / "unheard_of")
    (tmp_path / "one").mkdir()
    shutil.copytree(labelled / "train" / "class0", tmp_path / "one" / "class0")
    train = f"data.train={labelled / 'train'}"
    assert "classes that" in fails("finetune", run, train, f"data.test={tmp_path / 'other'}")
    assert "has no labels" in fails("finetune", run, train, f"data.test={images}")
    assert "are the training images" in fails("finetune", run, train, train.replace("train=", "test=", 1))
    one = f"{tmp_path / 'one'}"
    assert "one class only" in fails("finetune", run, f"data.train={one}", f"data.test={one}")


def test_other_channels_are_refused(labelled):
    """A source that gives gray images to an encoder of colour."""

    class Gray:
        labels, classes = np.array([0, 1]), ["a", "b"]

        def __len__(self):
            return 2

        def read(self, index):
            return torch.zeros(1, 32, 32, dtype=torch.uint8)

    config, (frozen, *_) = prepared(labelled)
    with pytest.raises(UserError, match="images of 1 channels"):
        finetune._check_first_image(config, frozen, Gray(), "gray")
