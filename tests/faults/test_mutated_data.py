"""Hundreds of damaged data files of each kind: what they say, or one line; never a traceback."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from bertbench.cli.eval import command
from finetune.errors import InputError
from finetune.tasks import classification
from finetune.tasks.classification_metrics import evaluate
from finetune.tasks.demo_data import demo_files
from finetune.tasks.glue import find_task, read_examples
from finetune.tasks.squad_examples import read_squad
from finetune.tasks.squad_features import featurize
from finetune.tasks.squad_predictions import AnswerSettings, predict_answers, write_predictions
from finetune.tasks.table_files import TableTask, read_table_task
from finetune.tasks.triviaqa import read_triviaqa
from finetune.text.tokenization import UNCASED, Tokenizer, load_tokenizer
from reports.pictures.squad_plots import _bin_edges

ODD_BYTES = [
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b"\t", b'"', b",",
    b"'", b"\\", b"{", b"]", b"NaN", b"1e999", b"-0", b"9" * 30, b"9" * 5000, b"\xe2\x80\xa8",
    b"\xc2\xa0", b"\xe2\x80\xaf", b"\xf0\x9f\x98\x80", b"null", b"\x1a", b"[" * 3000,
]  # fmt: skip
ODD_VALUES: list[Any] = [
    None, True, 0, -1, 7, 10**15, 10**30, -(10**400), 1.5, 1e308, -1e308, 5e-324, float("nan"),
    float("inf"), "", " ", "x" * 300, "\0", "\ud800", "\u2028", "\x1b[31m", [], {}, [[]], {"a": 1},
    "1", "nan",
]  # fmt: skip


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [place for key in keys for place in [(node, key), *places(node[key])]]


def spoil_json(draw: random.Random, root: Any) -> Any:
    """Put odd values, or nothing, in one to three places; now and then repeat or shuffle."""
    for _ in range(draw.randint(1, 3)):
        everywhere = places(root)
        if not everywhere:
            break
        node, key = draw.choice(everywhere)
        how = draw.randrange(4)
        if how == 0:
            del node[key]
        elif how == 1 and isinstance(node, list):
            node.insert(key, json.loads(json.dumps(node[key])))
        else:
            node[key] = json.loads(json.dumps(draw.choice(ODD_VALUES)))
    return root


def spoil_bytes(draw: random.Random, data: bytes) -> bytes:
    """Cut, change, insert, repeat or drop pieces."""
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randint(0, len(data)), draw.randint(1, 20)
        how = draw.randrange(5)
        if how == 0:
            data = data[:at]
        elif how == 1:
            data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
        elif how == 2:
            data = data[:at] + draw.choice(ODD_BYTES) + data[at:]
        elif how == 3:
            data = data[:at] + data[at : at + length] + data[at:]
        else:
            data = data[:at] + data[at + length :]
    return data


def spoil(draw: random.Random, data: bytes, kind: str) -> bytes:
    if kind == "json" and draw.random() < 0.7:
        return json.dumps(spoil_json(draw, json.loads(data))).encode()
    if kind == "jsonl" and draw.random() < 0.7:
        rows = spoil_json(draw, [json.loads(line) for line in data.splitlines()])
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "lines" and draw.random() < 0.5:
        lines = data.split(b"\n")
        number = draw.randrange(len(lines))
        cells = lines[number].split(b"\t" if b"\t" in data else b",")
        cells[draw.randrange(len(cells))] = draw.choice([*ODD_BYTES, b"", b" ", b"nan", b"01"])
        lines[number] = (b"\t" if b"\t" in data else b",").join(cells)
        return b"\n".join(lines)
    return spoil_bytes(draw, data)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(demo_files().vocab_file, do_lower_case=True)


@pytest.fixture(autouse=True)
def without_warnings() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def first_questions() -> bytes:
    """Three paragraphs of the demo, so that damage is met."""
    root = json.loads(demo_files().squad_dev.read_text(encoding="utf-8"))
    entry = root["data"][0]
    entry["paragraphs"] = entry["paragraphs"][:3]
    for paragraph in entry["paragraphs"]:
        for qa in paragraph["qas"]:
            qa["answers"] = qa["answers"][:1]
            qa["is_impossible"] = False
    return json.dumps({"data": [entry]}).encode()


QUESTIONS = first_questions()
IDS = [
    qa["id"]
    for paragraph in json.loads(QUESTIONS)["data"][0]["paragraphs"]
    for qa in paragraph["qas"]
]
TABLE = [("a dog", "a cat", "yes"), ("two, dogs", "none", "no"), ('a "fox"', "", "yes")] * 2


def use_squad(path: Path, tokenizer: Tokenizer) -> None:
    for is_training in (True, False):
        for version_2 in (True, False):
            examples = read_squad(path, is_training=is_training, version_2_with_negative=version_2)
            features = featurize(
                examples, tokenizer, max_seq_length=48, doc_stride=16, max_query_length=16,
                is_training=is_training,
            )  # fmt: skip
            if not is_training:
                logits = np.zeros(features.input_ids.shape)
                answers = predict_answers(
                    examples,
                    features,
                    logits,
                    logits,
                    UNCASED,
                    AnswerSettings(version_2_with_negative=version_2),
                )
                write_predictions(answers, path.parent / "predicted")
                for written in (path.parent / "predicted").iterdir():
                    json.loads(written.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def use_eval(*files: Path, pictures: bool = False) -> None:
    more = ["--na_prob_file", str(files[2])] if len(files) > 2 else []
    if pictures:
        more += ["--out_image_dir", str(files[0].parent / "pictures")]
    result = CliRunner().invoke(
        command, ["squad", "--version", "2.0" if more else "1.1", *map(str, files[:2]), *more]
    )
    if result.exception is not None:
        raise result.exception


def use_classification(data: Any, tokenizer: Tokenizer) -> None:
    for examples in data.splits.values():
        features = classification.featurize(examples, tokenizer, max_seq_length=16)
        if features.label_values is not None:
            assert np.isfinite(features.label_values).all()
            evaluate(data.metrics, features.label_values, np.zeros(len(features)))
        else:
            evaluate(data.metrics, features.label_ids, np.zeros(len(features), np.int32))
            assert features.label_ids.max() < len(data.labels)


def use_table(path: Path, tokenizer: Tokenizer) -> None:
    for labels in (None, ("no", "yes")):
        task = TableTask({"train": path, "test": path}, "one", "two", "label", labels)
        use_classification(read_table_task(task), tokenizer)


def use_numbers(path: Path, tokenizer: Tokenizer) -> None:
    task = TableTask({"train": path}, "one", "two", "score", is_regression=True)
    use_classification(read_table_task(task), tokenizer)


def use_glue(name: str) -> Callable[[Path, Tokenizer], None]:
    def use(path: Path, tokenizer: Tokenizer) -> None:
        task = find_task(name)
        examples = read_examples(task, path.parent, path.stem)
        data = classification.ClassificationData(
            task.name, task.labels, task.metrics, {path.stem: examples}
        )
        use_classification(data, tokenizer)

    return use


def use_vocabulary(path: Path, tokenizer: Tokenizer) -> None:
    damaged = load_tokenizer(path, do_lower_case=True)
    damaged.encode_batch(["a dog ran", "\ud800 \0", "[CLS]"])


def use_predictions(path: Path, tokenizer: Tokenizer) -> None:
    (path.parent / "data.json").write_bytes(QUESTIONS)
    use_eval(path.parent / "data.json", path)


def use_odds(path: Path, tokenizer: Tokenizer) -> None:
    (path.parent / "data.json").write_bytes(QUESTIONS)
    (path.parent / "p.json").write_text(json.dumps(dict.fromkeys(IDS, "dog")))
    use_eval(path.parent / "data.json", path.parent / "p.json", path)


def use_evaluated(path: Path, tokenizer: Tokenizer) -> None:
    (path.parent / "p.json").write_text(json.dumps(dict.fromkeys([*IDS, "7", "1.5"], "dog")))
    use_eval(path, path.parent / "p.json")


def trivia() -> bytes:
    answer = {"Value": "Fox", "Aliases": ["fox"], "NormalizedAliases": ["fox"]}
    data = [
        {"QuestionId": f"q{n}", "Question": "Who?", "Answer": answer, "SearchResults": [],
         "EntityPages": [{"Filename": "A.txt", "Title": "A"}]}
        for n in range(3)
    ]  # fmt: skip
    root = {"Data": data, "Domain": "Wikipedia", "Split": "train", "VerifiedEval": False}
    return json.dumps({**root, "Version": 1.0}).encode()


def table(suffix: str) -> bytes:
    if suffix == "jsonl":
        named = [
            {"one": a, "two": b, "label": c, "score": n / 2} for n, (a, b, c) in enumerate(TABLE)
        ]
        return "".join(json.dumps(row) + "\n" for row in named).encode()
    rows = [["one", "two", "label", "score"]]
    rows += [[*row, str(number / 2)] for number, row in enumerate(TABLE)]
    if suffix == "csv":
        rows = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in rows]
    between = "," if suffix == "csv" else "\t"
    return "".join(between.join(row) + "\n" for row in rows).encode()


MRPC = (
    b"Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + b'1\t1\t2\ta dog\tb "c\n0\t3\t4\tc\td\n' * 3
)
STSB = b"index\tgenre\tfile\tyear\told\ts1\ts2\tsentence1\tsentence2\tscore\n" + (
    b"0\tx\tf\t1\t1\tn\tn\ta dog\ta cat\t3.5\n1\tx\tf\t1\t1\tn\tn\ta\tb\t0.0\n" * 2
)
KINDS: dict[str, tuple[str, bytes, str, Callable[[Path, Tokenizer], None]]] = {
    "squad": ("x.json", QUESTIONS, "json", use_squad),
    "evaluated": ("x.json", QUESTIONS, "json", use_evaluated),
    "predictions": ("x.json", json.dumps(dict.fromkeys(IDS, "a dog")).encode(), "json",
                    use_predictions),
    "odds": ("x.json", json.dumps({i: n / 3 for n, i in enumerate(IDS)}).encode(), "json",
             use_odds),
    "mrpc": ("train.tsv", MRPC, "lines", use_glue("MRPC")),
    "sts-b": ("dev.tsv", STSB, "lines", use_glue("STS-B")),
    "cola": ("train.tsv", b"gj04\t1\t\tA dog.\ngj04\t0\t*\tDog a.\n" * 3, "lines",
             use_glue("CoLA")),
    "csv": ("x.csv", table("csv"), "lines", use_table),
    "tsv": ("x.tsv", table("tsv"), "lines", use_table),
    "jsonl": ("x.jsonl", table("jsonl"), "jsonl", use_table),
    "numbers": ("x.jsonl", table("jsonl"), "jsonl", use_numbers),
    "vocabulary": ("vocab.txt", demo_files().vocab_file.read_bytes(), "lines", use_vocabulary),
    "triviaqa": ("x.json", trivia(), "json", lambda path, tokenizer: read_triviaqa(path) and None),
}  # fmt: skip


@pytest.mark.parametrize("tries", [30, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_end_with_one_line(
    tmp_path: Path, tokenizer: Tokenizer, kind: str, tries: int
) -> None:
    name, data, form, use = KINDS[kind]
    path = tmp_path / name
    path.write_bytes(data)
    use(path, tokenizer)
    read = 0
    for seed in range(tries):
        path.write_bytes(spoil(random.Random(f"{kind}{seed}"), data, form))
        try:
            use(path, tokenizer)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
            str(error).encode()
        else:
            read += 1
    # Neither is all damage refused, nor none.
    assert 0 < read < tries


def test_pictures_of_any_odds(tmp_path: Path) -> None:
    data, predictions, odds = (tmp_path / name for name in ("d.json", "p.json", "o.json"))
    data.write_bytes(QUESTIONS)
    predictions.write_text(json.dumps(dict.fromkeys(IDS, "dog")))
    odds.write_text(json.dumps(dict.fromkeys(IDS, 1e16) | {IDS[0]: 1e16 + 2}))
    use_eval(data, predictions, odds, pictures=True)
    assert (tmp_path / "pictures" / "na_prob_hist_hasAns.png").is_file()
    odds.write_text(json.dumps(dict.fromkeys(IDS, -1e308) | {IDS[0]: 1e308}))
    with pytest.raises(InputError, match=r"1e\+308 cannot be drawn"):
        use_eval(data, predictions, odds, pictures=True)


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=5))
def test_bins_have_a_width_and_hold_all_odds(odds: list[float]) -> None:
    edges = _bin_edges(np.array(odds))
    assert (np.diff(edges) > 0).all()
    assert np.histogram(odds, edges)[0].sum() == len(odds)
