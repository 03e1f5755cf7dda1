"""One function makes the record of every evaluation."""

import json
from types import SimpleNamespace

import pytest

from sslvit.evaluation import knn, records
from sslvit.evaluation.frozen import Frozen


def frozen(tmp_path, **config) -> Frozen:
    encoder = SimpleNamespace(image_size=(8, 8))
    subject = SimpleNamespace(encoder=encoder, detail={"step": 3}, results=tmp_path / "eval")
    return Frozen(knn.Config(run="runs/a", **config), subject, "mean", None, "float32")


def test_a_record_says_what_was_measured_with_which_settings(tmp_path, capsys):
    one = frozen(tmp_path, k=(5,), batch_size=7)
    one.note = "Too high."
    one.save("knn", {"top1": 1.5}, classes=3, seed=[0, 1])
    record = json.loads((tmp_path / "eval" / "knn.json").read_text())
    expected = {
        "evaluation": "knn", "run": "runs/a", "step": 3, "features": "mean of patches", "image_size": [8, 8],
        "precision": "float32", "note": "Too high.", "classes": 3, "seed": [0, 1], "results": {"top1": 1.5},
    }  # fmt: skip
    assert record.items() >= expected.items()
    assert record["settings"]["k"] == [5]
    assert not {"batch_size", "run", "data", "out", "seed"} & set(record["settings"])  # they do not change the result
    assert "Too high." in capsys.readouterr().out


def test_out_is_the_file_and_without_a_folder_the_result_is_printed_only(tmp_path, capsys):
    one = frozen(tmp_path, out=str(tmp_path / "here.json"))
    one.save("knn", {})
    assert "note" not in json.loads((tmp_path / "here.json").read_text())
    one.config.out, one.subject.results = "", None
    one.save("knn", {})
    assert "printed only: out=<file> keeps it" in capsys.readouterr().out
    assert not (tmp_path / "eval").exists()


def test_columns_of_a_table_are_aligned_at_the_right():
    assert records.table(["k", "top-1 %"], [["10", "5.00"], ["200", "50.00"]]) == [
        "  k  top-1 %", " 10     5.00", "200    50.00",
    ]  # fmt: skip


def test_what_cannot_be_written_gets_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(records.UserError, match="The result cannot be written to"):
        records.write({}, tmp_path / "file" / "x.json")
