"""Damaged and forged files of every kind that is read: an error of one line, or the right thing.

Thirty mutations of each kind here; `pytest -m slow` tries three hundred.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import random
import shutil
import sqlite3
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertbench.cli import cli
from bertbench.compiling.compilation import COMPILED, Compilation
from bertbench.compiling.target import CompileTarget
from bertbench.core.errors import WorkError
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, TrainingStep, published_workload
from bertbench.fetch.archives import ArchiveError, read_sums, unpack
from bertbench.hardware.device import Budget
from bertbench.ledger.database import open_ledger
from bertbench.ledger.question import Question
from bertbench.ledger.records import record
from bertbench.memory.allocator.bfc import Memory, replay
from bertbench.memory.allocator.recording import Recording, recording_from_text, recording_to_text
from bertbench.memory.compiled import CompiledMemory
from bertbench.planning.plan_file import read_plan
from bertbench.planning.planner import make_plan
from bertbench.planning.requests import PlannedDevice, PlanRequest
from bertbench.probing.compiled.claims import check_compiled, read_compiled_claims
from bertbench.probing.recheck import read_claims
from bertbench.running.output.run_record import recorded_steps_down
from bertbench.running.output.steps_down import step_down_from_json
from finetune.errors import InputError
from finetune.model_files.checkpoint_files import preferred_checkpoints
from finetune.model_files.head_labels import read_trained_head
from finetune.model_files.model_folder import find_model_files, find_tokenizer, read_config_values
from finetune.model_files.safetensors_files import open_safetensors
from finetune.spec.config import from_json_file
from finetune.storage.array_cache import hash_key, load_or_make
from finetune.tasks.demo_data import demo_files
from finetune.tasks.glue import find_task, read_examples
from finetune.tasks.squad_examples import read_squad
from finetune.tasks.table_files import TableTask, read_table_task
from finetune.tasks.triviaqa import read_triviaqa
from finetune.text.tokenization import load_tokenizer
from helpers.ledger_rows import CPU, VERSIONS, fits, oom
from helpers.model_folders import CONFIG as MODEL
from helpers.model_folders import tokenizer_json, write_json
from helpers.mutations import mutated
from helpers.run_folders import squad_run
from reports.comparison import compare_cells, read_either
from reports.comparison_text import show_comparison
from reports.report import Report
from reports.runs import read_run
from reports.text import show_report

ALLOWED = (InputError, WorkError, ArchiveError)
DEMO = demo_files()


@dataclasses.dataclass(frozen=True)
class Kind:
    """Files, of which one is damaged at a time, and what reads them."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    damage: str = "*"


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None  # type: ignore[func-returns-value]


def plan_text() -> str:
    from bertbench.hardware.accelerators import find_accelerator
    from bertbench.hardware.step_time import gpu_rates

    card = find_accelerator("rtx-2080")
    workload = published_workload("bert-base", 128)
    plan = make_plan(
        PlanRequest(32), workload, PlannedDevice("g", "gpu", card.usable_bytes, gpu_rates(card))
    )
    return json.dumps(plan.to_json())


def probe_text() -> str:
    cell = {
        "model": "bert-tiny", "seq_len": 64, "head": "squad", "levers": Levers().to_json(),
        "trials": [fits(300).to_json(), oom(301).to_json()],
        "certificate": {"fits": fits(300).to_json(), "oom": oom(301).to_json()},
    }  # fmt: skip
    return json.dumps(
        {
            "device": {**CPU.to_json(), "budget_bytes": 512 * MIB_BYTES},
            "versions": VERSIONS,
            "cells": [cell],
        }
    )


def compiled_probe_text() -> str:
    memory = CompiledMemory(52_448_384, 980, 10_000_000, 0)
    sides = [Compilation(batch, COMPILED, memory).to_json() for batch in (7, 8)]
    cell = {
        "model": "bert-tiny", "seq_len": 64, "head": "squad", "levers": Levers(xla=True).to_json(),
        "max_batch": 7, "evidence": "compiled", "fits": sides[0], "exceeds": sides[1],
        "compilations": sides,
    }  # fmt: skip
    target = {"kind": "gpu", "name": "t4", "description": "", "replicas": 1}
    return json.dumps(
        {"compiled_for": target, "budget_bytes": 512 * MIB_BYTES, "versions": {}, "cells": [cell]}
    )


def read_compiled_probe(folder: Path) -> None:
    def compile_(step: TrainingStep, target: CompileTarget) -> Compilation:
        memory = CompiledMemory(52_448_384, 980, 60_000_000 * step.micro_batch, 0)
        return Compilation(step.micro_batch, COMPILED, memory)

    target, budget_bytes, claims = read_compiled_claims(folder / "p.json")
    for claim in claims:
        check_compiled(claim, target, budget_bytes, compile_)


def squad_text() -> str:
    data = json.loads(DEMO.squad_train.read_text())["data"][:1]
    return json.dumps({"version": "1.1", "data": data})


def read_probe(folder: Path) -> None:
    path = folder / "p.json"
    with contextlib.suppress(InputError):
        read_claims(path)
    cells = read_either(path)
    show_comparison(str(path), str(path), compare_cells(cells, cells))


def make_run(folder: Path) -> None:
    levers = Levers().to_json()
    squad_run(
        folder,
        labels=["no", "yes"],
        identity={"train_batch_size": 32, "num_train_steps": 9},
        invocations=[{"micro_batch": 8, "levers": levers}],
        steps_down=[
            {"at": "now", "device": "cpu", "step": 3, "budget_bytes": 1 << 30, "message": "OOM",
             "from": {"micro_batch": 8, **levers}, "to": {"micro_batch": 4, **levers}}
        ],
    )  # fmt: skip
    steps = [
        {"step": n, "loss": 2.0 / n, "learning_rate": 0.1, "gradient_norm": 1.5, "seconds": 0.25}
        for n in range(1, 10)
    ]
    lines = "".join(json.dumps(step) + "\n" for step in steps)
    (folder / "run" / "train_log.jsonl").write_text(lines)
    (folder / "run" / "eval_log.jsonl").write_text('{"step": 3, "f1": 0.5}\n{"step": 9, "f1": 1}\n')


def read_run_folder(folder: Path) -> None:
    from datetime import datetime, timezone

    from reports.page import build_page

    with contextlib.suppress(InputError):
        read_trained_head(folder / "run")
    for values in recorded_steps_down(folder / "run"):
        with contextlib.suppress(InputError):
            step_down_from_json(values, published_workload("bert-tiny", 64))
    run = read_run(folder / "run")
    report = Report(folder / "l", [], [run], 32, datetime.now(timezone.utc))
    show_report(report)
    json.dumps(run.summary(), allow_nan=False)
    if random.random() < 0.1:  # it takes half a second
        assert "<script>alert" not in build_page(report)


def invoke(*arguments: object) -> None:
    """A command in this process; what it prints goes through the test's standard output."""
    with contextlib.suppress(SystemExit):
        cli.main([str(argument) for argument in arguments], "bertbench", standalone_mode=False)


def eval_files(folder: Path) -> None:
    run = squad_run(folder)
    (folder / "odds.json").write_bytes((run / "null_odds.json").read_bytes())
    answers = {"a": "Paris", "b": "Milan", "c": "", "d": "Oslo"}
    (folder / "predictions.json").write_text(json.dumps(answers))
    shutil.rmtree(run)


def make_cache(folder: Path) -> None:
    arrays = {"ids": np.arange(40, dtype=np.int32).reshape(10, 4), "none": np.empty((0, 3))}
    load_or_make(folder / "cache", hash_key(a=1), lambda: ([arrays], {"lost": [1]}))


def read_cache(folder: Path) -> None:
    arrays = {"ids": np.arange(40, dtype=np.int32).reshape(10, 4), "none": np.empty((0, 3))}
    entry = load_or_make(folder / "cache", hash_key(a=1), lambda: ([arrays], {"lost": [1]}))
    for array in entry.arrays.values():
        assert array.sum() is not None
    dict(entry.extra)


def make_tar(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with tarfile.open(folder / f"a.tar{kind}", f"w{kind.replace('.', ':')}") as archive:
            for name in ("a/one", "a/two", "a/" + "long" * 40):
                info = tarfile.TarInfo(name)
                content = name.encode() * 50
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))

    return make


def make_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/one", "a/two", "a/three"):
            archive.writestr(name, name * 50)


def read_archive(folder: Path) -> None:
    (archive,) = folder.glob("a.*")
    unpack(archive, folder / "out")


def make_ledger(folder: Path) -> None:
    with open_ledger(folder / "l.sqlite") as ledger:
        for batch in (3, 4, 5):
            budget = Budget(CPU, 512 * MIB_BYTES)
            trial = fits(batch) if batch < 5 else oom(batch)
            setup = Setup(published_workload("bert-tiny", 64))
            record(ledger, Question(budget, setup, json.dumps(VERSIONS)), trial)


def read_ledger_file(folder: Path) -> None:
    path = folder / "l.sqlite"
    invoke("ledger", "list", "--ledger", path)
    invoke("ledger", "list", "--trials", "--ledger", path)
    invoke("report", "--ledger", path)
    for suffix in ("csv", "json"):
        invoke("ledger", "export", folder / f"x.{suffix}", "--force", "--ledger", path)


def read_recording(folder: Path) -> None:
    # Its texts have a kind of error of their own, which every reader knows.
    with contextlib.suppress(ValueError):
        recording = recording_from_text((folder / "r").read_bytes().decode("latin-1"))
        replay(recording.events, recording.sizes, Memory((1 << 20,)))


def safetensors_file() -> bytes:
    header = {
        name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [24 * n, 24 * n + 24]}
        for n, name in enumerate(("bert.embeddings.word_embeddings.weight", "classifier.weight"))
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + np.arange(12, dtype=np.float32).tobytes()


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "C64", "I32", "BOOL"])
def test_weights_of_a_type_that_is_none(tmp_path: Path, kind: str) -> None:
    data = safetensors_file()
    path = tmp_path / "model.safetensors"
    size = {"F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "C64": 8}.get(kind, 4)
    header = {"pooler.dense.bias": {"dtype": kind, "shape": [4], "data_offsets": [0, 4 * size]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[: 4 * size])
    shapes, read = open_safetensors(path)
    assert shapes == {"bert/pooler/dense/bias": (4,)}
    with pytest.raises(InputError, match=rf"pooler.dense.bias is of type {kind}, not one of F64"):
        read("bert/pooler/dense/bias")


def read_safetensors(folder: Path) -> None:
    shapes, read = open_safetensors(folder / "model.safetensors")
    for name in shapes:
        np.asarray(read(name), np.float32)


TRIVIA = {
    "Data": [
        {
            "QuestionId": "q1", "Question": "Who?", "QuestionSource": "x",
            "Answer": {"Value": "Bob", "NormalizedAliases": ["bob"], "Aliases": ["Bob"]},
            "EntityPages": [{"Filename": "a.txt", "Title": "A", "DocSource": "Search"}],
            "SearchResults": [],
        }
    ],
    "Domain": "Wikipedia", "Split": "dev", "VerifiedEval": False, "Version": 1.0,
}  # fmt: skip
TABLE = TableTask({}, "text")
ROWS = {
    "tsv": "text\tlabel\na\t0\nb\t1\n",
    "csv": 'text,label\n"a, b",0\nb,1\n',
    "jsonl": '{"text": "a", "label": 0}\n{"text": "b", "label": 1.5}\n',
}
RECORDING = Recording((0, 1, ~0, 2, ~1, ~2), (256, 1000, 4096), ("a", "", "b"))


def make_model_folder(folder: Path) -> None:
    write_json(folder / "config.json", {**MODEL, "id2label": {"0": "no", "1": "yes"}})
    write_json(folder / "tokenizer.json", tokenizer_json())
    write_json(folder / "tokenizer_config.json", {"do_lower_case": True, "model_max_length": 512})
    write_json(folder / "special_tokens_map.json", {"cls_token": "[CLS]"})
    write_json(folder / "added_tokens.json", {"[MASK]": 4})


def read_model_folder(folder: Path) -> None:
    files = find_model_files(folder, None, None, None)
    read_config_values(folder)
    from_json_file(files.config_file)
    find_tokenizer(files, {}).tokenizer.encode_ids("Ich mochte 中国")


def make_state(folder: Path) -> None:
    for step in (3, 4):
        for suffix in ("index", "data-00000-of-00001"):
            (folder / f"model.ckpt-{step}.{suffix}").write_bytes(b"")
    name = "model.ckpt-4"
    text = f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n'
    (folder / "checkpoint").write_text(text)


def read_state(folder: Path) -> None:
    for prefix in preferred_checkpoints(folder):
        assert prefix.parent == folder  # nothing outside the folder is opened


KINDS: dict[str, Kind] = {
    "plan": Kind(text("plan.json", plan_text()), lambda f: read_plan(f / "plan.json")),
    "configuration": Kind(
        text("c.json", DEMO.bert_config_file.read_bytes()), lambda f: from_json_file(f / "c.json")
    ),
    "vocabulary": Kind(
        text("vocab.txt", DEMO.vocab_file.read_bytes()),
        lambda f: load_tokenizer(f / "vocab.txt", do_lower_case=True),
    ),
    "model folder": Kind(make_model_folder, read_model_folder),
    "state": Kind(make_state, read_state, "checkpoint"),
    "probe": Kind(text("p.json", probe_text()), read_probe),
    "compiled probe": Kind(text("p.json", compiled_probe_text()), read_compiled_probe),
    "run": Kind(make_run, read_run_folder, "run/*"),
    "eval": Kind(
        eval_files,
        lambda f: invoke(
            "eval",
            "squad",
            f / "dev.json",
            f / "predictions.json",
            "--na-prob-file",
            f / "odds.json",
            "--json",
            f / "out",
        ),
    ),
    "squad": Kind(
        text("s.json", squad_text()),
        lambda f: read_squad(f / "s.json", is_training=True, version_2_with_negative=False),
    ),
    "glue": Kind(
        text("train.tsv", b"\n".join((DEMO.mrpc_dir / "train.tsv").read_bytes().split(b"\n")[:15])),
        lambda f: read_examples(find_task("MRPC"), f, "train"),
    ),
    **{
        suffix: Kind(
            text(f"t.{suffix}", rows),
            lambda f, name=f"t.{suffix}": read_table_task(  # type: ignore[misc]
                dataclasses.replace(TABLE, files={"train": f / name})
            ),
        )
        for suffix, rows in ROWS.items()
    },
    "triviaqa": Kind(text("q.json", json.dumps(TRIVIA)), lambda f: read_triviaqa(f / "q.json")),
    "cache": Kind(make_cache, read_cache, "cache/*/*"),
    "zip": Kind(make_zip, read_archive),
    **{kind: Kind(make_tar(kind), read_archive) for kind in (".gz", ".bz2", ".xz")},
    "sums": Kind(
        text("SUMS", f"{'0' * 64}  a\n{'1' * 64}  b/c\n"), lambda f: read_sums(f / "SUMS")
    ),
    "ledger": Kind(make_ledger, read_ledger_file),
    "recording": Kind(text("r", recording_to_text(RECORDING)), read_recording),
    "safetensors": Kind(text("model.safetensors", safetensors_file()), read_safetensors),
}


def try_mutations(name: str, count: int, folder: Path) -> list[str]:
    """What went wrong, a line for each mutation."""
    kind, draw, wrong = KINDS[name], random.Random(f"{name} {count}"), []
    random.seed(name)
    whole = folder / "whole"
    whole.mkdir()
    kind.make(whole)
    for number in range(count):
        place = folder / "one"
        shutil.copytree(whole, place)
        if name == "run":  # its record names the data's place
            record_path = place / "run" / "run.json"
            record_path.write_text(record_path.read_text().replace(str(whole), str(place)))
        damaged = draw.choice(sorted(path for path in place.glob(kind.damage) if path.is_file()))
        damaged.write_bytes(mutated(damaged.read_bytes(), draw))
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                kind.read(place)
        except ALLOWED as error:
            if "\n" in str(error):
                wrong.append(f"{number}: {error!r} is more than a line")
        except Exception as error:  # noqa: BLE001
            wrong.append(f"{number}: {damaged.name}: {error!r:.200}")
        odd = {c for c in out.getvalue() if not c.isprintable() and c != "\n"}
        if odd:
            wrong.append(f"{number}: {damaged.name}: printed {odd}")
        shutil.rmtree(place)
    return wrong


COUNTS = [
    pytest.param(30, id="30"),
    pytest.param(300, id="300", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", KINDS)
def test_no_damage_ends_in_a_traceback(
    name: str, count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Warnings name what is in the files; pytest-xdist cannot pass on text that is not Unicode.
    caplog.set_level(logging.CRITICAL)
    wrong = try_mutations(name, count, tmp_path)
    assert not wrong, "\n".join([f"{len(wrong)} of {count}", *wrong[:20]])


def test_every_kind_is_read_when_it_is_whole(tmp_path: Path) -> None:
    for name, kind in KINDS.items():
        folder = tmp_path / name
        folder.mkdir()
        kind.make(folder)
        kind.read(folder)


def test_a_damaged_row_does_not_hide_the_others(tmp_path: Path) -> None:
    make_ledger(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "l.sqlite")) as ledger, ledger:
        ledger.execute("UPDATE trials SET levers_key = '[' WHERE batch = 4")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        invoke("ledger", "list", "--trials", "--ledger", tmp_path / "l.sqlite")
    assert "512 MiB" in out.getvalue() or "fits" in out.getvalue()
