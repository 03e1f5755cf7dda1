import numpy as np
import pytest

from sslvit.data import Config, labels, open_source
from sslvit.errors import UserError
from tests.conftest import write_images


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "scans", 4).parent


def table(folder, text: str, name: str = "list.csv", columns: str = ""):
    (folder / name).write_text(text)
    return open_source(f"{folder / name}{columns}", Config())


def test_an_image_may_have_no_label(folder):
    source = table(folder, "path,label\nscans/000.png,b\nscans/002.png,\nscans/001.png,a\n")
    assert source.classes == ["a", "b"]
    assert source.labels.tolist() == [1, -1, 0]
    assert [source.name(i)[-7:] for i in range(3)] == ["000.png", "002.png", "001.png"]


def test_class_numbers_are_in_the_order_of_numbers(folder):
    source = table(folder, "class;path\n10;scans/000.png\n9;scans/001.png\n")
    assert source.classes == ["9", "10"]
    assert source.labels.tolist() == [1, 0]


def test_quoted_cells_byte_order_marks_and_empty_lines(folder):
    write_images(folder / "a, b", 1)
    source = table(folder, '\ufeffPath,label\n"a, b/000.png","x, y"\n\nscans/001.png,z\n')
    assert source.read(0).shape == (3, 40, 36)
    assert source.classes == ["x, y", "z"]


def test_several_findings_become_targets(folder):
    text = "path,Finding Labels\n" + "".join(
        f"scans/{i:03d}.png,{f}\n" for i, f in enumerate(["Mass|Effusion", "No Finding", "Effusion", "Mass | Nodule"])
    )
    targets, names = labels.multilabel(table(folder, text))
    assert names == ["Effusion", "Mass", "Nodule"]
    assert targets.dtype == np.float32
    assert targets.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 1]]


def test_a_column_for_each_finding_becomes_targets_too(folder):
    text = "path,mass,edema\nscans/000.png,1,0\nscans/001.png,-1,1.0\n"
    targets, names = labels.multilabel(table(folder, text, columns=":mass,edema"))
    assert names == ["mass", "edema"]
    assert targets.tolist() == [[1, 0], [0, 1]]


def test_columns_of_numbers_are_regression_targets(folder):
    text = "scan,age,weight\nscans/000.png,3.5,70\nscans/001.png,-4e1,80\n"
    source = table(folder, text, columns=":path=scan,age,weight")
    values, names = labels.numbers(source)
    assert names == ["age", "weight"]
    assert values.dtype == np.float32
    assert values.tolist() == [[3.5, 70], [-40, 80]]
    assert source.labels is None
    with pytest.raises(UserError, match=r"000\.png has nothing in the column age"):
        labels.numbers(table(folder, "path,age\nscans/000.png,\n", columns=":age"))


def test_lists_of_one_set_keep_their_texts_together(folder):
    table(folder, "path,label\nscans/000.png,a|b\n")
    table(folder, "path,label\nscans/001.png,c\n", "more.csv")
    both = open_source(f"[{folder / 'list.csv'},{folder / 'more.csv'}]", Config())
    assert labels.multilabel(both)[1] == ["a", "b", "c"]
    assert labels.multilabel(both)[0].tolist() == [[1, 1, 0], [0, 0, 1]]


def test_a_folder_has_no_label_texts(labelled):
    source = open_source(str(labelled / "train"), Config())
    for read in (labels.multilabel, labels.numbers):
        with pytest.raises(UserError, match="needs a table"):
            read(source)


@pytest.mark.parametrize(
    ("text", "columns", "expected"),
    [
        ("name,label\nscans/000.png,a\n", "", "none called path"),
        ("path,label\nscans/000.png\n", ":label", "line 2 of .* has 1 cells"),
        ("path,label\n", "", "lists no images"),
        ("", "", "none called path"),
        ("path,label\nscans/000.png,a\n", ":age", "has no column age; it has path, label"),
        ("path\nscans/900.png\n", "", "there is no .*900.png"),
    ],
)
def test_a_mistake_in_a_table_is_one_sentence(folder, text, columns, expected):
    with pytest.raises(UserError, match=expected) as error:
        table(folder, text, columns=columns)
    assert "\n" not in str(error.value)


def test_a_table_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*nowhere\.csv"):
        open_source(str(tmp_path / "nowhere.csv:age"), Config())
