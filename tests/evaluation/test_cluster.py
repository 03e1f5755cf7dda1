"""Clusters: the measures against definitions counted pair by pair and matching by matching, and the command."""

import itertools
import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from sslvit.evaluation import cluster


def random_labels(clusters, classes, seed):
    """Two labellings of the same images, of unequal groups."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 30, (clusters, classes), generator=generator).flatten()
    return torch.arange(clusters * classes).repeat_interleave(counts).div(classes, rounding_mode="floor"), (
        torch.arange(clusters * classes).repeat_interleave(counts) % classes
    )


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3), (1, 4), (7, 7)])
def test_the_matching_is_the_best_of_all(shape):
    for seed in range(3):
        a, b = random_labels(*shape, seed)
        counts = torch.zeros(shape, dtype=torch.long)
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            counts[i, j] += 1
        small, large = sorted(shape)
        wide = counts if shape[0] == small else counts.t()
        best = max(sum(int(wide[r, c]) for r, c in enumerate(p)) for p in itertools.permutations(range(large), small))
        assert cluster.measure(a, b)["accuracy"] == pytest.approx(100 * best / len(a), abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_rand_index_equals_a_count_of_pairs(seed):
    a, b = (labels[::6] for labels in random_labels(3, 4, seed))
    pairs = list(itertools.combinations(range(len(a)), 2))
    both = sum(bool(a[i] == a[j] and b[i] == b[j]) for i, j in pairs)
    in_a, in_b = sum(bool(a[i] == a[j]) for i, j in pairs), sum(bool(b[i] == b[j]) for i, j in pairs)
    expected = in_a * in_b / len(pairs)
    found = (both - expected) / ((in_a + in_b) / 2 - expected)
    assert cluster.measure(a, b)["ari"] == pytest.approx(100 * found, abs=1e-4)


def test_mutual_information_equals_its_sum_over_cells():
    a, b = (labels.tolist() for labels in random_labels(3, 5, 0))
    of_a, of_b, cells = (
        {key: n / len(a) for key, n in Counter(part).items()} for part in (a, b, zip(a, b, strict=True))
    )
    mutual = sum(p * math.log(p / (of_a[i] * of_b[j])) for (i, j), p in cells.items())
    mean = -sum(p * math.log(p) for part in (of_a, of_b) for p in part.values()) / 2
    assert cluster.measure(torch.tensor(a), torch.tensor(b))["nmi"] == pytest.approx(100 * mutual / mean, abs=1e-4)


def test_equal_partitions_score_100_and_independent_ones_0():
    labels = torch.arange(100) % 5
    assert cluster.measure(torch.tensor([3, 0, 4, 1, 2])[labels], labels) == {"nmi": 100, "ari": 100, "accuracy": 100}
    independent = cluster.measure(torch.arange(400) // 4 % 4, torch.arange(400) % 4)
    assert independent["nmi"] == pytest.approx(0, abs=1e-6)
    assert independent["ari"] == pytest.approx(0, abs=1)
    assert independent["accuracy"] == 25
    assert cluster.measure(torch.zeros(20, dtype=torch.long), torch.arange(20) % 2) == {
        "nmi": 0, "ari": 0, "accuracy": 50,
    }  # fmt: skip


@pytest.mark.parametrize("spherical", [True, False])
def test_kmeans_finds_clouds_again_and_each_repeat_is_a_function_of_the_seed(spherical):
    generator = torch.Generator().manual_seed(0)
    centres = 5 * torch.eye(6)
    labels = torch.arange(300) % 6
    x = centres[labels] + 0.1 * torch.randn(300, 6, generator=generator)
    config = cluster.Config(spherical=spherical)
    clusters = cluster.kmeans(x, 6, config, repeat=0)
    assert cluster.measure(clusters, labels)["accuracy"] == 100
    noise = torch.randn(500, 8, generator=generator)
    first, again, other = (cluster.kmeans(noise, 10, config, repeat) for repeat in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_features_that_are_all_the_same_have_clusters_without_meaning():
    """A collapsed encoder: no crash, no nan, and the chance that it deserves."""
    clusters = cluster.kmeans(torch.ones(60, 8), 3, cluster.Config(), repeat=0)
    found = cluster.measure(clusters, torch.arange(60) % 3)
    assert found["ari"] <= 5
    assert found["accuracy"] <= 50
    assert found["nmi"] <= 10


def test_spherical_clusters_look_at_directions_and_others_at_distances():
    """Two directions, each short and long: the direction is one partition and the length another."""
    directions = torch.tensor([[1.0, 0.0], [0.99, 0.14]])
    x = torch.cat([length * directions.repeat_interleave(20, 0) for length in (1.0, 100.0)])
    by_direction, by_length = torch.tensor([0] * 20 + [1] * 20).repeat(2), torch.tensor([0] * 40 + [1] * 40)
    for spherical, labels in ((True, by_direction), (False, by_length)):
        clusters = cluster.kmeans(x, 2, cluster.Config(spherical=spherical), repeat=0)
        assert cluster.measure(clusters, labels)["accuracy"] == 100


def test_the_command_finds_three_colours_and_draws_them(cli, labelled, colour_run, tmp_path):
    out, picture = tmp_path / "result.json", tmp_path / "clusters.png"
    words = ["cluster", f"run={colour_run}", f"data={labelled / 'train'}", f"out={out}", "repeats=2", "workers=0"]
    status, printed, _ = cli(*words, f"picture={picture}", "per_cluster=4")
    assert status == 0
    assert "36 images of 3 classes in 3 clusters, spherical k-means" in printed
    record = json.loads(out.read_text())
    results = record["results"]
    assert results["accuracy"] > 90
    assert results["accuracy"] == pytest.approx(sum(r["accuracy"] for r in results["repeats"]) / 2, abs=1e-3)
    assert record["settings"].items() >= {"spherical": True, "repeats": 2, "restarts": 5, "iterations": 50}.items()
    assert "per_cluster" not in record["settings"]  # of the picture only
    pixels = np.asarray(Image.open(picture)).reshape(-1, 3).astype(int)
    for colour in ((200, 40, 40), (40, 200, 40), (40, 40, 200)):
        assert (np.abs(pixels - colour).max(axis=1) <= 30).sum() > 4 * 32 * 32  # four images of each are on it
    assert cli(*words, f"picture={picture}", "per_cluster=4")[0] == 0  # its own picture is replaced
    status, _, _ = cli(*words, "k=5")
    assert status == 0
    assert json.loads(out.read_text())["results"]["k"] == 5


def test_bad_input_gets_a_sentence(fails, labelled, images, colour_run, tmp_path):
    run, data = f"run={colour_run}", f"data={labelled / 'train'}"
    assert "data is missing" in fails("cluster", run)
    assert "k=37 is larger than the 36 labelled images" in fails("cluster", run, data, "k=37")
    assert "k=1 must be 2 or above" in fails("cluster", run, data, "k=1")
    assert "repeats=0" in fails("cluster", run, data, "repeats=0")
    assert "has no labels" in fails("cluster", run, f"data={images}")
    shutil.copytree(labelled / "train" / "class0", tmp_path / "one" / "class0")
    assert "of one class only" in fails("cluster", run, f"data={tmp_path / 'one'}")
    assert "there is no folder" in fails("cluster", run, data, f"picture={tmp_path / 'no' / 'p.png'}")
    assert "must end in .png" in fails("cluster", run, data, f"picture={tmp_path / 'p.jpg'}")
    theirs = tmp_path / "holiday.png"
    Image.new("RGB", (8, 8)).save(theirs)
    before = theirs.read_bytes()
    assert "was not drawn by sslvit" in fails("cluster", run, data, f"picture={theirs}")
    assert theirs.read_bytes() == before
