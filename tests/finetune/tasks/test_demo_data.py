"""The embedded demo: consistent with itself, and found from an installed wheel."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.errors import InputError
from finetune.spec.config import from_json_file
from finetune.tasks import demo_data
from finetune.tasks.classification import featurize
from finetune.tasks.demo_data import demo_file, demo_files
from finetune.tasks.glue import find_task, read_examples
from finetune.tasks.squad_examples import read_squad
from finetune.text.tokenization import Tokenizer, load_tokenizer

DEMO = demo_files()
MRPC = find_task("MRPC")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO.vocab_file, do_lower_case=True)


def paragraphs(path: Path) -> list[dict[str, Any]]:
    data = json.loads(path.read_text(encoding="utf-8"))["data"]
    return [paragraph for article in data for paragraph in article["paragraphs"]]


def questions(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(p["context"], qa) for p in paragraphs(path) for qa in p["qas"]]


def all_texts() -> Iterator[str]:
    for path in (DEMO.squad_train, DEMO.squad_dev):
        for paragraph in paragraphs(path):
            yield paragraph["context"]
        for _, qa in questions(path):
            yield qa["question"]
            yield from (answer["text"] for answer in qa["answers"])
    for split in ("train", "dev", "test"):
        examples = read_examples(MRPC, DEMO.mrpc_dir, split)
        yield from examples.texts_a
        yield from examples.texts_b or ()


class TestLocation:
    def test_paths_are_inside_the_package(self) -> None:
        folder = Path(finetune.__file__).parent / "tasks" / "demo"
        for path in dataclasses.astuple(DEMO):
            assert path.exists()
            assert path.is_relative_to(folder)
        assert demo_file("MRPC/dev.tsv").is_file()

    def test_what_is_missing_is_named(self) -> None:
        with pytest.raises(InputError, match=r"no-such\.txt: the demo data is incomplete"):
            demo_file("no-such.txt")

    def test_the_wheel_ships_every_file(self) -> None:
        """The globs of the package data match all files, in the folder and below it."""
        tomllib = pytest.importorskip("tomllib", reason="in the standard library since 3.11")
        root = Path(finetune.__file__).parent
        project = root.parent / "pyproject.toml"
        if not project.is_file():
            pytest.skip("an installed package has no pyproject.toml")
        settings = tomllib.loads(project.read_text())["tool"]["setuptools"]
        shipped = {p for glob in settings["package-data"]["finetune"] for p in root.glob(glob)}
        files = {path for path in (root / "tasks" / "demo").rglob("*") if path.is_file()}
        assert len(files) == 7
        assert files <= shipped

    def test_found_whatever_the_working_directory(self, tmp_path: Path) -> None:
        code = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from finetune.tasks.demo_data import demo_files\n"
            "assert 'tensorflow' not in sys.modules\n"
            "print(demo_files().vocab_file.is_file())"
        )
        root = Path(demo_data.__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", code, str(root)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "True\n"


class TestSquad:
    @pytest.mark.parametrize(
        ("path", "count", "references"), [(DEMO.squad_train, 40, 1), (DEMO.squad_dev, 13, 3)]
    )
    def test_answers_are_where_they_say(self, path: Path, count: int, references: int) -> None:
        assert len(questions(path)) == count
        for context, qa in questions(path):
            assert len(qa["answers"]) == references
            for answer in qa["answers"]:
                start, text = answer["answer_start"], answer["text"]
                assert text
                assert context[start : start + len(text)] == text, qa["id"]
                # Whole words: an offset inside another word would be the wrong occurrence.
                before, after = context[start - 1 : start], context[start + len(text) :][:1]
                assert not before.isalnum(), qa["id"]
                assert not after.isalnum(), qa["id"]

    def test_ids_are_distinct_and_dev_paragraphs_are_new(self) -> None:
        both = questions(DEMO.squad_train) + questions(DEMO.squad_dev)
        assert len({qa["id"] for _, qa in both}) == len(both)
        train = {paragraph["context"] for paragraph in paragraphs(DEMO.squad_train)}
        assert not train & {paragraph["context"] for paragraph in paragraphs(DEMO.squad_dev)}

    @pytest.mark.parametrize("path", [DEMO.squad_train, DEMO.squad_dev])
    def test_windows(self, tokenizer: Tokenizer, path: Path) -> None:
        """Most examples are one window at 128 tokens; every paragraph is several at 64."""
        one_window = 0
        for context, qa in questions(path):
            assert 60 <= len(context.split()) <= 110
            length = len(tokenizer.tokenize(context)) + len(tokenizer.tokenize(qa["question"])) + 3
            assert length > 64
            one_window += length <= 128
        assert one_window > 0.7 * len(questions(path))

    @pytest.mark.parametrize(("path", "count"), [(DEMO.squad_train, 40), (DEMO.squad_dev, 13)])
    def test_the_reader_takes_all_of_it(self, path: Path, count: int) -> None:
        training = path == DEMO.squad_train
        read = read_squad(path, is_training=training, version_2_with_negative=False)
        assert len(read) == count
        assert not read.skipped


class TestMrpc:
    @pytest.mark.parametrize(("split", "count"), [("train", 40), ("dev", 12)])
    def test_labelled_splits_are_balanced(self, split: str, count: int) -> None:
        examples = read_examples(MRPC, DEMO.mrpc_dir, split)  # type: ignore[arg-type]
        assert len(examples) == count
        assert examples.label_ids.sum() == count // 2

    @pytest.mark.parametrize("split", ["train", "dev", "test"])
    def test_holds_an_unbalanced_quote(self, split: str) -> None:
        examples = read_examples(MRPC, DEMO.mrpc_dir, split)  # type: ignore[arg-type]
        opened = [text for text in examples.texts_a if text.startswith('"')]
        assert any(text.count('"') == 1 for text in opened)

    def test_test_split(self) -> None:
        examples = read_examples(MRPC, DEMO.mrpc_dir, "test")
        assert len(examples) == 6
        assert not examples.has_labels

    def test_every_pair_fits_in_64_tokens(self, tokenizer: Tokenizer) -> None:
        examples = read_examples(MRPC, DEMO.mrpc_dir, "train")
        features = featurize(examples, tokenizer, max_seq_length=64)
        assert (features.input_mask[:, -1] == 0).all()


class TestVocabulary:
    def test_matches_the_model(self, tokenizer: Tokenizer) -> None:
        config = from_json_file(DEMO.bert_config_file)
        assert tokenizer.vocab_size == len(tokenizer.vocab) == config.vocab_size
        assert 1000 <= config.vocab_size <= 1500
        assert config.max_position_embeddings == 128

    def test_begins_as_berts_does(self) -> None:
        tokens = DEMO.vocab_file.read_text(encoding="utf-8").split("\n")
        assert tokens.pop() == ""
        assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        kinds = [
            0 if len(t) == 1 else 1 if t.startswith("##") and len(t) == 3 else 2 for t in tokens[5:]
        ]
        # Single characters, then their continuations, then longer entries.
        assert kinds == sorted(kinds)
        assert kinds.count(0) == kinds.count(1)

    @pytest.mark.parametrize("do_lower_case", [True, False])
    def test_spells_every_text(self, do_lower_case: bool) -> None:
        tokenizer = load_tokenizer(DEMO.vocab_file, do_lower_case=do_lower_case)
        for text in all_texts():
            assert "[UNK]" not in tokenizer.tokenize(text), text

    def test_has_words_of_one_and_of_several_pieces(self, tokenizer: Tokenizer) -> None:
        tokens = [token for text in all_texts() for token in tokenizer.tokenize(text)]
        continued = sum(token.startswith("##") for token in tokens)
        assert 0 < continued < 0.1 * len(tokens)
