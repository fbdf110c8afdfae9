"""Tests of finetune.tasks.table_files: anybody's tables."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.tasks.table_files import TableTask, read_table, read_table_task

ROWS = [
    {"text": 'A "quoted, text', "label": "yes"},
    {"text": "two\u2028lines", "label": "no"},
    {"text": "", "label": "yes"},
]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write a table as other programs would."""
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif path.suffix == ".csv":
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    else:
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
        text = "".join(line + "\n" for line in lines)
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
def test_all_formats_mean_the_same(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"train{suffix}", ROWS)
    data = read_table_task(TableTask({"train": path}, "text"))
    train = data.splits["train"]
    assert train.texts_a == tuple(row["text"] for row in ROWS)
    assert train.texts_b is None
    assert data.labels == ("no", "yes")
    assert train.label_ids.tolist() == [1, 0, 1]
    assert data.metrics == ("accuracy", "f1")


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=5))
def test_csv_cells_come_back(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]]
) -> None:
    def clean(text: str) -> str:
        # What csv cannot hold: lone surrogates are no text, and it refuses NUL on some versions.
        return "".join(c for c in text if not "\ud800" <= c <= "\udfff" and c != "\0")

    rows = [{"text": clean(a), "label": clean(b)} for a, b in cells]
    path = write(tmp_path_factory.mktemp("csv") / "x.csv", rows)
    assert [dict(row) for _, row in read_table(path)] == rows


def test_very_long_cells(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", [{"text": "word " * 100_000, "label": "1"}])
    assert next(read_table(path))[1]["text"] == "word " * 100_000
    assert csv.field_size_limit() <= 2**31 - 1


def test_pairs_and_numeric_labels(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": "y", "grade": str(grade)} for grade in (10, 9, 2)]
    path = write(tmp_path / "train.jsonl", rows)
    data = read_table_task(TableTask({"train": path}, "a", "b", "grade"))
    assert data.labels == ("2", "9", "10")
    assert data.splits["train"].texts_b == ("y", "y", "y")
    assert data.metrics == ("accuracy",)
    task = TableTask({"train": path}, "a", "b", "grade", is_regression=True)
    values = read_table_task(task).splits["train"].label_values
    assert values is not None
    assert values.tolist() == [10.0, 9.0, 2.0]


def test_json_values_keep_their_spelling(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "label": true}\n{"text": "b", "label": 1}\n')
    data = read_table_task(TableTask({"train": path}, "text"))
    assert data.labels == ("1", "true")
    # Hashes without a sign have 64 bits, too.
    path.write_text(f'{{"text": "a", "label": {2**64 - 1}}}\n{{"text": "b", "label": 1}}\n')
    data = read_table_task(TableTask({"train": path}, "text"))
    assert data.labels == ("1", str(2**64 - 1))


def test_labels_of_the_dev_file_are_those_of_training(tmp_path: Path) -> None:
    train = write(tmp_path / "train.tsv", [{"text": "a", "label": x} for x in "xyz"])
    dev = write(tmp_path / "dev.tsv", [{"text": "a", "label": "z"}])
    test = write(tmp_path / "test.tsv", [{"text": "a"}])
    task = TableTask({"train": train, "dev": dev, "test": test}, "text")
    data = read_table_task(task)
    assert data.splits["dev"].label_ids.tolist() == [2]
    assert not data.splits["test"].has_labels
    write(dev, [{"text": "a", "label": "x"}, {"text": "a", "label": "w"}])
    with pytest.raises(InputError, match=r"dev\.tsv:3: unknown label 'w'.*x, y, z"):
        read_table_task(task)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", 'text,label\n"open,1\nb,2\n', r"x\.csv:3: not CSV .*quotation"),
        ("x.csv", "text,label\na\n", r"x\.csv:2: 1 columns instead of 2"),
        ("x.csv", "text,label\n", "no examples"),
        ("x.csv", "", "no examples"),
        ("x.tsv", "text\tlabel\na\tb\tc\n", r"x\.tsv:2: 3 columns instead of 2"),
        ("x.tsv", "text\tlabel\n\na\tb\n", r"x\.tsv:2: empty line"),
        ("x.tsv", "text\ttext\na\tb\n", r"x\.tsv:1: two columns have the same name"),
        ("x.tsv", "words\tlabel\na\tb\nc\td\n", r"x\.tsv:2: no column 'text'.*words, label"),
        ("x.tsv", "text\tlabel\na\tb\nc\tb\n", "only the label b"),
        ("x.jsonl", '{"text": "a"}\n', r"x\.jsonl:1: no column 'label'"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"te', r"x\.jsonl:2: not JSON"),
        ("x.jsonl", "[1]\n", r"x\.jsonl:1: not a JSON object"),
        ("x.jsonl", '{"text": null, "label": 1}\n{"text": "a", "label": 2}\n', r":1: neither a t"),
        (
            "x.jsonl",
            '{"text": "a", "label": NaN}\n{"text": "a", "label": 2}\n',
            r":1: neither .*fin",
        ),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text": "a", "label": [2]}\n', r":2: neither a t"),
        ("x.jsonl", '{"text": "a", "label": 1e999}\n{"text": "a", "label": 2}\n', r":1: neither"),
        ("x.csv", "text,label\na,1\nb,\n", r"x\.csv:3: no label in the column 'label'; fill"),
        ("x.tsv", "text\tlabel\na\t1\nb\t  \n", r"x\.tsv:3: no label in the column 'label'"),
        ("x.csv", "text,label\na,1\nb,nan\n", r"x\.csv:3: the label 'nan' stands for a missing"),
        ("x.csv", "text,label\na,1\nb,2\nc,<NA>\n", r"x\.csv:4: the label '<NA>' stands for"),
        ("x.csv", "text,label\na,no\nb,yes\nc,no \n", r":4: the label 'no ' differs from 'no'"),
        ("x.xlsx", "", "unknown kind of file '.xlsx'"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_table_task(TableTask({"train": path}, "text"))


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
def test_files_as_editors_leave_them(tmp_path: Path, suffix: str) -> None:
    """A byte order mark, Windows' line ends, and empty lines at the end."""
    path = write(tmp_path / f"train{suffix}", ROWS)
    expected = read_table_task(TableTask({"train": path}, "text")).splits["train"]
    content = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + content + b"\r\n\r\n")
    again = read_table_task(TableTask({"train": path}, "text")).splits["train"]
    assert again.texts_a == expected.texts_a
    assert again.label_ids.tolist() == expected.label_ids.tolist()


def test_columns_without_a_name_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(",text,label,\n0,a,1,\n1,b,2,\n")
    data = read_table_task(TableTask({"train": tmp_path / "x.csv"}, "text"))
    assert data.splits["train"].texts_a == ("a", "b")


def test_an_empty_line_of_a_single_column_is_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("text\na\n\n")
    assert [row["text"] for _, row in read_table(tmp_path / "x.tsv")] == ["a", ""]


def test_a_label_that_looks_missing_is_one_if_it_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\na,nan\nb,null\n")
    data = read_table_task(TableTask({"train": path}, "text", labels=("null", "nan")))
    assert data.splits["train"].label_ids.tolist() == [1, 0]
    path.write_text("text,label\na,nan\nb,\n")
    with pytest.raises(InputError, match=r"x\.csv:3: no label"):
        read_table_task(TableTask({"train": path}, "text", labels=("null", "nan")))
    with pytest.raises(InputError, match="is empty"):
        read_table_task(TableTask({"train": path}, "text", labels=("", "nan")))


@pytest.mark.parametrize("number", ["nan", "inf", "-Infinity", "", "1e39", "-1e39", "1_0", "0x1"])
def test_a_number_to_predict_is_finite(tmp_path: Path, number: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"text,label\na,1.5\nb,{number}\n")
    with pytest.raises(InputError, match=r"x\.csv:3: (label '.*' is not a number|no label)"):
        read_table_task(TableTask({"train": path}, "text", is_regression=True))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["1", "01", "001", "2"], ("001", "01", "1", "2")),
        (["-0", "0", "00", "-1"], ("-1", "-0", "0", "00")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["9" * 5000, "1"], ("1", "9" * 5000)),
    ],
)
def test_the_order_of_labels_is_total(
    tmp_path: Path, found: list[str], expected: tuple[str, ...]
) -> None:
    for labels in (found, found[::-1]):
        path = write(tmp_path / "x.tsv", [{"text": "a", "label": label} for label in labels])
        assert read_table_task(TableTask({"train": path}, "text")).labels == expected


def test_not_utf8(tmp_path: Path) -> None:
    for name in ("x.csv", "x.tsv", "x.jsonl"):
        (tmp_path / name).write_bytes(b"text\nab\ncaf\xe9\n")
        with pytest.raises(InputError, match=r":3: not UTF-8"):
            list(read_table(tmp_path / name))


def test_labels_and_metrics_must_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", ROWS)
    with pytest.raises(InputError, match="labels are unknown without training"):
        read_table_task(TableTask({"dev": path}, "text"))
    with pytest.raises(InputError, match="two or more"):
        read_table_task(TableTask({"dev": path}, "text", labels=("yes", "yes")))
    with pytest.raises(InputError, match="pearson is no metric for classes"):
        read_table_task(TableTask({"train": path}, "text", metrics=("pearson",)))
    with pytest.raises(InputError, match=r"x\.csv:2: label 'yes' is not a number"):
        read_table_task(TableTask({"train": path}, "text", is_regression=True))
    data = read_table_task(TableTask({"dev": path}, "text", labels=("yes", "no", "maybe")))
    assert data.splits["dev"].label_ids.tolist() == [0, 1, 0]
