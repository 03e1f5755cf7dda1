"""The numbers that evaluations report, on labelled images on which a mistake moves them.

The classes overlap, so that about 70 % are right. They are unequal in size, one is missing in the test set (so its
classes have other numbers there), its images lie in no order, and some images have no label. What is expected is
computed here, from the images and timm's own model, by NumPy and scikit-learn.
"""

import contextlib
import io
import json
import re
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from sslvit import pretrained, rng
from sslvit.__main__ import main
from tests import processes
from tests.conftest import words as training_words

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = 0.5, 0.5  # mean and deviation that timm has for this model
CLASSES = ("ant", "bee", "cat", "dog", "eel")
TRAIN = {"ant": 50, "bee": 18, "cat": 36, "dog": 24, "eel": 30, "": 4}
TEST = {"ant": 15, "cat": 40, "dog": 22, "eel": 33, "": 3}
MODEL = {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 2}
VIT = "random:vit_tiny_patch16_224"
SMALL = [f"run={VIT}", "image_size=8", f"model_args={{{', '.join(f'{k}: {v}' for k, v in MODEL.items())}}}"]
FIXED = ["workers=0", "precision=float32", "cache=false"]


class Images:
    """8 x 8 pixels in four patches of one colour each, as the classes have them but for noise."""

    def __init__(self, path, counts, seed):
        generator = np.random.default_rng(seed)
        centres = np.random.default_rng(7).uniform(60, 196, (len(CLASSES), 1, 1, 3))
        names = np.repeat(list(counts), list(counts.values()))[generator.permutation(sum(counts.values()))]
        self.labels = np.array([CLASSES.index(name) if name else -1 for name in names])
        shared = centres[self.labels] + generator.normal(0, 22, (len(names), 1, 1, 3))
        colours = shared + generator.normal(0, 25, (len(names), 2, 2, 3))
        grain = generator.normal(0, 6, (len(names), 8, 8, 3))
        self.pixels = (colours.repeat(4, 1).repeat(4, 2) + grain).clip(0, 255).round().astype(np.uint8)
        self.path, self.known = path, self.labels >= 0
        self.targets = self.labels[self.known]
        np.save(path, self.pixels)
        np.save(path.with_suffix(".labels.npy"), names)

    def normalised(self, mean, std) -> np.ndarray:
        """[N, 3, 8, 8] float64."""
        return ((self.pixels / 255 - mean) / std).transpose(0, 3, 1, 2)

    def features(self, model, pool, normalise=IMAGENET) -> np.ndarray:
        """[labelled images, 48] by timm."""
        with torch.no_grad():
            tokens = model.eval().forward_features(torch.from_numpy(self.normalised(*normalise)).float())
        return (tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)).double().numpy()[self.known]


def both_sets(folder: Path) -> tuple[Images, Images]:
    return Images(folder / "train.npy", TRAIN, seed=1), Images(folder / "test.npy", TEST, seed=2)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Images, Images]:
    return both_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def evaluate(cli, sets, tmp_path):
    """Results of a command on both sets."""

    def run(command, *more, test=True) -> dict:
        data = [f"data.train={sets[0].path}", *[f"data.test={sets[1].path}"] * test]
        status, _, error = cli(command, *data, *FIXED, *more, f"out={tmp_path / 'result.json'}")
        assert status == 0, error
        return json.loads((tmp_path / "result.json").read_text())["results"]

    return run


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def ranks(bank, labels, queries, query_labels, k, temperature, own=False) -> np.ndarray:
    """For each query, how many classes have more votes than its own: k neighbours by cosine, exp(cosine / T) each."""
    similarity = unit(queries) @ unit(bank).T
    if own:
        np.fill_diagonal(similarity, -np.inf)
    found = []
    for row, label in zip(similarity, query_labels, strict=True):
        votes = np.zeros(len(CLASSES))
        for i in sorted(range(len(row)), key=lambda i: -row[i])[:k]:
            votes[labels[i]] += np.exp(row[i] / temperature)
        found.append((votes > votes[label]).sum() + (votes[:label] == votes[label]).sum())
    return np.array(found)


def centred(train, test) -> list[np.ndarray]:
    """Features of run=pixels of labelled images: minus the mean of all training images."""
    flat = [images.normalised(*IMAGENET).reshape(len(images.pixels), -1) for images in (train, test)]
    return [(x - flat[0].mean(axis=0))[images.known] for x, images in zip(flat, (train, test), strict=True)]


def test_knn_votes_of_pixels(evaluate, sets):
    (bank, queries), (labels, query_labels) = centred(*sets), (images.targets for images in sets)
    wanted = ["run=pixels", "image_size=8", "k=[1,7,30]", "temperature=[0.07,0.5]"]
    for both in (True, False):
        results = evaluate("knn", *wanted, test=both)
        assert len(results["neighbours"]) == 6
        for row in results["neighbours"]:
            k, temperature = row["k"], row["temperature"]
            if both:
                found = ranks(bank, labels, queries, query_labels, k, temperature)
            else:
                found = ranks(bank, labels, bank, labels, k, temperature, own=True)
            assert row["top1"] == pytest.approx(100 * (found < 1).mean(), abs=1e-4)
            assert row["top5"] == pytest.approx(100 * (found < min(5, k)).mean(), abs=1e-4)
            assert 55 < row["top1"] < 85


def random_vit():
    return pretrained.load(VIT, 8, MODEL).encoder.model


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_knn_reads_the_tokens_that_pool_names(evaluate, sets, pool):
    train, test = sets
    bank, queries = (images.features(random_vit(), pool, HALF) for images in sets)
    found = ranks(bank, train.targets, queries, test.targets, 9, 0.07)
    (row,) = evaluate("knn", *SMALL, f"pool={pool}", "k=[9]")["neighbours"]
    assert row["top1"] == pytest.approx(100 * (found == 0).mean(), abs=1e-4)


def test_knn_during_a_run_is_that_of_the_encoder_of_the_moment(cli, sets, tmp_path):
    train, test = sets
    run = tmp_path / "run"
    shape = [f"model.args={{{', '.join(f'{k}: {v}' for k, v in MODEL.items())}}}", "image_size=8", "precision=float32"]
    watch = [f"eval.train={train.path}", f"eval.test={test.path}", "eval.k=9", "data.workers=0"]
    words = training_words("mae", *shape, *watch, "steps=3", "warmup_epochs=0", "base_lr=0.1", f"out={run}")
    assert cli("pretrain", train.path, *words)[0] == 0
    lines = [line for line in processes.lines(run) if "knn/top1" in line]
    assert [line["step"] for line in lines] == [0, 3]
    for line, name in zip(lines, (f"untrained:{run}", str(run)), strict=True):
        model = pretrained.load(name).encoder.model
        bank, queries = (images.features(model, "mean") for images in sets)
        found = ranks(bank, train.targets, queries, test.targets, 9, 0.07)
        assert line["knn/top1"] == pytest.approx(100 * (found == 0).mean(), abs=1e-3)


def held_out(labels: np.ndarray, share: float) -> np.ndarray:
    """[N] bool: of each class the first of a random order, a share of them."""
    order, chosen = rng.permutation(rng.fold_in(0, "holdout"), len(labels)).numpy(), np.zeros(len(labels), bool)
    for c in range(len(CLASSES)):
        of_class = order[labels[order] == c]
        chosen[of_class[: round(share * len(of_class))]] = True
    return chosen


class Probe:
    """A linear classifier of standardised features at the minimum of its penalised loss."""

    def __init__(self, x, labels, penalty, bias_too):
        """penalty / 2 times the sum of squared weights, of the bias too or not, is added to the mean cross-entropy."""
        self.mean, self.std, self.bias_too = x.mean(axis=0), np.sqrt(x.var(axis=0) + 1e-6), bias_too
        made = LogisticRegression(C=1 / (penalty * len(x)), fit_intercept=not bias_too, tol=1e-9, max_iter=10_000)
        self.model = made.fit(self.seen(x), labels)

    def seen(self, x):
        x = (x - self.mean) / self.std
        return np.c_[x, np.ones(len(x))] if self.bias_too else x

    def judge(self, x, labels) -> tuple[float, float, np.ndarray]:
        """Accuracy in percent, cross-entropy, and which are right."""
        log = self.model.predict_log_proba(self.seen(x))
        right = log.argmax(axis=1) == labels
        return 100 * right.mean(), -log[np.arange(len(x)), labels].mean(), right


@pytest.mark.parametrize("command", ["linear", "logistic"])
def test_a_probe_is_chosen_on_held_out_images_and_trained_on_all(evaluate, sets, command):
    """Full gradients and many steps bring the linear probe to the minimum that scikit-learn finds."""
    train, test = sets
    if command == "linear":
        name, penalties, bias_too = "weight_decay", (0.05, 0.5), True
        more = ["lr=[1.5]", "weight_decay=[0.05,0.5]", "probe_batch_size=1000", "epochs=300"]
    else:
        name, penalties, bias_too = "l2", (0.01, 0.3), False
        more = ["l2=[0.01,0.3]", "iterations=300"]
    results = evaluate(command, *SMALL, "pools=[cls,mean]", "holdout=0.25", *more)
    model, labels = random_vit(), train.targets
    out = held_out(labels, 0.25)
    assert results["holdout_images"] == out.sum()
    expected, x = [], {}
    for pool in ("cls", "mean"):
        x[pool] = [images.features(model, pool, HALF) for images in sets]
        for penalty in penalties:
            bank = x[pool][0]
            top1, loss, _ = Probe(bank[~out], labels[~out], penalty, bias_too).judge(bank[out], labels[out])
            expected.append((top1, -loss, pool, penalty))
    for row, (top1, loss, pool, penalty) in zip(results["sweep"], expected, strict=True):
        assert (row["pool"], row[name]) == (pool, penalty)
        assert row["holdout_top1"] == pytest.approx(top1, abs=1e-3)
        assert row["holdout_loss"] == pytest.approx(-loss, abs=2e-4)
    *_, pool, penalty = max(expected)
    assert (results["pool"], results["setting"][name]) == (pool, penalty)
    bank, queries = x[pool]
    top1, loss, right = Probe(bank, labels, penalty, bias_too).judge(queries, test.targets)
    assert results["top1"] == pytest.approx(top1, abs=1e-3)
    assert results["test_loss"] == pytest.approx(loss, abs=2e-4)
    assert 55 < top1 < 85
    by_class = {c: 100 * right[test.targets == i].mean() for i, c in enumerate(CLASSES) if c in TEST}
    assert results["by_class"] == pytest.approx(by_class, abs=0.01)
    assert results["mean_by_class"] == pytest.approx(np.mean(list(by_class.values())), abs=0.01)


@pytest.mark.parametrize("both", [True, False])
def test_retrieval_ranks_by_cosine(evaluate, sets, both):
    train, test = sets
    bank, labels = unit(centred(train, train)[0]), train.targets
    queries, query_labels = (unit(centred(test, test)[0]), test.targets) if both else (bank, labels)
    precision, hits = [], []
    for q, (query, label) in enumerate(zip(queries, query_labels, strict=True)):
        others = np.arange(len(bank)) != q if not both else np.ones(len(bank), bool)
        score, right = bank[others] @ query, labels[others] == label
        precision.append(average_precision_score(right, score))
        hits.append([right[(-score).argsort()[:k]].sum() for k in (1, 5)])
    results = evaluate("retrieval", "run=pixels", "image_size=8", "k=[1,5]", test=both)
    assert results["map"] == pytest.approx(100 * np.mean(precision), abs=1e-3)
    for i, row in enumerate(results["at"]):
        assert row["recall"] == pytest.approx(100 * np.mean(np.array(hits)[:, i] > 0), abs=1e-3)
        assert row["precision"] == pytest.approx(100 * np.mean(np.array(hits)[:, i]) / row["k"], abs=1e-3)


def test_robustness_begins_with_the_linear_probe(evaluate, sets):
    train, test = sets
    more = ["lr=[1.5]", "weight_decay=[0.05]", "probe_batch_size=1000", "epochs=300", "holdout=0.25", "pool=mean"]
    results = evaluate("robustness", *SMALL, *more, "corruptions=[]", "attacks=[]", "images=null")
    bank, queries = (images.features(random_vit(), "mean", HALF) for images in sets)
    top1, _, _ = Probe(bank, train.targets, 0.05, bias_too=True).judge(queries, test.targets)
    assert results["clean"] == pytest.approx(top1, abs=1e-3)


FINETUNE = [*SMALL, "base_lr=0.005", "global_batch_size=32", "batch_size=16", "holdout=0.2", "warmup_epochs=0.7"]
PUBLISHED = [*SMALL, "epochs=3", "global_batch_size=64", "batch_size=32", "cache=false"]
# Protocols for which nobody else has a number: theirs are in golden/evaluations.json, which
# `python -m tests.evaluation.test_protocols` writes anew.
STORED = {
    "attentive": [*SMALL, "lr=[1e-3,3e-2]", "weight_decay=[1e-4,1]", "epochs=5", "probe_batch_size=32", "holdout=0.25"],
    "finetune-mae": [*FINETUNE, "recipe=mae", "epochs=2", "layer_decay=0.8", "drop_path=0.3", "clip=1"],
    "finetune-small": [
        *FINETUNE, "recipe=small", "epochs=3", "drop_path=0.3", "head_epochs=2", "unfreeze_epochs=0.5",
        "labels_share=0.6",
    ],
    "linear-mae": [*PUBLISHED, "protocol=mae", "lr=[50]"],
    "linear-dino": [*PUBLISHED, "protocol=dino", "lr=[1]"],
}  # fmt: skip
GOLDEN = Path(__file__).parents[1] / "golden" / "evaluations.json"


def losses(found, name="") -> dict[str, float]:
    """{where: value} of all losses and gradient norms in a result."""
    if isinstance(found, dict):
        parts = [losses(value, f"{name} {key}".strip()) for key, value in found.items()]
    elif isinstance(found, list):
        parts = [losses(value, f"{name} {i}") for i, value in enumerate(found)]
    else:
        parts = [{name: found}] if name.endswith(("loss", "grad_norm")) else []
    return {key: value for part in parts for key, value in part.items()}


def waves(tensor, std) -> torch.Tensor:
    """Takes the place of `nn.init.trunc_normal_`, which draws other numbers in torch 2.11 than in 2.15."""
    return tensor.data.copy_(std * torch.arange(tensor.numel()).cos().view_as(tensor))


def run_stored(name, sets, out) -> dict[str, float]:
    """Losses and accuracy of a protocol."""
    data = [f"data.train={sets[0].path}", f"data.test={sets[1].path}", *FIXED[:2]]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), mock.patch("torch.nn.init.trunc_normal_", waves):
        assert main([name.split("-")[0], *data, *STORED[name], f"out={out}"]) == 0
    results = json.loads(out.read_text())["results"]
    shown = re.findall(r"loss (\S+) in the last step", printed.getvalue())  # of the published probes
    return losses(results) | {f"step {i} loss": float(loss) for i, loss in enumerate(shown)} | {"top1": results["top1"]}


@pytest.mark.parametrize("name", STORED)
def test_losses_are_the_stored_ones(name, sets, tmp_path):
    expected, found = json.loads(GOLDEN.read_text())[name], run_stored(name, sets, tmp_path / "result.json")
    one_image = 100 / len(sets[1].targets)
    assert found.pop("top1") == pytest.approx(expected.pop("top1"), abs=0.5 * one_image)
    assert found == pytest.approx(expected, rel=2e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sets = both_sets(Path(folder))
        found = {name: run_stored(name, sets, Path(folder) / "result.json") for name in STORED}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
