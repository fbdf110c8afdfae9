"""What trials say together, and the tables of it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import pytest

from bertbench.core.workload import published_workload
from bertbench.hardware.device import Device, TpuSettings
from bertbench.ledger.limit import AT_LEAST, BELOW, CERTIFIED, FAILED, MEASURED
from bertbench.ledger.question import QuestionKey
from bertbench.trials.trial import Trial
from finetune.spec.config import preset
from helpers.ledger_rows import CPU, VERSIONS, failed, fits, oom, rows_of
from reports.environments import name_environments
from reports.measured_cells import collect_cells
from reports.tables import limit_text, published_tables, write_tables


@pytest.mark.parametrize(
    ("trials", "limit", "evidence", "text"),
    [
        ([fits(31), oom(32)], 31, CERTIFIED, "31*"),
        ([fits(31, fresh=False), oom(32)], 31, MEASURED, "31"),
        ([fits(31), oom(32, fresh=False)], 31, MEASURED, "31"),
        ([fits(31), oom(40)], 31, MEASURED, "31-39"),
        # What a fresh process says counts, whatever comes later.
        ([fits(31), oom(32), fits(31, fresh=False), oom(32, fresh=False)], 31, CERTIFIED, "31*"),
        # A failure is no answer, and takes none away.
        ([fits(31), oom(32), failed(32), failed(31)], 31, CERTIFIED, "31*"),
        # The newer one of two.
        ([oom(31), fits(31), oom(32)], 31, CERTIFIED, "31*"),
        # What fits above a batch that does not is no limit.
        ([fits(4), oom(5), fits(7), oom(8)], 4, CERTIFIED, "4*"),
        ([oom(8), fits(31), oom(32)], None, BELOW, "<8"),
        ([oom(8), fits(31)], None, BELOW, "<8"),
        ([fits(2), fits(5)], 5, AT_LEAST, ">=5"),
        ([oom(1)], 0, CERTIFIED, "0*"),
        ([oom(1, fresh=False)], 0, MEASURED, "0"),
        ([oom(7), oom(9)], None, BELOW, "<7"),
        ([failed(3)], None, FAILED, "-"),
    ],
)
def test_evidence(trials: list[Trial], limit: int | None, evidence: str, text: str) -> None:
    (cell,) = collect_cells(rows_of(*trials))
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
    cells = collect_cells(rows)
    assert [cell.max_batch for cell in cells] == [9, 5, 7, 6, 10, 4, 2, 3, 8]
    assert [len(cell.rows) for cell in cells] == [1, 1, 1, 1, 2, 1, 1, 1, 1]
    assert cells[6].levers_text == "none, 2 micro-batches"
    assert cells[6].examples_per_second == 2 * 2 / 2.0
    assert cells[0].environment.as_device() == dataclasses.replace(
        gpu, index=0, uuid=None, total_bytes=512 << 20, free_bytes=512 << 20
    )
    assert collect_cells([]) == []


def test_cells_of_another_version_are_shown_all_the_same() -> None:
    (row,) = rows_of(fits(3))
    levers = {"checkpointing": "telepathic", "micro": 3}
    other = dataclasses.replace(
        row,
        levers=levers,
        question=QuestionKey("{}", row.question.versions, "[]", json.dumps(levers)),
    )
    (cell,) = collect_cells([other])
    assert (cell.levers, cell.workload, cell.levers_text) == (None, None, "telepathic, 3")
    assert cell.environment.kind == "cpu"
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
    "\\* certified: this batch fits and the next one runs out of memory, each in a fresh process; "
    "without a mark, not both in fresh ones. 31-40: 31 fits, 41 does not, those between were not "
    "tried. >= no larger batch has a result. < no smaller batch has one."
)


def test_markdown() -> None:
    assert write_tables(collect_cells(ROWS), ".md") == MARKDOWN.replace("NOTE", NOTE)
    assert write_tables([], ".md") == "no trials\n"


def test_latex() -> None:
    text = write_tables(collect_cells(ROWS), ".tex")
    assert text.count("\\begin{table}") == text.count("\\end{table}") == 2
    assert "BERT-Base & 384 & 12 & 31$^*$ & $\\geq$90 \\\\" in text
    assert "11.2 GiB on Some \\& CPU (2 cores)" in text
    assert "\\begin{tabular}{lrrrr}" in text
    odd = dataclasses.replace(
        rows_of(fits(1))[0], model="a_{b}~\\c$", question=QuestionKey("{}", "{}", "", "")
    )
    written = write_tables(collect_cells([odd]), ".tex")
    assert "a\\_\\{b\\}\\textasciitilde{}\\textbackslash{}c\\$ & 384" in written


def test_csv_and_json_are_of_numbers() -> None:
    cells = collect_cells(ROWS)
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
    assert write_tables([], ".csv").startswith("model,")


def test_a_table_for_each_place_and_task() -> None:
    tables = published_tables(collect_cells([*ROWS, *rows_of(fits(1), device=CPU, mib=64)]))
    assert [table.title for table in tables] == [
        "Max Batch Size, squad, 64 MiB on Some & CPU (2 cores)",
        "Max Batch Size, squad, 11.2 GiB on Some & CPU (2 cores)",
        "Max Batch Size, classifier, 11.2 GiB on Some & CPU (2 cores)",
    ]


def test_places_that_differ_have_different_names() -> None:
    card = Device("gpu", 0, "Card", None, 1 << 40, 1 << 40, driver="550")
    other = dataclasses.replace(card, driver="560")
    rows = [
        *rows_of(fits(1)),
        *rows_of(fits(2), versions={**VERSIONS, "tensorflow": "2.20.0"}),
        *rows_of(fits(3), device=card),
        *rows_of(fits(4), device=other),
        *rows_of(fits(5), device=other, mib=64),
    ]
    cells = collect_cells(rows)
    names = name_environments(cell.environment for cell in cells)
    assert {cell.max_batch: names[cell.environment] for cell in cells} == {
        1: "512 MiB on Some & CPU (2 cores), tensorflow 2.21.0",
        2: "512 MiB on Some & CPU (2 cores), tensorflow 2.20.0",
        3: "512 MiB on Card, driver 550",
        4: "512 MiB on Card, driver 560",
        5: "64 MiB on Card",
    }
    assert len({table.title for table in published_tables(cells)}) == 5


def test_budgets_that_round_alike_are_told_apart() -> None:
    cells = collect_cells([*rows_of(fits(100), mib=39_000), *rows_of(fits(101), mib=39_010)])
    assert [(table.title, table.frame["none"].tolist()) for table in published_tables(cells)] == [
        ("Max Batch Size, squad, 39,000 MiB on Some & CPU (2 cores)", [">=100"]),
        ("Max Batch Size, squad, 39,010 MiB on Some & CPU (2 cores)", [">=101"]),
    ]
    alike = Device("gpu", 0, CPU.name, None, 1 << 40, 1 << 40)
    cells = collect_cells([*rows_of(fits(3)), *rows_of(fits(5), device=alike)])
    assert len({table.title for table in published_tables(cells)}) == 2


def test_a_tpu_in_two_zones_is_two_places() -> None:
    def tpu(zone: str | None) -> Device:
        return Device("tpu", 0, "TPU v2", None, 1 << 40, 1 << 40, tpu=TpuSettings("t", zone=zone))

    cells = collect_cells([*rows_of(fits(1), device=tpu(None)), *rows_of(fits(2), device=tpu("a"))])
    assert len({cell.environment for cell in cells}) == 2
    assert len(published_tables(cells)) == 2


def test_models_are_known_by_their_shape() -> None:
    (row,) = rows_of(fits(3))
    alias = dataclasses.replace(row, model="bert-base-uncased")
    (cell,) = collect_cells([alias])
    assert (cell.model, cell.published) == ("bert-base", 12)
    # Folders may have the same name.
    shapes = [dataclasses.replace(preset("bert-mini"), num_attention_heads=n) for n in (1, 2)]
    rows = []
    for number, shape in enumerate(shapes):
        key = dataclasses.replace(published_workload("bert-mini", 384), config=shape).key()
        question = dataclasses.replace(row.question, workload=key)
        trial = fits(10 + number)
        rows.append(dataclasses.replace(row, id=number, model="m", question=question, trial=trial))
    cells = collect_cells(rows)
    assert [cell.model for cell in cells] == ["m (#1, 4 x 256)", "m (#2, 4 x 256)"]
    (table,) = published_tables(cells)
    assert table.frame["none"].tolist() == [">=10", ">=11"]
    # The published shape keeps its name, whatever else is called so.
    other = dataclasses.replace(rows[0], model="bert-base")
    assert {cell.model for cell in collect_cells([row, other])} == {
        "bert-base",
        "bert-base (#2, 4 x 256)",
    }


def test_tasks_with_other_labels_are_told_apart() -> None:
    (row,) = rows_of(fits(3), head="classifier")
    workload = published_workload("bert-base", 384, "classifier")
    key = dataclasses.replace(workload, num_labels=3).key()
    other = dataclasses.replace(row, question=dataclasses.replace(row.question, workload=key))
    cells = collect_cells([row, other])
    assert [cell.task for cell in cells] == ["classifier", "classifier, 3 labels"]
    assert len(published_tables(cells)) == 2


def test_what_was_tried_for_a_plan_is_no_limit() -> None:
    tried = rows_of(fits(8), steps=4)
    cells = collect_cells([*rows_of(fits(31), oom(32)), *tried])
    (table,) = published_tables(cells)
    assert list(table.frame.columns)[-1] == "none"
    assert len(cells) == 2
    # Where the limit was looked for, it is one.
    (table,) = published_tables(collect_cells([*tried, *rows_of(oom(9), steps=4)]))
    assert table.frame["none, 4 micro-batches"].tolist() == ["8*"]
    text = write_tables(collect_cells(tried), ".md")
    assert text == "no limits: the trials only verified plans\n"
    # And what fits at once tells something in any case.
    (table,) = published_tables(collect_cells(rows_of(fits(8))))
    assert table.frame["none"].tolist() == [">=8"]
