"""Prints what must not depend on the order of sets, which differs from process to process."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from click.testing import CliRunner

from bertbench.cli.plan import command as plan
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, published_workload
from bertbench.hardware.device import Budget, Device
from bertbench.memory.allocator.recording import Recording, recording_to_text
from bertbench.memory.traces.loops import Recorded
from bertbench.probing.extrapolation import extrapolate
from bertbench.running.classifier import ClassifierSettings
from bertbench.running.output.run_record import settings_json
from finetune.spec.checkpointing import parse_checkpointing
from finetune.storage.array_cache import hash_key
from finetune.tasks.demo_data import demo_files
from finetune.tasks.glue import TASKS
from finetune.tasks.squad_cache import SquadSource
from finetune.tasks.squad_examples import read_squad
from finetune.tasks.table_files import TableTask, read_table_task
from finetune.text.tokenization import load_tokenizer
from helpers.ledger_rows import fits, oom, rows_of
from reports.comparison import compare_cells
from reports.measured_cells import collect_cells
from reports.tables import write_tables


def labels(folder: Path) -> object:
    """Of a table whose labels are equal as numbers."""
    path = folder / "train.tsv"
    spellings = ["1", "01", "001", "0001", "-0", "0", "00", "2", "02"]
    path.write_text("text\tlabel\n" + "".join(f"a\t{label}\n" for label in spellings))
    task = TableTask({"train": path}, "text")
    data = read_table_task(task)
    record = settings_json(ClassifierSettings(task, True, False, False))
    return data.labels, data.splits["train"].label_ids.tolist(), record


def keys() -> object:
    """What caches and ledgers are asked for."""
    demo = demo_files()
    tokenizer = load_tokenizer(demo.vocab_file, do_lower_case=True)
    source = SquadSource(demo.squad_train, tokenizer, 64, 16, 16, True, False)
    examples = read_squad(demo.squad_train, is_training=True, version_2_with_negative=False)
    workload = published_workload("bert-base", 128, "squad")
    device = Device("gpu", 0, "GPU", "id", 1 << 34, 1 << 34)
    return (
        source.key(),
        hash_key(ids=[example.qas_id for example in examples]),
        [(task.name, task.labels, list(task.splits)) for task in TASKS],
        workload.key(),
        Levers(parse_checkpointing("full:3")).key(),
        Budget(device, 1 << 33).key(),
    )


def reports() -> object:
    """Tables and a comparison of cells that only their settings' names tell apart."""
    (row,) = rows_of(fits(3))
    rows = []
    for number, name in enumerate(("telepathic", "lucid", "vivid", "dim", "grey")):
        levers = {"checkpointing": name}
        question = dataclasses.replace(row.question, levers=json.dumps(levers))
        rows.append(dataclasses.replace(row, id=number + 1, levers=levers, question=question))
    rows += rows_of(fits(9), oom(10), first=20)
    cells = collect_cells(rows)
    pairs = compare_cells(cells, cells).pairs
    return write_tables(cells, ".md"), [
        (pair.before.levers_text, pair.after.levers_text) for pair in pairs
    ]


def sizes() -> object:
    """Of a step worked out from two others."""
    names = [f"operation/{name}" for name in "abcdefgh"]

    def recording(batch: int) -> Recording:
        events = tuple(range(8)) + tuple(~event for event in range(8))
        return Recording(events, tuple(100 * batch + n for n in range(8)), tuple(names))

    found = extrapolate([Recorded(32, b, recording(b)) for b in (2, 7)], 32, lambda length: ())
    return recording_to_text(recording(3)), repr(found)


def planned() -> object:
    arguments = ["--target-batch", "32", "--model", "bert-base", "--seq-len", "128"]
    result = CliRunner().invoke(
        plan, [*arguments, "--memory", str(4096 * MIB_BYTES), "--gpu", "rtx-3060", "--json", "-"]
    )
    return result.output


if __name__ == "__main__":
    print(labels(Path(sys.argv[1])))
    for part in (keys, reports, sizes, planned):
        print(part())
