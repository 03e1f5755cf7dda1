import json
import shutil

import numpy as np
import pytest
import torch

from sslvit.evaluation import compare, records


def record(right, top1=None, **more) -> dict:
    right = torch.tensor(right)
    results = {"top1": 100 * right.double().mean().item() if top1 is None else top1, "right": records.pack_bits(right)}
    test = {"data": "x", "images": len(right), "unreadable": 0}
    return {"test": test, "train": {"data": "t"}, "precision": "bf16", "seed": 0, "results": results, **more}


def write(run, name, content):
    (run / "eval").mkdir(parents=True, exist_ok=True)
    (run / "eval" / f"{name}.json").write_text(json.dumps(content))


def test_what_is_packed_is_unpacked():
    right = torch.rand(37, generator=torch.Generator().manual_seed(0)) < 0.5
    assert records.unpack_bits(records.pack_bits(right)).tolist() == right.tolist()


def test_the_interval_of_a_difference_is_that_of_drawing_images_in_pairs():
    generator = np.random.default_rng(0)
    a = generator.random(400) < 0.6
    b = np.where(generator.random(400) < 0.2, ~a, a)
    found = compare.difference(*(records.pack_bits(torch.from_numpy(right)) for right in (a, b)), seed=1)
    assert found["difference"] == pytest.approx(100 * (b.mean() - a.mean()), abs=1e-3)
    drawn = generator.integers(0, 400, (4000, 400))
    slow = 100 * (b[drawn].mean(axis=1) - a[drawn].mean(axis=1))
    assert found["interval"] == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.35)


def test_runs_stand_side_by_side_and_other_protocols_are_named(cli, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    right = [True] * 60 + [False] * 40
    write(a, "linear", record(right))
    write(b, "linear", record([True] * 80 + [False] * 20, precision="float32"))
    write(b, "quality", {"results": {"rankme": 12.5}})
    status, printed, _ = cli("compare", a, b, f"out={tmp_path / 'out.json'}")
    assert status == 0
    table = [line.split() for line in printed.splitlines()]
    assert table[0] == ["run", "linear", "%", "RankMe"]
    assert table[1] == [str(a), "60.00"]
    assert table[2] == [str(b), "80.00", "12.50"]
    assert f"linear: {b} +20.00 against {a} (95 % interval" in printed
    assert 'Protocols of linear differ: precision is "bf16"' in printed
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["results"][str(b)] == {"linear": 80.0, "quality": 12.5}
    assert report["differences"][0]["interval"][0] > 0


def test_a_difference_that_other_images_could_reverse_is_called_so(cli, tmp_path):
    write(tmp_path / "a", "linear", record([True, False] * 50))
    write(tmp_path / "b", "linear", record([False, True] * 49 + [True, True]))
    assert "other test images could reverse the order" in cli("compare", tmp_path / "a", tmp_path / "b")[1]


def votes(*rows: tuple[int, float, list]) -> dict:
    """A result of k-NN."""
    found = [{"k": k, "temperature": t, **record(right)["results"]} for k, t, right in rows]
    return {**record(rows[0][2]), "settings": {"k": [k for k, *_ in rows]}, "results": {"neighbours": found}}


def test_k_nn_by_other_k_and_t_is_in_columns_of_its_own(cli, tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    good, bad = [True] * 90 + [False] * 10, [True] * 50 + [False] * 50
    write(a, "knn", votes((10, 0.07, good), (20, 0.07, bad), (5, 0.1, good)))
    write(b, "knn", votes((5, 0.1, bad)))
    write(c, "knn", votes((20, 0.07, good)))
    printed = cli("compare", a, b, f"out={tmp_path / 'out.json'}")[1]  # of those that both have
    assert "k-NN k=5 T=0.1 %" in printed
    assert "k=20" not in printed
    assert "k-NN k=5 T=0.1: " in printed
    assert "-40.00 against" in printed
    assert "differ: " not in printed
    assert json.loads((tmp_path / "out.json").read_text())["results"][str(a)] == {"knn k=5 T=0.1": 90.0}
    printed = cli("compare", a, c)[1]
    assert "k-NN k=20 T=0.07 %" in printed
    assert "+40.00 against" in printed
    printed = cli("compare", a, b, c)[1]  # none that all have: no number stands below another that it is no match for
    table = [line.split() for line in printed.splitlines()[:4]]
    assert " ".join(table[0]) == "run k-NN k=20 T=0.07 % k-NN k=5 T=0.1 %"
    assert [row[1:] for row in table[1:]] == [["50.00"], ["50.00"], ["90.00"]]
    assert printed.splitlines()[2].endswith("50.00")
    assert not printed.splitlines()[1].endswith("50.00")
    assert f"{c} +40.00 against {a}" in printed
    assert f"{b} " not in "".join(printed.splitlines()[4:])


def test_results_of_fine_tuning_for_labels_and_numbers_are_columns_of_their_own(cli, tmp_path):
    write(tmp_path / "a", "finetune", {"task": "multilabel", "results": {"map": 71.25}})
    write(tmp_path / "b", "finetune", {"task": "regression", "results": {"mae": 1.5}})
    header, *rows = cli("compare", tmp_path / "a", tmp_path / "b")[1].splitlines()[:3]
    assert header.split()[1:] == ["fine-tuned", "multilabel", "map", "%", "fine-tuned", "regression", "mae"]
    assert [row.split()[1:] for row in rows] == [["71.25"], ["1.50"]]


def test_real_results_of_a_run_and_of_its_beginning(cli, fails, labelled, colour_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(colour_run, run, ignore=shutil.ignore_patterns("eval"))
    assert "has no results" in fails("compare", run)
    sets = [f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}", "k=[3]"]
    for name in (str(run), f"untrained:{run}"):
        assert cli("knn", f"run={name}", *sets)[0] == 0
    status, printed, _ = cli("compare", run, f"untrained:{run}")
    assert status == 0
    assert f"k-NN k=3 T=0.07: untrained:{run}" in printed
    checkpoint = next((run / "checkpoints").iterdir())
    assert cli("knn", f"run={checkpoint}", *sets)[0] == 0
    assert f"{checkpoint} +0.00 against {run}" in cli("compare", run, checkpoint)[1]
    (run / "eval" / "knn.json").write_text("{}")
    assert "is not a result that this version can read" in fails("compare", run)
    assert "compare needs runs" in fails("compare")
    assert "Did you mean seed?" in fails("compare", run, "sed=1")


@pytest.mark.parametrize(
    "changed",
    [
        "[" * 200_000, {"settings": "x"}, {"notes": 5}, {"results": {"top1": 1.0, "right": 5}},
        {"results": {"top1": 1.0, "right": "16:zzzz"}}, {"results": {"top1": 1.0, "right": "999999999999:00"}},
    ],
    ids=lambda changed: str(changed)[:40],
)  # fmt: skip
def test_a_result_that_somebody_else_wrote_is_read_or_refused(fails, tmp_path, changed):
    write(tmp_path / "a", "linear", record([True] * 16))
    write(tmp_path / "b", "linear", record([True] * 16) | (changed if isinstance(changed, dict) else {}))
    if isinstance(changed, str):
        (tmp_path / "b" / "eval" / "linear.json").write_text(changed)
    assert "is not a result that this version can read" in fails("compare", tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("right", [0, 1])
def test_runs_that_agree_on_all_images_may_still_differ_on_others(right):
    same = records.pack_bits(torch.full((100,), bool(right)))
    found = compare.difference(same, same, seed=0)
    assert found["difference"] == 0
    # 3.6 % of images could differ and not be among 100 in 2.5 % of all draws.
    assert found["interval"] == pytest.approx([-3.62, 3.62], abs=0.01)
