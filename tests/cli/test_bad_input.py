"""Files that are broken or strange: a clear error or the exact meaning, never a crash."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.tasks.demo_data import demo_files
from finetune.tasks.glue import find_task, read_examples
from finetune.tasks.squad_examples import read_squad
from finetune.tasks.squad_features import featurize
from finetune.tasks.squad_predictions import AnswerSettings, predict_answers
from finetune.text.tokenization import UNCASED, Tokenizer, load_tokenizer
from helpers.command_line import bertbench, fails_with_one_line, squad_arguments

SOURCE = demo_files().squad_train.read_bytes()
ODD_VALUES: list[Any] = [
    None, 1, -1, 10**9, 1.5, True, "", "x", "\0", "\ud800", [], {}, [1], {"a": 1}, float("inf"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(demo_files().vocab_file, do_lower_case=True)


@pytest.fixture(scope="module", autouse=True)
def without_warnings() -> Iterator[None]:
    """Hundreds of damaged files would each warn of skipped answers."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "file"


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [place for key in keys for place in [(node, key), *places(node[key])]]


def use_squad(path: Path, tokenizer: Tokenizer, version_2: bool) -> None:
    """Read and featurize for both purposes; only an InputError of one line may come of it."""
    for is_training in (True, False):
        try:
            examples = read_squad(path, is_training=is_training, version_2_with_negative=version_2)
            featurize(
                examples, tokenizer, max_seq_length=48, doc_stride=16, max_query_length=16,
                is_training=is_training,
            )  # fmt: skip
        except InputError as error:
            # Whether there is an error depends on the damage, so it cannot be expected.
            assert "\n" not in str(error)  # noqa: PT017
            assert str(path) in str(error)  # noqa: PT017


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_any_damage_to_squad_files(
    scratch: Path, tokenizer: Tokenizer, data: st.DataObject
) -> None:
    if data.draw(st.booleans(), label="bytes"):
        damaged = bytearray(SOURCE[: data.draw(st.integers(0, len(SOURCE)), label="cut")])
        for _ in range(data.draw(st.integers(0, 3))):
            if damaged:
                place = data.draw(st.integers(0, len(damaged) - 1))
                damaged[place] = data.draw(st.integers(0, 255))
        scratch.write_bytes(damaged)
    else:
        root = json.loads(SOURCE)
        for _ in range(data.draw(st.integers(1, 3))):
            everywhere = places(root)
            if not everywhere:
                break
            node, key = data.draw(st.sampled_from(everywhere))
            if data.draw(st.booleans()):
                node[key] = copy.deepcopy(data.draw(st.sampled_from(ODD_VALUES)))
            else:
                del node[key]
        scratch.write_text(json.dumps(root))
    use_squad(scratch, tokenizer, data.draw(st.booleans(), label="version 2"))


@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_as_glue_files(tmp_path_factory: pytest.TempPathFactory, data: bytes,
                                 with_header: bool) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("glue")
    header = b"Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" if with_header else b""
    (folder / "train.tsv").write_bytes(header + data)
    try:
        examples = read_examples(find_task("MRPC"), folder, "train")
    except InputError as error:
        assert str(folder / "train.tsv") in str(error)  # noqa: PT017
        return
    # Whatever was accepted is what the file says.
    for index, line in enumerate(data.decode().removesuffix("\n").split("\n")):
        cells = line.removesuffix("\r").split("\t")
        assert examples.texts_a[index] == cells[3]
        assert examples.label_ids[index] == int(cells[0])


def squad_json(*paragraphs: tuple[str, list[dict[str, Any]]]) -> str:
    return json.dumps(
        {"data": [{"paragraphs": [{"context": c, "qas": qas} for c, qas in paragraphs]}]}
    )


def question(qas_id: str, answer: str = "", start: int = 0, **more: Any) -> dict[str, Any]:
    answers = [{"text": answer, "answer_start": start}] if answer else []
    return {"id": qas_id, "question": "what is it?", "answers": answers, **more}


def test_answers_that_are_not_where_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(
        squad_json(
            ("The red fox ran.", [
                question("right", "red fox", 4),
                question("shifted", "red fox", 12),
                question("outside", "red fox", 400),
                question("negative", "red fox", -3),
                question("other", "blue fox", 4),
            ]),
        )
    )  # fmt: skip
    examples = read_squad(path, is_training=True, version_2_with_negative=False)
    assert [example.qas_id for example in examples] == ["right"]
    assert [s.qas_id for s in examples.skipped] == ["shifted", "outside", "negative", "other"]


def test_empty_contexts_have_no_windows_and_no_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "x.json"
    path.write_text(squad_json((" \n ", [question("none")]), ("a fox", [question("some")])))
    examples = read_squad(path, is_training=False, version_2_with_negative=False)
    features = featurize(
        examples, tokenizer, max_seq_length=32, doc_stride=8, max_query_length=8, is_training=False
    )
    assert features.example_index.tolist() == [1]
    logits = np.zeros((1, 32))
    for version_2, expected in ((False, "empty"), (True, "")):
        predictions = predict_answers(
            examples,
            features,
            logits,
            logits,
            UNCASED,
            AnswerSettings(version_2_with_negative=version_2),
        )
        assert predictions.predictions["none"] == expected


def test_a_context_of_a_hundred_thousand_characters(tmp_path: Path, tokenizer: Tokenizer) -> None:
    context = "fox ran " * 12_500 + "the last word"
    start = len(context) - len("last word")
    path = tmp_path / "x.json"
    path.write_text(squad_json((context, [question("q", "last word", start)])))
    examples = read_squad(path, is_training=True, version_2_with_negative=False)
    features = featurize(
        examples, tokenizer, max_seq_length=384, doc_stride=128, max_query_length=64,
        is_training=True,
    )  # fmt: skip
    assert len(features) > 190
    found = np.flatnonzero(features.start_positions)
    for row in found:
        first, last = features.start_positions[row], features.end_positions[row]
        tokens = features.tokens(int(row))[first : last + 1]
        assert "".join(tokens).replace("##", "") == "lastword"
    assert found.max() == len(features) - 1
    # One word of that length is a single unknown token.
    path.write_text(squad_json(("x" * 100_000, [question("q")])))
    examples = read_squad(path, is_training=False, version_2_with_negative=False)
    features = featurize(
        examples, tokenizer, max_seq_length=384, doc_stride=128, max_query_length=64,
        is_training=False,
    )  # fmt: skip
    assert len(features) == 1
    assert features.tokens(0)[-2] == "[UNK]"


def test_runs_end_with_one_line(tmp_path: Path) -> None:
    output = tmp_path / "out"
    empty, latin = (tmp_path / name for name in ("empty.json", "latin.json"))
    empty.write_text(squad_json(("", [question("q")])))
    latin.write_bytes(squad_json(("caf\u00e9", [])).encode().replace(b"\\u00e9", b"\xe9"))
    for path, word in (
        (empty, "empty"),
        (latin, "not UTF-8 text"),
        (tmp_path, "cannot read"),
    ):
        for flag in ("--predict_file", "--train_file"):
            result = bertbench(*squad_arguments(output, flag, path))
            fails_with_one_line(result, str(path))
            if flag == "--predict_file":
                assert word in result.stderr, result.stderr
    assert not output.exists()
    (tmp_path / "occupied").write_text("")
    result = bertbench(
        *squad_arguments(tmp_path / "occupied", "--predict_file", demo_files().squad_dev)
    )
    fails_with_one_line(result, "not a folder")
