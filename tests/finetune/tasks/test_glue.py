"""Classification data: reading, features, metrics and result files."""

from __future__ import annotations

import csv
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.tasks.classification import (
    ClassificationExamples,
    featurize,
    truncated_lengths,
    write_eval_results,
    write_test_results,
)
from finetune.tasks.classification_metrics import evaluate
from finetune.tasks.glue import (
    TASKS,
    GlueTask,
    SplitFormat,
    find_task,
    read_examples,
    read_task,
)
from finetune.text.tokenization import Tokenizer, load_tokenizer

MRPC = find_task("MRPC")
COLA = find_task("CoLA")
HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", "##s")
CLS, SEP = 2, 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return load_tokenizer(path, do_lower_case=True)


def write_mrpc(folder: Path, *rows: str, split: str = "train") -> Path:
    path = folder / f"{split}.tsv"
    path.write_bytes((HEADER + "".join(row + "\n" for row in rows)).encode())
    return path


def examples_of(
    texts_a: Sequence[str], texts_b: Sequence[str] | None = None
) -> ClassificationExamples:
    n = len(texts_a)
    return ClassificationExamples(
        guids=tuple(f"train-{i}" for i in range(n)),
        texts_a=tuple(texts_a),
        texts_b=None if texts_b is None else tuple(texts_b),
        label_ids=np.arange(n, dtype=np.int32) % 2,
        has_labels=True,
    )


class TestFindTask:
    @pytest.mark.parametrize("name", ["mrpc", "MRPC", "Mrpc"])
    def test_case_does_not_matter(self, name: str) -> None:
        assert find_task(name).name == "MRPC"

    def test_an_unknown_task_lists_the_known_ones(self) -> None:
        with pytest.raises(InputError, match=r"'mrcp'.*CoLA, MNLI, MRPC"):
            find_task("mrcp")


class TestRead:
    def test_columns_and_names(self, tmp_path: Path) -> None:
        write_mrpc(tmp_path, "1\t10\t11\tone\ttwo", "0\t12\t13\tthree\tfour")
        examples = read_examples(MRPC, tmp_path, "train")
        assert examples.texts_a == ("one", "three")
        assert examples.texts_b == ("two", "four")
        assert examples.label_ids.tolist() == [1, 0]
        assert examples.label_ids.dtype == np.int32
        # The original numbers the lines, and the header is number 0.
        assert examples.guids == ("train-1", "train-2")

    def test_quotation_marks_are_text(self, tmp_path: Path) -> None:
        write_mrpc(tmp_path, '1\t1\t2\t"open\tb "" b', '0\t3\t4\tc\td"', '1\t5\t6\t"e"\t"')
        examples = read_examples(MRPC, tmp_path, "train")
        assert examples.texts_a == ('"open', "c", '"e"')
        assert examples.texts_b == ('b "" b', 'd"', '"')

    def test_only_line_feeds_end_a_line(self, tmp_path: Path) -> None:
        odd = "a\x0bb\x0cc\x1cd\x85e\u2028f\rg"
        write_mrpc(tmp_path, f"1\t1\t2\t{odd}\tb")
        assert read_examples(MRPC, tmp_path, "train").texts_a == (odd,)

    def test_windows_line_ends_and_byte_order_mark(self, tmp_path: Path) -> None:
        text = (HEADER + "1\t1\t2\té\tb\n0\t3\t4\tc\td").replace("\n", "\r\n")
        (tmp_path / "dev.tsv").write_bytes(text.encode("utf-8-sig"))
        examples = read_examples(MRPC, tmp_path, "dev")
        assert examples.texts_a == ("é", "c")
        assert examples.texts_b == ("b", "d")
        assert examples.guids[0] == "dev-1"

    def test_a_byte_order_mark_does_not_change_the_first_label(self, tmp_path: Path) -> None:
        layout = SplitFormat("x.tsv", columns=2, text_a=1, label=0, has_header=False)
        task = GlueTask("X", ("no", "yes"), train=layout, dev=layout, test=layout)
        (tmp_path / "x.tsv").write_bytes("yes\ta\n".encode("utf-8-sig"))
        assert read_examples(task, tmp_path, "train").label_ids.tolist() == [1]

    def test_cola_has_a_header_in_the_test_split_only(self, tmp_path: Path) -> None:
        (tmp_path / "train.tsv").write_text("gj04\t0\t*\tThey drank.\ngj04\t1\t\tA dog.\n")
        (tmp_path / "test.tsv").write_text("index\tsentence\n0\tBill slept.\n")
        train, test = (read_examples(COLA, tmp_path, split) for split in ("train", "test"))
        assert train.texts_a == ("They drank.", "A dog.")
        assert train.texts_b is None
        assert train.label_ids.tolist() == [0, 1]
        assert train.has_labels
        assert train.guids == ("train-0", "train-1")
        assert test.texts_a == ("Bill slept.",)
        assert test.label_ids.tolist() == [0]
        assert not test.has_labels

    def test_another_task_is_one_row(self, tmp_path: Path) -> None:
        def layout(file: str, columns: int, label: int | None) -> SplitFormat:
            return SplitFormat(file, columns, text_a=1, text_b=2, label=label, guid=0)

        nli = GlueTask(
            "NLI",
            ("contradiction", "entailment", "neutral"),
            train=layout("train.tsv", 4, 3),
            dev=layout("dev_matched.tsv", 5, 4),
            test=layout("test_matched.tsv", 3, None),
        )
        (tmp_path / "dev_matched.tsv").write_text(
            "index\tsentence1\tsentence2\tlabel1\tgold_label\n7\ta\tb\tneutral\tentailment\n"
        )
        examples = read_examples(nli, tmp_path, "dev")
        assert examples.guids == ("dev-7",)
        assert examples.label_ids.tolist() == [1]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("1\t3\t4\tc", "train.tsv:3: 4 columns instead of 5"),
            ("1\t3\t4\tc\td\te", "train.tsv:3: 6 columns instead of 5"),
            ("", "train.tsv:3: the line is empty"),
            ("2\t3\t4\tc\td", "train.tsv:3: unknown label '2' in column 1"),
            ("1 \t3\t4\tc\td", "train.tsv:3: unknown label '1 ' in column 1"),
        ],
    )
    def test_a_wrong_line_is_named(self, tmp_path: Path, row: str, message: str) -> None:
        write_mrpc(tmp_path, "1\t1\t2\ta\tb", row, "1\t1\t2\ta\tb")
        with pytest.raises(InputError) as error:
            read_examples(MRPC, tmp_path, "train")
        assert message in str(error.value)

    def test_empty_lines_at_the_end_are_no_examples(self, tmp_path: Path) -> None:
        path = write_mrpc(tmp_path, "1\t1\t2\ta\tb", "", "")
        assert len(read_examples(MRPC, tmp_path, "train")) == 1
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        assert len(read_examples(MRPC, tmp_path, "train")) == 1

    def test_not_utf8(self, tmp_path: Path) -> None:
        path = write_mrpc(tmp_path, "1\t1\t2\ta\tb")
        path.write_bytes(path.read_bytes() + b"1\t3\t4\tcaf\xe9\td\n")
        with pytest.raises(InputError, match=r"train\.tsv:3: not UTF-8"):
            read_examples(MRPC, tmp_path, "train")

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"dev\.tsv: cannot read the data"):
            read_examples(MRPC, tmp_path, "dev")

    @pytest.mark.parametrize("content", ["", HEADER])
    def test_a_file_without_examples(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "train.tsv").write_text(content)
        with pytest.raises(InputError, match="no examples"):
            read_examples(MRPC, tmp_path, "train")

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_a_missing_header_costs_no_example(self, tmp_path: Path, split: str) -> None:
        (tmp_path / f"{split}.tsv").write_text("1\t1\t2\ta\tb\n0\t3\t4\tc\td\n")
        with pytest.raises(InputError, match=r"\.tsv:1: the header is missing"):
            read_examples(MRPC, tmp_path, split)

    def test_columns_in_another_order_are_no_examples(self, tmp_path: Path) -> None:
        (tmp_path / "test.tsv").write_text("sentence\tindex\nA dog.\t0\n")
        with pytest.raises(InputError, match=r"test\.tsv:1: 'sentence' is column 1 instead of 2"):
            read_examples(find_task("SST-2"), tmp_path, "test")
        names = HEADER.replace("#1 S", "#3 S").replace("#2 S", "#1 S").replace("#3 S", "#2 S")
        (tmp_path / "train.tsv").write_text(f"{names}1\t1\t2\ta\tb\n")
        with pytest.raises(InputError, match=r"'#1 string' is column 5 instead of 4"):
            read_examples(MRPC, tmp_path, "train")
        # Other names, as of a translation, say nothing.
        (tmp_path / "test.tsv").write_text("nummer\tsatz\n0\tEin Hund.\n")
        assert read_examples(find_task("SST-2"), tmp_path, "test").texts_a == ("Ein Hund.",)

    def test_a_header_where_none_belongs_is_no_example(self, tmp_path: Path) -> None:
        (tmp_path / "dev.tsv").write_text("source\tlabel\tstar\tsentence\ngj04\t1\t\tA dog.\n")
        with pytest.raises(InputError, match=r"dev\.tsv:1: unknown label 'label'"):
            read_examples(COLA, tmp_path, "dev")


# The first lines of each published file, with texts of our own.
PUBLISHED = {
    "MNLI": {
        "train.tsv": (
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
            "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
            "7\t1\t1n\tfiction\t( A )\t( B )\t(R A)\t(R B)\tA\tB\tneutral\tneutral",
        ),
        "dev_matched.tsv": (
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
            "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\t"
            "label4\tlabel5\tgold_label",
            "7\t1\t1n\tslate\tx\tx\tx\tx\tA\tB\tneutral\tneutral\tentailment\tneutral\t"
            "neutral\tentailment",
        ),
        "test_matched.tsv": (
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
            "sentence1_parse\tsentence2_parse\tsentence1\tsentence2",
            "7\t1\t1n\tslate\tx\tx\tx\tx\tA\tB",
        ),
    },
    "QNLI": {
        "train.tsv": ("index\tquestion\tsentence\tlabel", "7\tA\tB\tentailment"),
        "dev.tsv": ("index\tquestion\tsentence\tlabel", "7\tA\tB\tnot_entailment"),
        "test.tsv": ("index\tquestion\tsentence", "7\tA\tB"),
    },
    "QQP": {
        "train.tsv": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "7\t1\t2\tA\tB\t1"),
        "dev.tsv": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "7\t1\t2\tA\tB\t0"),
        "test.tsv": ("id\tquestion1\tquestion2", "7\tA\tB"),
    },
    "RTE": {
        "train.tsv": ("index\tsentence1\tsentence2\tlabel", "7\tA\tB\tentailment"),
        "dev.tsv": ("index\tsentence1\tsentence2\tlabel", "7\tA\tB\tnot_entailment"),
        "test.tsv": ("index\tsentence1\tsentence2", "7\tA\tB"),
    },
    "SST-2": {
        "train.tsv": ("sentence\tlabel", "A\t1"),
        "dev.tsv": ("sentence\tlabel", "A\t0"),
        "test.tsv": ("index\tsentence", "7\tA"),
    },
    "STS-B": {
        "train.tsv": (
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\t"
            "score",
            "7\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA\tB\t3.800",
        ),
        "dev.tsv": (
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\t"
            "score",
            "7\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA\tB\t5",
        ),
        "test.tsv": (
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
            "7\tmain-captions\tMSRvid\t2012test\t0024\tnone\tnone\tA\tB",
        ),
    },
    "WNLI": {
        "train.tsv": ("index\tsentence1\tsentence2\tlabel", "7\tA\tB\t1"),
        "dev.tsv": ("index\tsentence1\tsentence2\tlabel", "7\tA\tB\t0"),
        "test.tsv": ("index\tsentence1\tsentence2", "7\tA\tB"),
    },
}
LABEL_IDS = {"MNLI": (2, 1), "QNLI": (0, 1), "QQP": (1, 0), "RTE": (0, 1), "SST-2": (1, 0),
             "WNLI": (1, 0)}  # fmt: skip


class TestTasks:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_layouts(self, tmp_path: Path, name: str) -> None:
        for file, lines in PUBLISHED[name].items():
            (tmp_path / file).write_text("\n".join(lines) + "\n")
        data = read_task(find_task(name), tmp_path, ("train", "dev", "test"))
        assert list(data.splits) == ["train", "dev", "test"]
        for split, examples in data.splits.items():
            assert examples.texts_a == ("A",)
            assert examples.texts_b == (None if name == "SST-2" else ("B",))
            assert examples.has_labels == (split != "test")
        train, dev = data.splits["train"], data.splits["dev"]
        if name == "STS-B":
            assert train.label_values is not None
            assert dev.label_values is not None
            assert train.label_values.tolist() == pytest.approx([3.8])
            assert dev.label_values.tolist() == [5.0]
            assert data.is_regression
        else:
            assert (train.label_ids[0], dev.label_ids[0]) == LABEL_IDS[name]
            assert train.label_values is None

    def test_mnli_mismatched_is_used_where_it_is(self, tmp_path: Path) -> None:
        lines = PUBLISHED["MNLI"]["dev_matched.tsv"]
        (tmp_path / "dev_matched.tsv").write_text("\n".join(lines) + "\n")
        task = find_task("mnli")
        assert list(read_task(task, tmp_path, ("dev",)).splits) == ["dev"]
        other = lines[1].replace("\tA\t", "\tOther\t")
        (tmp_path / "dev_mismatched.tsv").write_text(f"{lines[0]}\n{other}\n")
        splits = read_task(task, tmp_path, ("dev",)).splits
        assert splits["dev"].texts_a == ("A",)
        assert splits["dev_mismatched"].texts_a == ("Other",)
        with pytest.raises(InputError, match=r"train\.tsv: cannot read"):
            read_task(task, tmp_path, ("train", "dev"))

    def test_qqp_leaves_out_and_counts_malformed_lines(self, tmp_path: Path) -> None:
        head, row = PUBLISHED["QQP"]["train.tsv"]
        (tmp_path / "train.tsv").write_text(f"{head}\n{row}\n8\t1\t2\tbroken\n\n{row}\n")
        examples = read_examples(find_task("qqp"), tmp_path, "train")
        assert len(examples) == 2
        assert examples.skipped_lines == (3, 4)

    def test_sts_b_scores_are_numbers(self, tmp_path: Path) -> None:
        head, row = PUBLISHED["STS-B"]["train.tsv"]
        for score in ("nan", "inf", "high", ""):
            (tmp_path / "train.tsv").write_text(f"{head}\n{row.replace('3.800', score)}\n")
            with pytest.raises(InputError, match=r"train\.tsv:2: label .* is not a number"):
                read_examples(find_task("stsb"), tmp_path, "train")

    def test_xnli_takes_one_language(self, tmp_path: Path) -> None:
        (tmp_path / "multinli").mkdir()
        for language in ("zh", "de"):
            (tmp_path / f"multinli/multinli.train.{language}.tsv").write_text(
                f"premise\thypo\tlabel\n{language} A\tB\tcontradictory\nC\tD\tneutral\n"
            )
        names = ["language", "gold_label", *"abcd", "sentence1", "sentence2", *map(str, range(11))]
        rows = [
            [language, "entailment", *"abcd", f"{language} A", "B", *map(str, range(11))]
            for language in ("ar", "zh", "de")
        ]
        text = "".join("\t".join(row) + "\n" for row in [names, *rows])
        (tmp_path / "xnli.dev.tsv").write_text(text)
        for language in ("zh", "de"):
            task = find_task("XNLI", language=language)
            splits = read_task(task, tmp_path, ("train", "dev")).splits
            assert splits["train"].label_ids.tolist() == [0, 2]
            assert splits["train"].texts_a[0] == splits["dev"].texts_a[0] == f"{language} A"
            assert splits["dev"].label_ids.tolist() == [1]
        with pytest.raises(InputError, match="no examples with 'xx'"):
            read_examples(find_task("XNLI", language="xx"), tmp_path, "dev")


class TestRealData:
    @pytest.mark.parametrize(("split", "count"), [("train", 3668), ("dev", 408), ("test", 1725)])
    def test_mrpc_counts(self, shared_dir: Path, split: str, count: int) -> None:
        examples = read_examples(MRPC, shared_dir / "data/glue/MRPC", split)
        assert len(examples) == len(examples.texts_a) == len(examples.texts_b or ()) == count

    @pytest.mark.parametrize(("split", "count"), [("train", 8551), ("dev", 516)])
    def test_cola_counts(self, shared_dir: Path, split: str, count: int) -> None:
        examples = read_examples(COLA, shared_dir / "data/glue/CoLA", split)
        assert len(examples) == len(examples.texts_a) == count
        assert set(examples.label_ids.tolist()) == {0, 1}

    def test_mrpc_quotes(self, shared_dir: Path) -> None:
        dev = read_examples(MRPC, shared_dir / "data/glue/MRPC", "dev")
        assert dev.texts_b is not None
        # Opened and never closed: a reader that obeys quotes swallows the lines after it.
        assert dev.texts_b[0] == (
            '"The foodservice pie business does not fit our long-term growth strategy.'
        )
        assert dev.texts_a[1].startswith("Magnarelli said")
        assert sum(text.startswith('"') for text in dev.texts_a) > 10
        # The share of paraphrases that GLUE states for this split.
        assert int(dev.label_ids.sum()) == 279

    @pytest.mark.parametrize(
        ("task", "split"), [(t, s) for t in TASKS for s in ("train", "dev", "test")]
    )
    def test_same_as_the_originals_reader(
        self, shared_dir: Path, task: GlueTask, split: str
    ) -> None:
        path = shared_dir / "data/glue" / task.name / f"{split}.tsv"
        if not path.is_file():
            pytest.skip("this split is not among the data")
        layout: SplitFormat = getattr(task, split)
        with open(path, encoding="utf-8") as file:
            rows = list(csv.reader(file, delimiter="\t", quotechar=None))[layout.has_header :]
        examples = read_examples(task, path.parent, split)
        assert examples.texts_a == tuple(row[layout.text_a] for row in rows)
        if layout.text_b is not None:
            assert examples.texts_b == tuple(row[layout.text_b] for row in rows)
        if layout.label is not None:
            assert examples.label_ids.tolist() == [int(row[layout.label]) for row in rows]


def naive_truncation(length_a: int, length_b: int, room: int) -> tuple[int, int]:
    while length_a + length_b > room:
        if length_a > length_b:
            length_a -= 1
        else:
            length_b -= 1
    return length_a, length_b


class TestFeatures:
    @given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 70))
    def test_truncation_is_the_originals(self, a: int, b: int, room: int) -> None:
        assert truncated_lengths(a, b, room) == naive_truncation(a, b, room)

    def test_a_pair(self, tokenizer: Tokenizer) -> None:
        features = featurize(examples_of(["a bs", "c"], ["D", "e d"]), tokenizer, max_seq_length=8)
        assert features.input_ids.tolist() == [
            [CLS, 4, 5, 9, SEP, 7, SEP, 0],
            [CLS, 6, SEP, 8, 7, SEP, 0, 0],
        ]
        assert features.input_mask.tolist() == [[1] * 7 + [0], [1] * 6 + [0] * 2]
        assert features.segment_ids.tolist() == [
            [0] * 5 + [1] * 2 + [0],
            [0] * 3 + [1] * 3 + [0] * 2,
        ]
        assert features.label_ids.tolist() == [0, 1]
        assert features.label_values is None
        for name in ("input_ids", "input_mask", "segment_ids", "label_ids"):
            assert getattr(features, name).dtype == np.int32

    def test_single_sentences_use_the_room_of_the_second_separator(
        self, tokenizer: Tokenizer
    ) -> None:
        features = featurize(examples_of(["a b c d e"]), tokenizer, max_seq_length=6)
        assert features.input_ids.tolist() == [[CLS, 4, 5, 6, 7, SEP]]
        assert not features.segment_ids.any()

    @pytest.mark.parametrize("empty", ["", " \t "])
    def test_an_empty_second_sentence_is_left_out(self, tokenizer: Tokenizer, empty: str) -> None:
        features = featurize(examples_of(["a b c d e"], [empty]), tokenizer, max_seq_length=6)
        assert features.input_ids.tolist() == [[CLS, 4, 5, 6, 7, SEP]]
        assert not features.segment_ids.any()

    def test_padding_is_masked_and_of_the_vocabularys_own_id(self, tmp_path: Path) -> None:
        (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\na\n[PAD]\n")
        tokenizer = load_tokenizer(tmp_path / "vocab.txt", do_lower_case=True)
        features = featurize(examples_of(["a"]), tokenizer, max_seq_length=5)
        assert features.input_ids.tolist() == [[1, 3, 2, 4, 4]]
        assert features.input_mask.tolist() == [[1, 1, 1, 0, 0]]

    @given(
        st.lists(
            st.tuples(st.text("abcde ", max_size=30), st.text("abcde ", max_size=30)),
            min_size=1,
            max_size=4,
        ),
        st.integers(3, 24),
    )
    def test_same_as_one_token_at_a_time(
        self, tokenizer: Tokenizer, pairs: list[tuple[str, str]], s: int
    ) -> None:
        features = featurize(
            examples_of([a for a, _ in pairs], [b for _, b in pairs]), tokenizer, max_seq_length=s
        )
        for row, (text_a, text_b) in enumerate(pairs):
            tokens_a, tokens_b = tokenizer.tokenize(text_a), tokenizer.tokenize(text_b)
            if tokens_b:
                while len(tokens_a) + len(tokens_b) > s - 3:
                    (tokens_a if len(tokens_a) > len(tokens_b) else tokens_b).pop()
            else:
                del tokens_a[s - 2 :]
            first = ["[CLS]", *tokens_a, "[SEP]"]
            second = [*tokens_b, "[SEP]"] if tokens_b else []
            length = len(first) + len(second)
            padding = [0] * (s - length)
            assert features.input_ids[row].tolist() == tokenizer.ids(first + second) + padding
            assert features.input_mask[row].tolist() == [1] * length + padding
            assert (
                features.segment_ids[row].tolist() == [0] * len(first) + [1] * len(second) + padding
            )

    def test_no_room(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InputError, match="max_seq_length 2"):
            featurize(examples_of(["a"]), tokenizer, max_seq_length=2)


class TestEvaluate:
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    LABELS = (1, 1, 1, 0, 1, 1, 0, 0, 0, 0)
    PREDICTED = (1, 1, 1, 1, 0, 0, 0, 0, 0, 0)

    def test_binary(self) -> None:
        results = evaluate(("f1", "accuracy"), self.LABELS, self.PREDICTED)
        assert results == {"accuracy": 0.7, "f1": pytest.approx(6 / 9)}
        assert list(results) == ["f1", "accuracy"]

    def test_matthews(self) -> None:
        labels, predicted = np.array(self.LABELS), np.array(self.PREDICTED, np.int32)
        # (3·4 - 1·2) / √(4·5·5·6)
        expected = pytest.approx(10 / 600**0.5, abs=1e-15)
        assert evaluate(("matthews",), labels, predicted) == {"matthews": expected}
        assert evaluate(("matthews",), [0, 1, 1, 0], [1, 0, 0, 1]) == {"matthews": -1.0}

    def test_many_labels(self) -> None:
        assert evaluate(("accuracy",), [2, 1, 0, 1], [2, 1, 1, 1]) == {"accuracy": 0.75}

    def test_correlations(self) -> None:
        values = [0.0, 1.0, 2.0, 5.0]
        squares = [value**2 for value in values]
        results = evaluate(("spearman", "pearson"), values, squares)
        assert results["spearman"] == pytest.approx(1.0)
        assert results["pearson"] == pytest.approx(np.corrcoef(values, squares)[0, 1])

    def test_zero_denominators(self) -> None:
        assert evaluate(("f1",), [0, 0], [0, 0]) == {"f1": 0.0}
        assert evaluate(("matthews",), [0, 1], [1, 1]) == {"matthews": 0.0}
        for constant in ([3.0, 3.0], [1.0, 2.0]):
            assert evaluate(("pearson", "spearman"), constant, [2.5, 2.5]) == {
                "pearson": 0.0,
                "spearman": 0.0,
            }

    def test_many_examples_do_not_overflow(self) -> None:
        labels = np.tile(np.array([0, 1], np.int32), 200_000)
        assert evaluate(("matthews",), labels, labels)["matthews"] == 1.0

    @pytest.mark.parametrize(
        ("labels", "predicted"), [([], []), ([0, 1], [0]), ([[0]], [[0]]), ([0.0], [np.nan])]
    )
    def test_what_cannot_be_compared(self, labels: list[int], predicted: list[int]) -> None:
        with pytest.raises(ValueError, match=r"cannot compare|not finite"):
            evaluate(("accuracy",), labels, predicted)

    def test_metrics_belong_to_labels(self) -> None:
        with pytest.raises(ValueError, match="two labels"):
            dataclasses.replace(MRPC, labels=("0", "1", "2"))
        with pytest.raises(ValueError, match="do not belong together"):
            dataclasses.replace(COLA, labels=())
        with pytest.raises(ValueError, match="do not belong together"):
            dataclasses.replace(find_task("STS-B"), labels=("0", "1"))


class TestResultFiles:
    def test_eval_results(self, tmp_path: Path) -> None:
        path = tmp_path / "eval_results.txt"
        path.write_text("old")
        results = {
            "loss": 0.5,
            "global_step": 343,
            "eval_loss": np.float32(0.4),
            "eval_accuracy": np.float32(0.8627451),
        }
        write_eval_results(path, results)
        assert path.read_text() == (
            "eval_accuracy = 0.8627451\neval_loss = 0.4\nglobal_step = 343\nloss = 0.5\n"
        )
        assert os.listdir(tmp_path) == ["eval_results.txt"]

    def test_test_results(self, tmp_path: Path) -> None:
        path = tmp_path / "test_results.tsv"
        write_test_results(path, np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))
        assert path.read_text() == "0.25\t0.75\n0.9\t0.1\n"

    def test_a_failure_keeps_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "eval_results.txt"
        path.write_text("old")

        def full_disk(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space"):
            write_eval_results(path, {"loss": 0.5})
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["eval_results.txt"]

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
    def test_the_users_file_mode_is_respected(self, tmp_path: Path) -> None:
        path = tmp_path / "eval_results.txt"
        previous = os.umask(0o022)
        try:
            write_eval_results(path, {"loss": 0.5})
        finally:
            os.umask(previous)
        assert path.stat().st_mode & 0o777 == 0o644
