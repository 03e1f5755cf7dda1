"""One function makes the record of every evaluation."""

import json
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from sslvit.evaluation import knn, pictures, records
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


@pytest.fixture
def precious(tmp_path) -> Path:
    """A folder outside a run directory, to which somebody has put links into it."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "file").write_text("mine")
    return folder


NOT_FOLLOWED = {  # what is in the place of results: the sentence about it
    "eval/knn.json": "",
    "eval/features": "No features are kept for the next evaluation in {0} ({0} is a link, and links are not followed).",
    "eval": "The result cannot be written to {0} ({0} is a link, and links are not followed)",
    "a file eval/features": "No features are kept for the next evaluation in {0} ({0} is no folder).",
    "a file eval": "The result cannot be written to {0} ({0} is no folder): give another place, out=<file>.",
}


@pytest.mark.parametrize("place", NOT_FOLLOWED)
def test_links_and_files_in_the_place_of_results_are_not_followed(cli, labelled, colour_run, tmp_path, precious, place):
    run, link = tmp_path / "run", tmp_path / "run" / place.removeprefix("a file ")
    shutil.copytree(colour_run, run, ignore=shutil.ignore_patterns("eval"))
    link.parent.mkdir(exist_ok=True)
    if place.startswith("a file"):
        link.write_text("mine")
    else:
        link.symlink_to(precious / "file" if place.endswith("json") else precious)
    words = ["knn", f"run={run}", f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}", "workers=0"]
    status, printed, error = cli(*words)
    sentence = NOT_FOLLOWED[place].format(link)
    assert (printed + error).count(sentence) == 1 or not sentence
    assert status == (2 if place.endswith("eval") else 0)
    if status:
        assert cli(*words, f"out={tmp_path / 'knn.json'}")[0] == 0
    else:
        assert json.loads((run / "eval" / "knn.json").read_text())["evaluation"] == "knn"
        assert not (run / "eval" / "knn.json").is_symlink()
    assert [path.name for path in precious.iterdir()] == ["file"]
    assert (precious / "file").read_text() == "mine"


def test_out_and_picture_replace_a_link_and_refuse_a_pipe(tmp_path, precious):
    ours = {"out": (precious / "a.json", tmp_path / "b.json"), "picture": (precious / "a.png", tmp_path / "b.png")}
    records.write({"evaluation": "knn"}, ours["out"][0])
    pictures.save(Image.new("L", (8, 8)), str(ours["picture"][0]))
    for key, (target, link) in ours.items():
        link.symlink_to(target)
        before = target.read_bytes()
        check = {"out": records.check_out, "picture": pictures.check}[key]
        check(str(link))
        if key == "out":
            records.write({"evaluation": "linear"}, link)
        else:
            pictures.save(Image.new("L", (9, 9)), str(link))
        assert (target.read_bytes(), link.is_symlink()) == (before, False)
        assert link.read_bytes() != before
        link.unlink()
        os.mkfifo(link)  # nobody will write to it
        with pytest.raises(records.UserError, match=f"{key}="):
            check(str(link))


def test_a_result_that_cannot_be_written_leaves_nothing_and_the_older_one_as_it_was(tmp_path):
    path, limits = tmp_path / "knn.json", resource.getrlimit(resource.RLIMIT_FSIZE)
    for left in ([], ["knn.json"]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))  # bytes of a file, as on a full disk
        try:
            with pytest.raises(records.UserError, match=r"The result cannot be written to .*File too large"):
                records.write({"evaluation": "knn", "results": {"top1": 1.5}}, path)
            with pytest.raises(records.UserError, match=r"The picture cannot be written to .*File too large"):
                pictures.save(Image.new("L", (99, 99)), str(tmp_path / "a.png"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [file.name for file in tmp_path.iterdir()] == left
        if not left:
            records.write({"evaluation": "knn"}, path)
    assert json.loads(path.read_text()) == {"evaluation": "knn"}
