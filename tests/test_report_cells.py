"""What trials say together, and the tables of it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import pytest
from ledger_rows import CPU, failed, fits, oom, rows_of

from bertbench.devices import Device
from bertbench.trial import Trial
from reports.cells import AT_LEAST, BELOW, CERTIFIED, FAILED, MEASURED, read_cells
from reports.tables import limit_text, published_tables, write_tables


@pytest.mark.parametrize(
    ("trials", "limit", "evidence", "text"),
    [
        ([fits(31), oom(32)], 31, CERTIFIED, "31*"),
        ([fits(31, fresh=False), oom(32)], 31, MEASURED, "31"),
        ([fits(31), oom(32, fresh=False)], 31, MEASURED, "31"),
        ([fits(31), oom(40)], 31, MEASURED, "31"),
        # What a fresh process says counts, whatever comes later.
        ([fits(31), oom(32), fits(31, fresh=False), oom(32, fresh=False)], 31, CERTIFIED, "31*"),
        # A failure is no answer, and takes none away.
        ([fits(31), oom(32), failed(32), failed(31)], 31, CERTIFIED, "31*"),
        # The newer one of two.
        ([oom(31), fits(31), oom(32)], 31, CERTIFIED, "31*"),
        # Out of memory below what fits is no limit.
        ([oom(8), fits(31), oom(32)], 31, CERTIFIED, "31*"),
        ([oom(8), fits(31)], 31, AT_LEAST, ">=31"),
        ([fits(2), fits(5)], 5, AT_LEAST, ">=5"),
        ([oom(1)], 0, CERTIFIED, "0*"),
        ([oom(1, fresh=False)], 0, MEASURED, "0"),
        ([oom(7), oom(9)], None, BELOW, "<7"),
        ([failed(3)], None, FAILED, "-"),
    ],
)
def test_evidence(trials: list[Trial], limit: int | None, evidence: str, text: str) -> None:
    (cell,) = read_cells(rows_of(*trials))
    assert (cell.max_batch, cell.evidence, limit_text(cell)) == (limit, evidence, text)


def test_cells_are_told_apart_and_put_in_order() -> None:
    gpu = Device("gpu", 3, "Card", "GPU-1", 1 << 40, 1 << 40, driver="550")
    rows = [
        *rows_of(fits(4), policy="full"),
        *rows_of(fits(3), policy="none", optimizer="lion"),
        *rows_of(fits(2), policy="none", steps=2),
        *rows_of(fits(1), policy="none"),
        *rows_of(fits(5), model="bert-tiny"),
        *rows_of(fits(6), model="bert-base", seq_len=64, policy="nested"),
        *rows_of(fits(7), head="classifier"),
        *rows_of(fits(8), mib=1024),
        *rows_of(fits(9), device=gpu),
        *rows_of(fits(10), policy="none"),
    ]
    cells = read_cells(rows)
    assert [cell.max_batch for cell in cells] == [9, 5, 7, 6, 10, 4, 2, 3, 8]
    assert [len(cell.rows) for cell in cells] == [1, 1, 1, 1, 2, 1, 1, 1, 1]
    assert cells[6].setting == "none, 2 micro-batches"
    assert cells[6].examples_per_second == 2 * 2 / 2.0
    assert cells[0].place.as_device() == dataclasses.replace(
        gpu, index=0, uuid=None, total_bytes=512 << 20, free_bytes=512 << 20
    )
    assert read_cells([]) == []


def test_cells_of_another_version_are_shown_all_the_same() -> None:
    (row,) = rows_of(fits(3))
    levers = {"checkpointing": "telepathic", "micro": 3}
    other = dataclasses.replace(
        row, levers=levers, question=("{}", row.question[1], "[]", json.dumps(levers))
    )
    (cell,) = read_cells([other])
    assert (cell.levers, cell.workload, cell.setting) == (None, None, "telepathic, 3")
    assert cell.place.kind == "cpu"
    assert "telepathic" in write_tables([cell], ".md")


ROWS = [
    *rows_of(fits(31, 10_000, 40.0), oom(32), seq_len=384, mib=11430),
    *rows_of(fits(90), seq_len=384, policy="full", mib=11430),
    *rows_of(fits(21, fresh=False), oom(22), seq_len=512, mib=11430),
    *rows_of(oom(1), model="bert-large", seq_len=512, mib=11430),
    *rows_of(fits(9), model="bert-tiny", seq_len=64, head="classifier", mib=11430),
]

MARKDOWN = """\
Max Batch Size, squad, 11.2 GiB on Some & CPU (2 cores)

| System | Seq Length | published, Titan X 12 GB | none | full |
| --- | ---: | ---: | ---: | ---: |
| BERT-Base | 384 | 12 | 31\\* | >=90 |
| BERT-Base | 512 | 6 | 21 |  |
| BERT-Large | 512 | 0 | 0\\* |  |

NOTE

Max Batch Size, classifier, 11.2 GiB on Some & CPU (2 cores)

| System | Seq Length | none |
| --- | ---: | ---: |
| BERT-Tiny | 64 | >=9 |

NOTE
"""
NOTE = (
    "\\* certified: this batch fits and the next one runs out of memory, each in a fresh process. "
    ">= no larger one was tried. < only larger ones were tried."
)


def test_markdown() -> None:
    assert write_tables(read_cells(ROWS), ".md") == MARKDOWN.replace("NOTE", NOTE)
    assert write_tables([], ".md") == "no trials\n"


def test_latex() -> None:
    text = write_tables(read_cells(ROWS), ".tex")
    assert text.count("\\begin{table}") == text.count("\\end{table}") == 2
    assert "BERT-Base & 384 & 12 & 31$^*$ & $\\geq$90 \\\\" in text
    assert "11.2 GiB on Some \\& CPU (2 cores)" in text
    assert "\\begin{tabular}{lrrrr}" in text


def test_csv_and_json_are_of_numbers() -> None:
    cells = read_cells(ROWS)
    lines = list(csv.DictReader(io.StringIO(write_tables(cells, ".csv"))))
    values = json.loads(write_tables(cells, ".json"))["cells"]
    assert len(lines) == len(values) == 5
    assert {key: lines[1][key] for key in ("model", "levers", "evidence", "max_batch",
            "published_max_batch", "peak_bytes", "tensorflow_version")} == {
        "model": "bert-base", "levers": "none", "evidence": "certified", "max_batch": "31",
        "published_max_batch": "12", "peak_bytes": str(10_000 << 20),
        "tensorflow_version": "2.21.0",
    }  # fmt: skip
    assert values[1]["examples_per_second"] == 31 / 40
    assert values[1]["levers"]["checkpointing"] == "none"
    assert values[4]["max_batch"] == 0
    assert lines[0]["published_max_batch"] == ""


def test_a_table_for_each_place_and_task() -> None:
    tables = published_tables(read_cells([*ROWS, *rows_of(fits(1), device=CPU, mib=64)]))
    assert [(t.head, t.place.budget_bytes >> 20) for t in tables] == [
        ("squad", 64), ("squad", 11430), ("classifier", 11430),
    ]  # fmt: skip


def test_what_was_tried_for_a_plan_is_no_limit() -> None:
    tried = rows_of(fits(8), steps=4)
    cells = read_cells([*rows_of(fits(31), oom(32)), *tried])
    (table,) = published_tables(cells)
    assert list(table.frame.columns)[-1] == "none"
    assert len(cells) == 2
    # Where the limit was looked for, it is one.
    (table,) = published_tables(read_cells([*tried, *rows_of(oom(9), steps=4)]))
    assert table.frame["none, 4 micro-batches"].tolist() == ["8*"]
    # And what fits at once tells something in any case.
    (table,) = published_tables(read_cells(rows_of(fits(8))))
    assert table.frame["none"].tolist() == [">=8"]
