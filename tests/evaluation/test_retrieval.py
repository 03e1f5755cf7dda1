"""Retrieval against a loop written from the definitions, and as a command."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from sslvit.evaluation import retrieval
from tests import processes


def by_hand(bank, labels, queries, query_labels, ks, own=None):
    """One query and one rank at a time, in Python floats: ([average precision or None], [hits at each k])."""
    precisions, hits = [], []
    for q, query in enumerate(queries.double()):
        others = [i for i in range(len(bank)) if own is None or i != int(own[q])]
        ranking = sorted(others, key=lambda i: -float(query @ bank[i].double()))
        right = [int(labels[i]) == int(query_labels[q]) for i in ranking]
        at_hits = [sum(right[: rank + 1]) / (rank + 1) for rank in range(len(right)) if right[rank]]
        precisions.append(sum(at_hits) / len(at_hits) if at_hits else None)
        hits.append([sum(right[:k]) for k in ks])
    return precisions, hits


def random_task(n, q, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    bank, queries = (F.normalize(torch.randn(m, 6, generator=generator), dim=1) for m in (n, q))
    return (
        bank, torch.randint(0, classes, (n,), generator=generator),
        queries, torch.randint(0, classes, (q,), generator=generator),
    )  # fmt: skip


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("at_once", [2**24, 150])
def test_measures_equal_a_loop_by_the_definitions_whatever_is_ranked_at_once(monkeypatch, leave_one_out, at_once):
    monkeypatch.setattr(retrieval, "RANKED_AT_ONCE", at_once)
    bank, labels, queries, query_labels = random_task(70, 31, 4)
    own = None
    if leave_one_out:
        queries, query_labels, own = bank, labels, torch.arange(70)
    ks = (1, 3, 69)
    found = retrieval.rank_all(bank, labels, queries, query_labels, ks, leave_one_out, seed=0)
    precisions, hits = by_hand(bank, labels, queries, query_labels, ks, own)
    assert found.precision.tolist() == pytest.approx(precisions)
    assert found.hits.tolist() == hits
    results = retrieval.summarise(found, ks, seed=0)
    assert results["map"] == pytest.approx(100 * sum(precisions) / len(precisions), abs=1e-3)
    assert results["at"][1]["recall"] == pytest.approx(100 * sum(h[1] > 0 for h in hits) / len(hits), abs=1e-3)
    assert results["at"][1]["precision"] == pytest.approx(100 * sum(h[1] for h in hits) / len(hits) / 3, abs=1e-3)
    assert results["map_interval"][0] < results["map"] < results["map_interval"][1]


def test_an_image_never_finds_itself_but_finds_its_copy():
    """Two copies of each image, in one class of two: the copy is first, and an image alone in its class finds none."""
    images = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    bank = torch.cat([images, images, images[:1]])
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5])  # the last is a third copy in a class of its own
    found = retrieval.rank_all(bank, labels, bank, labels, (1,), True, seed=0)
    assert found.precision[[1, 2, 3, 4, 6, 7, 8, 9]].tolist() == [1.0] * 8
    assert found.precision[10].isnan()
    assert set(found.precision[[0, 5]].tolist()) <= {1.0, 0.5}  # its copy and the stranger are equally near
    results = retrieval.summarise(found, (1,), seed=0)
    assert (results["queries"], results["without_answer"]) == (10, 1)


def test_equal_features_retrieve_at_chance_though_the_files_lie_in_the_order_of_their_classes():
    bank = torch.ones(400, 4) / 2
    labels = torch.arange(400) // 100
    found = retrieval.rank_all(bank, labels, bank, labels, (1, 10), True, seed=0)
    results = retrieval.summarise(found, (1, 10), seed=0)
    assert results["map"] == pytest.approx(25, abs=2)  # in the order of the files it would be 52


def test_the_interval_covers_the_mean_of_the_queries_values():
    values = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = retrieval.interval(values, seed=0)
    half = 196 * values.std().item() / 500**0.5
    assert (low, high) == pytest.approx((100 * values.mean().item() - half, 100 * values.mean().item() + half), abs=0.3)


def test_the_command_tells_colours_apart_with_queries_and_without(cli, labelled, colour_run, tmp_path):
    out = tmp_path / "result.json"
    words = ["retrieval", f"run={colour_run}", f"data.train={labelled / 'train'}", f"out={out}", "k=[1,5]", "workers=0"]
    status, printed, _ = cli(*words, f"data.test={labelled / 'test'}")
    assert status == 0
    assert "18 queries, each ranks 36 images of 3 classes" in printed
    record = json.loads(out.read_text())
    assert record["results"]["map"] > 80
    assert record["results"]["at"][0]["recall"] > 90
    assert record["gallery"]["images"] == 36
    assert not record["leave_one_out"]
    status, printed, _ = cli(*words)
    assert status == 0
    assert "36 queries, each ranks 35 images" in printed
    assert json.loads(out.read_text())["leave_one_out"]


def test_one_and_two_processes_give_the_same(labelled, colour_run, tmp_path):
    words = ["retrieval", f"run={colour_run}", f"data.train={labelled / 'train'}", "cache=false", "workers=0"]
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    processes.finish(processes.start([*words, f"out={alone}"], tmp_path / "log"), tmp_path / "log")
    processes.launch([*words, f"out={together}"], tmp_path / "log2", world_size=2)
    assert json.loads(alone.read_text())["results"] == json.loads(together.read_text())["results"]


def test_bad_input_gets_a_sentence(fails, labelled, images, colour_run, tmp_path):
    run, train = f"run={colour_run}", f"data.train={labelled / 'train'}"
    assert "data.train is missing" in fails("retrieval", run)
    for same in (labelled / "train", labelled / "test" / ".." / "train"):
        assert "are the training images: give other images, or leave" in fails(
            "retrieval", run, train, f"data.test={same}"
        )
    assert "k=36 is larger than the 35 images" in fails("retrieval", run, train, "k=[36]")
    assert "k=[0] must be 1 or above" in fails("retrieval", run, train, "k=[0]")
    assert "k is empty" in fails("retrieval", run, train, "k=[]")
    assert "has no labels" in fails("retrieval", run, f"data.train={images}")
    (tmp_path / "one").mkdir()
    shutil.copytree(labelled / "train" / "class0", tmp_path / "one" / "class0")
    assert "of one class only" in fails("retrieval", run, f"data.train={tmp_path / 'one'}")
    shutil.copytree(labelled / "train" / "class1", tmp_path / "one" / "unheard_of")
    assert "classes that" in fails("retrieval", run, train, f"data.test={tmp_path / 'one'}")
    for c in range(2):  # one image a class: nobody finds anything
        shutil.copytree(labelled / "train" / f"class{c}", tmp_path / "few" / f"class{c}")
        for path in sorted((tmp_path / "few" / f"class{c}").iterdir())[1:]:
            path.unlink()
    assert "a class with two or more images" in fails("retrieval", run, f"data.train={tmp_path / 'few'}", "k=[1]")
