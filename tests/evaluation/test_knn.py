import json
import math
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from sslvit.__main__ import main
from sslvit.evaluation import knn
from sslvit.evaluation.classes import align_classes
from tests import processes
from tests.conftest import words as training_words


def brute_force(bank, labels, queries, num_classes, k, temperature):
    """The votes by the definition, one query and one neighbour at a time, in Python floats."""
    votes = []
    for q in queries.double():
        similarity = sorted(((float(q @ b), -i) for i, b in enumerate(bank.double())), reverse=True)[:k]
        total = [0.0] * num_classes
        for s, i in similarity:
            total[int(labels[-i])] += math.exp(s / temperature)
        votes.append(total)
    return torch.tensor(votes, dtype=torch.float64)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.2), (60, 1.0)])
def test_votes_equal_a_brute_force_loop(k, temperature):
    torch.manual_seed(0)
    bank, queries = F.normalize(torch.randn(60, 8), dim=1), F.normalize(torch.randn(15, 8), dim=1)
    labels = torch.randint(0, 4, (60,))
    similarity, rows = knn.neighbours(bank, queries, k)
    ours = knn.vote(similarity, labels[rows], 4, k, temperature)
    theirs = brute_force(bank, labels, queries, 4, k, temperature)
    assert torch.allclose(ours / ours.sum(1, keepdim=True), theirs / theirs.sum(1, keepdim=True), atol=1e-5)


def images_of(values, labels) -> knn.Labelled:
    return knn.Labelled(values, torch.as_tensor(labels), torch.arange(len(values)))


def accuracies(*arguments, **more) -> dict:
    found = knn.classify(*arguments, **more)
    assert all(((p == 0) == (label == arguments[1].labels)).all() for p, label in found.values())
    return {key: (knn.top_accuracy(p, 1), knn.top_accuracy(p, min(5, key[0]))) for key, (p, _) in found.items()}


@pytest.fixture
def labelled_sets(tmp_path, monkeypatch, colour_run, request) -> list[str]:
    """run=, data.train= and data.test= of the three colours, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    sets = request.getfixturevalue("labelled")
    return [f"run={colour_run}", f"data.train={sets / 'train'}", f"data.test={sets / 'test'}", "cache=false"]


def test_equal_similarities_and_equal_votes():
    """Copies of one image in two classes: the votes tie, and the smaller class number wins."""
    bank = images_of(F.normalize(torch.ones(4, 3), dim=1), [1, 0, 1, 0])
    assert accuracies(bank, images_of(bank.values[:2], [0, 1]), 2, (4,))[4, 0.07] == (50.0, 100.0)


def test_of_equal_neighbours_the_smaller_rows_are_found():
    """300 images of which each has 6 copies: any number of neighbours cuts through one of these ties."""
    torch.manual_seed(0)
    bank = F.normalize(torch.randint(-3, 4, (50, 8)).float(), dim=1).repeat(6, 1)
    similarity = bank[:20] @ bank.t()
    for k in (1, 4, 17):
        values, rows = knn.neighbours(bank, bank[:20], k)
        for q in range(20):
            # Copies have the same similarity to the last bit; others are further apart than rounding.
            expected = sorted(range(300), key=lambda i, q=q: (-round(similarity[q, i].item(), 5), i))[:k]
            assert rows[q].tolist() == expected
        assert (values[:, :-1] >= values[:, 1:]).all()


def test_a_collapsed_encoder_does_not_search_for_ever():
    bank = F.normalize(torch.ones(9000, 4), dim=1)
    values, rows = knn.neighbours(bank, bank[:3], 5)
    assert torch.allclose(values, torch.ones(3, 5))
    assert rows.shape == (3, 5)


def test_a_temperature_so_small_that_exp_overflows_still_votes():
    bank = images_of(F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=1), [1, 0, 0])
    assert accuracies(bank, images_of(bank.values[:1], [1]), 2, (3,), (1e-4,))[3, 1e-4][0] == 100.0


def test_one_search_serves_all_k_and_temperatures(monkeypatch):
    calls = []
    search = knn.neighbours
    monkeypatch.setattr(knn, "neighbours", lambda *a: calls.append(a[2]) or search(*a))
    torch.manual_seed(0)
    bank = images_of(F.normalize(torch.randn(50, 4), dim=1), torch.randint(0, 3, (50,)))
    together = accuracies(bank, bank[:9], 3, (1, 5, 20), (0.05, 0.5))
    assert calls == [20]
    for (k, t), value in together.items():
        assert accuracies(bank, bank[:9], 3, (k,), (t,))[k, t] == value


@pytest.mark.parametrize(("k", "top5"), [(3, 30), (5, 50), (20, 50)])
def test_top_5_is_of_five_classes_and_of_fewer_for_fewer_neighbours(k, top5):
    assert knn._row((k, 0.07), torch.arange(10))["top5"] == top5


def test_places_are_those_of_a_stable_sort():
    torch.manual_seed(0)
    votes, labels = torch.randint(0, 4, (200, 6)).double(), torch.randint(0, 6, (200,))
    ranked = votes.argsort(dim=1, descending=True, stable=True)
    assert torch.equal(knn.rank_of_label(votes, labels), (ranked == labels.unsqueeze(1)).int().argmax(dim=1))


@pytest.mark.parametrize("k", [1, 7, 39])
def test_leave_one_out_equals_classifying_each_image_by_the_others(k):
    """With copies, so that an image's nearest neighbour may be its copy but never itself."""
    torch.manual_seed(0)
    values = F.normalize(torch.randn(20, 4), dim=1).repeat(2, 1)
    bank = images_of(values, torch.randint(0, 3, (40,)))
    ours = knn.classify(bank, bank, 3, (k,), (0.2,), leave_one_out=True)[k, 0.2].rank
    for i in range(40):
        others = torch.arange(40) != i
        assert knn.classify(bank[others], bank[~others], 3, (k,), (0.2,))[k, 0.2].rank.item() == ours[i]


def test_few_shots_use_so_many_images_of_each_class_and_say_how_much_the_draw_matters(cli, fails, labelled_sets):
    status, printed, _ = cli("knn", *labelled_sets, "k=[1,3]", "shots=[1,4]", "repeats=3", "out=few.json")
    assert status == 0
    few = json.loads(Path("few.json").read_text())["results"]["few_shot"]
    assert [(r["shots"], r["k"]) for r in few] == [(1, 1), (1, 3), (4, 1), (4, 3)]
    assert all(r["top1"] > 80 for r in few)
    assert "images a class" in printed
    assert "the smallest class has 12 labelled" in fails("knn", *labelled_sets, "shots=[13]")


def test_few_shots_use_only_the_drawn_images(monkeypatch):
    torch.manual_seed(0)
    bank = images_of(F.normalize(torch.randn(60, 4), dim=1), torch.arange(60) % 3)
    banks = []
    classify = knn.classify
    monkeypatch.setattr(knn, "classify", lambda few, *a: banks.append(few) or classify(few, *a))
    knn._few_shot(knn.Config(k=(1,), shots=(2, 5), repeats=4), 3, bank, bank[:7], False)
    assert [torch.bincount(few.labels).tolist() for few in banks] == [[2, 2, 2]] * 4 + [[5, 5, 5]] * 4
    assert len({tuple(few.indices.tolist()) for few in banks}) == 8


def test_without_test_images_each_training_image_is_left_out_once(cli, fails, labelled_sets):
    status, _, _ = cli("knn", *labelled_sets[:2], "k=[5]", "out=single.json")
    assert status == 0
    record = json.loads(Path("single.json").read_text())
    assert record["results"]["protocol"] == "leave-one-out"
    assert record["results"]["neighbours"][0]["top1"] > 90
    assert "are the training images" in fails("knn", *labelled_sets[:2], labelled_sets[1].replace("train", "test", 1))


@pytest.mark.parametrize("kind", ["ivf", pytest.param("ivfpq", marks=pytest.mark.slow)])
def test_an_approximate_search_says_what_it_misses(kind):
    """With all cells searched an inverted file is exact, and with few it finds most of clustered features."""
    torch.manual_seed(0)
    centres = torch.randn(40, 8)
    values = F.normalize(centres[torch.arange(26_000) % 40] + 0.3 * torch.randn(26_000, 8), dim=1)
    bank = images_of(values, torch.arange(26_000) % 40)
    queries = bank[:500]
    few = knn._approximate(knn.Config(index=kind, probes=8), bank.values)
    everywhere = knn._approximate(knn.Config(index=kind, probes=10_000), bank.values)
    recall = [knn._recall(bank, queries, 10, index) for index in (few, everywhere)]
    if kind == "ivf":
        assert recall[1] > 99.9
        exact, approximate = (
            knn.classify(bank, queries, 40, (10,), index=i)[10, 0.07].label for i in (None, everywhere)
        )
        assert torch.equal(exact, approximate)
        assert 20 < recall[0] <= recall[1]
    assert recall[0] > 20  # of codes of a quarter of a byte a number, on features that are noise within a cluster


def test_an_approximate_search_of_few_images_is_refused(fails, labelled_sets):
    assert "use index=exact" in fails("knn", *labelled_sets, "index=ivf")


def source(labels, classes):
    of_images = {"read": lambda i: 10 * i, "value_range": None, "fingerprint": lambda: "same"}
    return SimpleNamespace(labels=np.array(labels), classes=classes, **of_images)


def test_labels_are_matched_by_the_names_of_the_classes():
    train, test = source([0, 1, 2], ["ant", "bee", "cat"]), source([0, 1, -1], ["bee", "cat"])
    aligned = align_classes(train, test, ("a", "b"))
    assert aligned.labels.tolist() == [1, 2, -1]
    assert aligned.classes == ["ant", "bee", "cat"]
    assert (aligned.fingerprint(), aligned.read(1)) == ("same", 10)  # the images of the test set, as they are cached
    assert align_classes(train, train, ("a", "a")) is train


@pytest.mark.parametrize("command", ["knn", "linear"])
@pytest.mark.parametrize("pool", ["auto", "cls", "cls+mean"])
def test_colours_are_told_apart(cli, labelled, colour_run, tmp_path, command, pool):
    """Three colours are easy for any encoder: the commands find them, print a table and write JSON."""
    sets = [f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"]
    extra = ["k=[1,5]"] if command == "knn" else ["epochs=50", "probe_batch_size=16", "lr=[0.1,1,10]", "holdout=0.3"]
    picture = tmp_path / "confusion.png"
    out = tmp_path / "result.json"
    status, printed, _ = cli(
        command, f"run={colour_run}", *sets, f"pool={pool}", f"out={out}", f"picture={picture}", *extra
    )
    assert status == 0
    assert Image.open(picture).size[0] > 200
    assert {"auto": "mean of patches", "cls": "class token", "cls+mean": "class token and mean"}[pool] in printed
    record = json.loads(out.read_text())
    results = record["results"]
    assert (results["neighbours"][0] if command == "knn" else results)["top1"] > 90
    assert record["train"]["images"] == 36
    assert record["test"]["images"] == 18
    assert record["step"] == 8
    assert record["versions"]["faiss-cpu"]


def test_one_and_two_processes_give_the_same(labelled, colour_run, tmp_path):
    arguments = [
        "knn",
        f"run={colour_run}",
        f"data.train={labelled / 'train'}",
        f"data.test={labelled / 'test'}",
        "k=[3]",
        "cache=false",
    ]
    single, together = tmp_path / "single.json", tmp_path / "together.json"
    processes.finish(processes.start([*arguments, f"out={single}"], tmp_path / "log"), tmp_path / "log")
    processes.launch([*arguments, f"out={together}"], tmp_path / "log2", world_size=2)
    assert json.loads(single.read_text())["results"] == json.loads(together.read_text())["results"]


def test_features_are_kept_for_the_next_evaluation_of_the_same_weights_and_images(cli, labelled, colour_run, tmp_path):
    run, sets = tmp_path / "run", tmp_path / "sets"
    shutil.copytree(colour_run, run, ignore=shutil.ignore_patterns("eval"))
    shutil.copytree(labelled, sets)
    arguments = [f"run={run}", f"data.train={sets / 'train'}", f"data.test={sets / 'test'}"]

    def evaluate(command: str, *more: str) -> tuple[int, dict]:
        """How many of the two sets came from a file, and the results."""
        status, printed, _ = cli(command, *arguments, *more)
        assert status == 0
        record = json.loads((run / "eval" / f"{command}.json").read_text())
        return printed.count("as computed before"), record["results"]

    fresh, first = evaluate("knn", "k=[3]")
    again, second = evaluate("knn", "k=[3]")
    assert (fresh, again) == (0, 2)
    assert first == second
    assert evaluate("linear", "epochs=2", "probe_batch_size=16", "pool=mean")[0] == 2
    assert evaluate("knn", "k=[3]", "cache=false") == (0, first)
    assert evaluate("knn", "k=[3]", "pool=cls")[0] == 0
    files = sorted((run / "eval" / "features").iterdir())
    assert len(files) == 4
    for file in files:
        file.write_bytes(file.read_bytes()[:100])  # damaged: made again
    assert evaluate("knn", "k=[3]") == (0, first)
    (sets / "test" / "class1" / "0.png").write_bytes(b"no image")
    assert evaluate("knn", "k=[3]")[0] == 1  # that of the training set, which has not changed
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    assert cli("pretrain", labelled / "train", *training_words("mae", f"out={run}", "seed=1"))[0] == 0
    assert evaluate("knn", "k=[3]")[0] == 0
    assert len(list((run / "eval" / "features").iterdir())) == 5  # replaced, but for the set that is no more


def test_unreadable_images_are_left_out_and_counted(cli, labelled, colour_run, tmp_path):
    root = tmp_path / "sets"
    shutil.copytree(labelled, root)
    broken = root / "test" / "class1" / "0.png"
    broken.write_bytes(b"no image")
    out = tmp_path / "result.json"
    words = [f"run={colour_run}", f"data.train={root / 'train'}", f"data.test={root / 'test'}", f"out={out}"]
    assert f"1 of 18 images cannot be read and are left out: the first is {broken}." in cli("knn", *words, "k=[3]")[1]
    assert json.loads(out.read_text())["test"] == {"data": str(root / "test"), "images": 17, "unreadable": 1}
    for path in (root / "test" / "class1").iterdir():
        path.write_bytes(b"no image")
    sentence = f"6 of 18 images cannot be read and are left out, all of class1: the first is {broken}."
    few = ["epochs=1", "lr=[1]", "probe_batch_size=4", "holdout=0.3"]
    for command, more in {
        "knn": ["k=[3]"],
        "retrieval": ["k=[1]"],
        "robustness": [*few, "attacks=[]", "corruptions=[contrast]"],
        "attentive": [*few, "weight_decay=[0]", "cache=false"],
    }.items():
        status, printed, error = cli(command, *words, *more)
        assert (status, printed.count(sentence)) == (0, 1), error


def test_the_untrained_encoder_is_measured_by_the_same_ruler(cli, labelled, tmp_path):
    out = tmp_path / "result.json"
    status, printed, _ = cli(
        "knn", "run=random:vit_tiny_patch16_224", "image_size=32",
        "model_args={patch_size: 8, embed_dim: 48, depth: 2, num_heads: 2}",
        f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}", "k=[3]", f"out={out}",
    )  # fmt: skip
    assert status == 0
    assert "class token" in printed
    assert json.loads(out.read_text())["weights"] == "random, seed 0"


def test_the_untrained_encoder_of_a_run_is_the_one_that_it_began_with(cli, labelled, tmp_path):
    out, result = tmp_path / "run", tmp_path / "result.json"
    sets = [str(labelled / "train"), str(labelled / "test")]
    arguments = training_words("mae", f"out={out}", "eval.k=5", "mean=[0.2,0.3,0.4]", "seed=3")
    assert cli("pretrain", sets[0], *arguments, f"eval.train={sets[0]}", f"eval.test={sets[1]}")[0] == 0
    knn_arguments = [f"run=untrained:{out}", f"data.train={sets[0]}", f"data.test={sets[1]}", "k=[5]", f"out={result}"]
    assert cli("knn", *knn_arguments)[0] == 0
    record = json.loads(result.read_text())
    before = next(line["knn/top1"] for line in processes.lines(out) if line["step"] == 0)
    assert record["results"]["neighbours"][0]["top1"] == pytest.approx(before, abs=1e-3)
    assert record["weights"] == "untrained, seed 3"


def test_pixels_minus_the_mean_image_are_a_baseline(cli, fails, tmp_path):
    """Bright and dark noise in two patterns: brightness is shared, only the pattern tells the classes apart."""
    generator = np.random.default_rng(0)
    rows = np.arange(16)[:, None, None]
    for split in ("train", "test"):
        for c, pattern in enumerate((rows % 2, rows // 2 % 2)):
            (tmp_path / split / str(c)).mkdir(parents=True)
            for i in range(8):
                image = 150 + 20 * pattern + generator.integers(-5, 5, (16, 16, 3))
                Image.fromarray(image.astype(np.uint8)).save(tmp_path / split / str(c) / f"{i}.png")
    out = tmp_path / "result.json"
    sets = [f"data.train={tmp_path / 'train'}", f"data.test={tmp_path / 'test'}"]
    assert cli("knn", "run=pixels", "image_size=16", *sets, "k=[5]", f"out={out}")[0] == 0
    record = json.loads(out.read_text())
    assert (record["results"]["neighbours"][0]["top1"], record["width"]) == (100, 3 * 16 * 16)
    assert record["features"] == "pixels minus the mean training image"
    assert "run=pixels has nothing to export" in fails("export", "run=pixels", f"out={tmp_path / 'x'}")


@pytest.mark.parametrize("command", ["knn", "linear"])
def test_bad_input_gets_a_sentence(fails, labelled, images, colour_run, tmp_path, command):
    train, test = f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"
    run = f"run={colour_run}"
    assert "run= is missing" in fails(command, train, test)
    assert ("data.train is missing" if command == "knn" else "data.test is missing") in fails(
        command, run, *([train] if command == "linear" else [])
    )
    assert "does not exist" in fails(command, "run=nowhere", train, test)
    assert "neither a run" in fails(command, f"run={images}", train, test)
    assert "has no labels" in fails(command, run, train, f"data.test={images}")
    assert "pool=pooled" in fails(command, run, train, test, "pool=pooled")
    assert "Did you mean" in fails(command, run, train, test, "poool=cls")
    assert "must be a list of" in fails(command, run, train, test, f"{'k' if command == 'knn' else 'lr'}=[many]")
    assert "are for timm: and random:" in fails(command, run, train, test, "image_size=64")
    assert "is not a run directory" in fails(command, f"run=untrained:{images}", train, test)
    assert "batch_size=0 must be 1 or above" in fails(command, run, train, test, "batch_size=0")
    assert "workers=-1 must lie between 0 and" in fails(command, run, train, test, "workers=-1")
    assert "is not a model of timm" in fails(command, "run=random:vit_tinny", train, test)
    one = tmp_path / "one" / "class0"
    shutil.copytree(labelled / "train" / "class0", one)
    assert "one class only" in fails(command, run, f"data.train={one.parent}", test)
    np.savez(tmp_path / "five.npz", images=np.zeros((6, 32, 32, 5), np.uint8))
    assert "five.npz has images of other channels than the 3 that run=" in fails(
        command, run, f"data.train={tmp_path / 'five.npz'}", test
    )
    other = tmp_path / "other"
    shutil.copytree(labelled / "test", other)
    (other / "class2").rename(other / "unheard_of")
    assert "classes that" in fails(command, run, train, f"data.test={other}")
    empty = tmp_path / "run"
    empty.mkdir()
    shutil.copy(colour_run / "config.yaml", empty)
    assert "has no checkpoint: " in fails(command, f"run={empty}", train, test)


def test_a_k_above_the_bank_gets_a_sentence_before_the_features_are_computed(fails, labelled, colour_run, monkeypatch):
    monkeypatch.setattr("sslvit.evaluation.frozen.extract_cached", None)  # which nobody may call
    train, test = f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"
    assert "k=37 is larger than the 36 labelled" in fails("knn", f"run={colour_run}", train, test, "k=[37]")
    assert "k=36 is larger than the 35 labelled" in fails("knn", f"run={colour_run}", train, "k=[36]")
    assert "above 0" in fails("knn", f"run={colour_run}", train, test, "k=[0]")


def test_of_the_default_ks_a_small_bank_takes_those_that_fit(cli, labelled, colour_run, tmp_path):
    train, test, out = f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}", tmp_path / "result.json"
    status, printed, _ = cli("knn", f"run={colour_run}", train, test, f"out={out}")
    assert status == 0
    assert "k = 10, 20 only: there are 36 labelled training images" in printed
    assert [row["k"] for row in json.loads(out.read_text())["results"]["neighbours"]] == [10, 20]


def test_like_files_of_two_sets_are_two_sets_to_the_cache(cli, colour_run, tmp_path):
    """Equal names, sizes and times, as files unpacked from one archive may have; only the places differ."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                path = tmp_path / split / name / f"{i}.bmp"
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
                os.utime(path, (0, 0))
    run = tmp_path / "run"
    shutil.copytree(colour_run, run, ignore=shutil.ignore_patterns("eval"))
    arguments = [f"run={run}", f"data.train={tmp_path / 'train'}", f"data.test={tmp_path / 'test'}", "k=1"]
    status, printed, _ = cli("knn", *arguments)
    assert status == 0
    assert "as computed before" not in printed


def test_features_that_are_no_numbers_are_refused_and_no_file_of_the_users_overwritten(
    fails, labelled, colour_run, tmp_path
):
    sets = [f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"]
    mine = tmp_path / "mine.csv"
    mine.write_text("a,b")
    assert "holds no result of sslvit" in fails("knn", f"run={colour_run}", *sets, f"out={mine}")
    assert mine.read_text() == "a,b"
    out = tmp_path / "encoder"
    assert main(["export", f"run={colour_run}", "to=timm", f"out={out}"]) == 0
    weights = load_file(out / "model.safetensors")
    weights["norm.weight"][0] = float("nan")
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    for command in ("knn", "linear", "attentive"):
        assert "not finite" in fails(command, f"run={out}", *sets, "cache=false")


def test_a_checkpoint_that_was_chosen_on_the_test_images_says_so(cli, labelled, tmp_path):
    """save.keep_best chose it by the k-NN on eval.test: neither another checkpoint nor other images have the note."""
    out = tmp_path / "run"
    train, test, other = f"{labelled / 'train'}", f"{labelled / 'test'}", str(tmp_path / "other")
    shutil.copytree(test, other)
    arguments = training_words("mae", f"out={out}", "steps=6", "k=5", "keep_best=true", "keep_last=9")
    sets = [f"eval.train={train}", f"eval.test={test}", "save.every_steps=5"]
    assert cli("pretrain", train, *arguments, *sets)[0] == 0
    before, chosen = sorted((out / "checkpoints").iterdir())  # of step 5, and of step 6 with the evaluation
    for checkpoint, images, expected in ((before, test, False), (chosen, other, False), (chosen, test, True)):
        status, printed, _ = cli("knn", f"run={checkpoint}", f"data.train={train}", f"data.test={images}", "k=[5]")
        assert status == 0
        record = json.loads((out / "eval" / checkpoint.name / "knn.json").read_text())
        assert ("note" in record) == ("is too high: measure it on other" in printed) == expected
    assert "chosen by its k-NN accuracy" in cli("compare", chosen)[1]


def test_weights_of_a_hub_that_cannot_be_reached_are_refused_at_once(fails, labelled, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    sets = [f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"]
    began = time.monotonic()
    assert "127.0.0.1 cannot be reached, and they are not in" in fails("knn", "run=timm:vit_tiny_patch16_224", *sets)
    assert time.monotonic() - began < 5
    assert not constants.HF_HUB_OFFLINE
