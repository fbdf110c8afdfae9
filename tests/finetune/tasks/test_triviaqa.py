"""Tests of finetune.tasks.triviaqa and `bertbench convert triviaqa`."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.tasks.squad_examples import read_squad
from finetune.tasks.triviaqa import (
    OUTCOMES,
    Conversion,
    Source,
    convert_pairs,
    find_answer,
    read_context,
    read_triviaqa,
)

SUNSET = {
    "Value": "Sunset Boulevard",
    "Aliases": ["Sunset Blvd.", "Sunset Boulevard"],
    "NormalizedAliases": ["west sunset boulevard", "sunset blvd", "sunset boulevard"],
}


def question(
    question_id: str, *filenames: str, answer: Any = SUNSET, web: tuple[str, ...] = (), **more: Any
) -> dict[str, Any]:
    value = {
        "QuestionId": question_id,
        "Question": f"Which one is {question_id}?",
        "EntityPages": [{"Filename": name, "Title": name.upper()} for name in filenames],
        "SearchResults": [{"Filename": name, "Rank": 0} for name in web],
        **more,
    }
    return value if answer is None else {**value, "Answer": answer}


class Folder:
    """A question file beside its evidence."""

    def __init__(self, path: Path) -> None:
        self.file = path / "wikipedia-train.json"
        self.evidence = path / "evidence"
        self.folders: dict[Source, Path] = {
            "wikipedia": self.evidence / "wikipedia",
            "web": self.evidence / "web",
        }
        for folder in self.folders.values():
            folder.mkdir(parents=True)

    def document(self, name: str, text: str | bytes, source: Source = "wikipedia") -> None:
        path = self.folders[source] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    def questions(self, *data: Any, split: str | None = "train", **more: Any) -> Path:
        root = {"Data": list(data), "Domain": "Wikipedia", "VerifiedEval": False, "Version": 1.0}
        root |= {} if split is None else {"Split": split}
        self.file.write_text(json.dumps(root | more), encoding="utf-8")
        return self.file

    def convert(self, **options: Any) -> Conversion:
        return convert_pairs(read_triviaqa(self.file), self.folders, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def qas_of(conversion: Conversion) -> dict[str, tuple[str, dict[str, Any]]]:
    """Context and question of each id."""
    paragraphs = [p for entry in json.loads(conversion.text)["data"] for p in entry["paragraphs"]]
    return {qa["id"]: (p["context"], qa) for p in paragraphs for qa in p["qas"]}


def nonzero(conversion: Conversion) -> dict[str, int]:
    return {outcome: count for outcome, count in conversion.counts.items() if count}


# The answer and its place


@pytest.mark.parametrize(
    ("context", "aliases", "expected"),
    [
        ("In because of us.", ["us"], "us"),  # not in `because`
        ("just because", ["us"], None),
        ("used usury", ["us"], None),
        ("New-York, NEW  YORK", ["new york"], "New-York"),
        ("by J.K. Rowling.", ["j k rowling"], "J.K. Rowling"),
        ("“The Lord of the Rings”", ["lord of rings"], "Lord of the Rings"),
        ("snake_case here", ["case"], "case"),
        ("first b then a c", ["c", "b"], "c"),  # the aliases' order, as in the original
        ("one two one", ["one"], "one"),
        ("two\nlines", ["two lines"], None),
        ("anything", ["", "the", "--"], None),
        ("£100 or 100", ["100"], "100"),
        ("C'est l’Été!", ["été"], "Été"),
        ("", ["x"], None),
    ],
)
def test_find_answer(context: str, aliases: list[str], expected: str | None) -> None:
    span = find_answer(context, aliases)
    assert (None if span is None else context[slice(*span)]) == expected


def test_the_first_place_is_taken() -> None:
    assert find_answer("reuse: us, US", ["us"]) == (7, 9)
    assert find_answer("£100 or 100", ["100"]) == (8, 11)


def test_letters_that_grow_in_lower_case_do_not_move_the_answer() -> None:
    # "İ".lower() has two characters: an offset in the lower-cased text would be 2 too large.
    assert find_answer("İİ Paris", ["paris"]) == (3, 8)


WORDS = st.text(st.sampled_from("aAbß İé'_-.,“—£\xa0\u202f\u2028\x1c\x85\t\ufeff𝒳"), max_size=6)
LINES = st.lists(st.lists(WORDS, max_size=8).map(" ".join), min_size=1, max_size=4)


@given(st.data(), LINES, st.sampled_from(["\n", "\r\n", "\r"]), st.integers(1, 30))
def test_offsets_are_exact_and_training_skips_nothing(
    data: st.DataObject, lines: list[str], line_end: str, max_words: int
) -> None:
    text = line_end.join(lines)
    start = data.draw(st.integers(0, len(text)))
    alias = text[start : start + data.draw(st.integers(1, 12))]
    with tempfile.TemporaryDirectory() as path:
        folder = Folder(Path(path))
        folder.document("D.txt", text)
        folder.document("E.txt", "fixed")
        fixed = question("fixed", "E.txt", answer={"Value": "fixed"})
        folder.questions(question("q", "D.txt", answer={"Value": alias}), fixed)
        conversion = folder.convert(max_words=max_words)
        squad_file = Path(path) / "squad.json"
        squad_file.write_text(conversion.text, encoding="utf-8")
        examples = read_squad(squad_file, is_training=True, version_2_with_negative=False)
    assert not examples.skipped
    assert len(examples) == conversion.questions == conversion.counts["answered"]
    for context, qa in qas_of(conversion).values():
        (answer,) = qa["answers"]
        begin = answer["answer_start"]
        assert answer["text"]
        assert context[begin : begin + len(answer["text"])] == answer["text"]
        assert len(context.split()) <= max_words


@pytest.mark.parametrize("answer", ["New\xa0York", "New\u2009York", "New York"])
def test_unusual_white_space_in_an_answer(folder: Folder, answer: str, tmp_path: Path) -> None:
    folder.document("D.txt", f"in {answer} city")
    folder.questions(question("q", "D.txt", answer={"Value": "New York"}))
    squad_file = tmp_path / "squad.json"
    squad_file.write_text(folder.convert().text, encoding="utf-8")
    (example,) = read_squad(squad_file, is_training=True, version_2_with_negative=False)
    assert (example.answer_text, example.answer_words) == ("New York", (1, 2))


# Contexts


def test_context_is_cut_after_words_across_lines(tmp_path: Path) -> None:
    path = tmp_path / "D.txt"
    path.write_bytes(b"\xef\xbb\xbfone  two\r\n\r\n \t\r\nthree four\nfive")
    assert read_context(path, 3) == ("one two\nthree", True)
    assert read_context(path, 4) == ("one two\nthree four", True)
    assert read_context(path, 99) == ("one two\nthree four\nfive", True)


def test_bytes_that_are_not_utf8_are_replaced_and_counted(folder: Folder) -> None:
    folder.document("D.txt", b"caf\xe9 on Sunset Blvd \xff")
    folder.document("E.txt", "a real \ufffd on Sunset Blvd")
    folder.questions(question("q", "D.txt", "E.txt"))
    conversion = folder.convert()
    assert conversion.not_utf8 == 1
    context, qa = qas_of(conversion)["q--D.txt"]
    assert context == "caf\ufffd on Sunset Blvd \ufffd"
    assert qa["answers"] == [{"text": "Sunset Blvd", "answer_start": 8}]


# What becomes of each pair


def test_a_paragraph_for_each_pair(folder: Folder) -> None:
    folder.document("D.txt", "It is Sunset Boulevard.")
    folder.document("35/35_9.txt", "On SUNSET BLVD.", "web")
    folder.questions(question("tc_33", "D.txt", web=("35/35_9.txt",)))
    conversion = folder.convert()
    qas = qas_of(conversion)
    assert set(qas) == {"tc_33--D.txt", "tc_33--35/35_9.txt"}
    assert qas["tc_33--D.txt"] == (
        "It is Sunset Boulevard.",
        {
            "id": "tc_33--D.txt",
            "qid": "tc_33",
            "question": "Which one is tc_33?",
            "answers": [{"text": "Sunset Boulevard", "answer_start": 6}],
        },
    )
    titles = {entry["title"] for entry in json.loads(conversion.text)["data"]}
    assert titles == {"D.TXT", "35/35_9.txt"}


def test_training_questions_without_the_answer_are_left_out(folder: Folder) -> None:
    folder.document("A.txt", "Sunset Boulevard")
    folder.document("B.txt", "nothing of the kind")
    folder.document("C.txt", "it comes too late: Sunset Boulevard")
    folder.questions(question("q", "A.txt", "B.txt", "C.txt"))
    conversion = folder.convert(max_words=5)
    assert nonzero(conversion) == {"answered": 1, "no_answer": 2}
    assert set(qas_of(conversion)) == {"q--A.txt"}


def test_with_negatives_they_are_kept_as_impossible(folder: Folder, tmp_path: Path) -> None:
    folder.document("A.txt", "Sunset Boulevard")
    folder.document("B.txt", "nothing of the kind")
    folder.questions(question("q", "A.txt", "B.txt"))
    conversion = folder.convert(version_2_with_negative=True)
    assert nonzero(conversion) == {"answered": 1, "impossible": 1}
    squad_file = tmp_path / "squad.json"
    squad_file.write_text(conversion.text, encoding="utf-8")
    examples = read_squad(squad_file, is_training=True, version_2_with_negative=True)
    assert {e.qas_id: e.is_impossible for e in examples} == {"q--A.txt": False, "q--B.txt": True}


def test_dev_questions_without_the_answer_are_kept(folder: Folder) -> None:
    folder.document("A.txt", "Sunset Boulevard")
    folder.document("B.txt", "nothing of the kind")
    folder.questions(question("q", "A.txt", "B.txt"), split="dev")
    conversion = folder.convert()
    assert nonzero(conversion) == {"answered": 1, "unanswered": 1}
    assert qas_of(conversion)["q--B.txt"][1]["answers"] == []


@pytest.mark.parametrize("answer", [{}, {"Value": None, "Aliases": None}, "null"])
def test_null_is_as_good_as_nothing(folder: Folder, answer: Any) -> None:
    folder.document("A.txt", "Sunset Boulevard")
    asked = question("q", "A.txt", answer=answer, SearchResults=None)
    asked["EntityPages"][0]["Title"] = None
    if answer == "null":
        asked["Answer"] = None
    folder.questions(asked, split="test", VerifiedEval=None)
    assert nonzero(folder.convert()) == {"unanswered": 1}
    with pytest.raises(InputError, match=r"Data\[0\](\.Answer)? has no '(Answer|Value)'"):
        read_triviaqa(folder.file, "train")


@pytest.mark.parametrize("negative", [False, True])
def test_a_test_split_has_questions_to_answer(
    folder: Folder, tmp_path: Path, negative: bool
) -> None:
    folder.document("A.txt", "Sunset Boulevard")
    folder.questions(question("q", "A.txt", answer=None), split="test")
    conversion = folder.convert(version_2_with_negative=negative)
    assert nonzero(conversion) == {"unanswered": 1}
    assert "is_impossible" not in conversion.text
    squad_file = tmp_path / "squad.json"
    squad_file.write_text(conversion.text, encoding="utf-8")
    (example,) = read_squad(squad_file, is_training=False, version_2_with_negative=negative)
    assert (example.qas_id, example.gold_answers) == ("q--A.txt", ())


def test_lost_documents_are_counted(folder: Folder) -> None:
    folder.document("A.txt", "Sunset Boulevard")
    folder.document("empty.txt", " \n\n")
    folder.document("folder/x.txt", "")
    names = ["A.txt", "gone.txt", "A.txt/x", "empty.txt", "folder", "x" * 300, "\ud800", ""]
    folder.questions(question("q", *names))
    conversion = folder.convert()
    # Missing: gone, below a file, and without a name; unreadable: a folder, too long, not a name.
    assert nonzero(conversion) == {"answered": 1, "missing": 3, "unreadable": 3, "empty": 1}
    assert sum(conversion.counts.values()) == len(names)
    assert conversion.first_lost.startswith(str(folder.folders["wikipedia"]))


def test_ids_are_never_written_twice(folder: Folder) -> None:
    folder.document("A.txt", "Sunset Boulevard")
    folder.document("b--A.txt", "Sunset Boulevard")
    folder.questions(question("q", "A.txt", "A.txt"), question("q", "b--A.txt"),
                     question("q--b", "A.txt"))  # fmt: skip
    conversion = folder.convert()
    assert nonzero(conversion) == {"answered": 2, "duplicate": 2}
    assert conversion.text.count('"id"') == 2


def test_verified_sets_have_only_verified_parts(folder: Folder) -> None:
    folder.document("A.txt", "Sunset Boulevard")
    folder.document("B.txt", "Sunset Boulevard")
    verified = question("q", "A.txt", "B.txt", QuestionPartOfVerifiedEval=True)
    verified["EntityPages"][0]["DocPartOfVerifiedEval"] = True
    verified["EntityPages"][1]["DocPartOfVerifiedEval"] = False
    other = question("r", "A.txt", QuestionPartOfVerifiedEval=False)
    for domain, expected in (("Web", {"q--A.txt"}), ("Wikipedia", {"q--A.txt", "q--B.txt"})):
        folder.questions(verified, other, split="dev", Domain=domain, VerifiedEval=True)
        assert set(qas_of(folder.convert())) == expected


# Order and sample


def many(folder: Folder, count: int = 12) -> list[str]:
    for i in range(count):
        folder.document(f"{i}.txt", "Sunset Boulevard" if i % 2 else "nothing")
    folder.questions(*(question(f"q{i}", f"{i}.txt") for i in range(count)))
    return [f"q{i}--{i}.txt" for i in range(count)]


def test_order_is_the_original_one(folder: Folder) -> None:
    ids = many(folder)
    random.seed(10)
    random.shuffle(ids)
    assert list(qas_of(folder.convert(version_2_with_negative=True))) == ids
    assert list(qas_of(folder.convert(version_2_with_negative=True, seed=11))) != ids


def test_a_sample_counts_questions_that_are_written(folder: Folder) -> None:
    ids = many(folder)
    random.seed(10)
    random.shuffle(ids)
    answered = [qas_id for qas_id in ids if int(qas_id[1:].split("--")[0]) % 2]
    seen: list[tuple[int, int]] = []
    conversion = folder.convert(
        max_questions=4, on_pair=lambda looked_at, written: seen.append((looked_at, written))
    )
    assert list(qas_of(conversion)) == answered[:4]
    looked_at = ids.index(answered[3]) + 1
    assert seen[-1] == (looked_at, 4)
    assert len(seen) == looked_at
    assert conversion.not_needed == len(ids) - looked_at


@pytest.mark.parametrize(
    ("split", "domain", "expected"),
    [("train", "Web", 80_000), ("train", "Wikipedia", None), ("dev", "Web", None)],
)
def test_default_sample(folder: Folder, split: str, domain: str, expected: int | None) -> None:
    file = folder.questions(question("q", "A.txt"), split=split, Domain=domain)
    assert read_triviaqa(file).default_max_questions == expected


# Wrong input


@pytest.mark.parametrize(
    "name", ["../secret.txt", "/etc/passwd", "a/../../b", "..\\secret.txt", "..", "a\0b"]
)
def test_document_names_that_lead_out_are_refused(folder: Folder, name: str) -> None:
    folder.document("A.txt", "Sunset Boulevard")
    file = folder.questions(question("q", "A.txt", name))
    with pytest.raises(InputError, match=r"Data\[0\]\.EntityPages\[1\].*leads out"):
        read_triviaqa(file)


def test_names_with_dots_are_fine(folder: Folder) -> None:
    folder.document("What's_up..?_...txt", "Sunset Boulevard")
    folder.questions(question("q", "What's_up..?_...txt"))
    assert folder.convert().questions == 1


def test_links_that_lead_out_are_refused(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("Sunset Boulevard", encoding="utf-8")
    (folder.folders["wikipedia"] / "A.txt").symlink_to(tmp_path / "secret.txt")
    folder.questions(question("q", "A.txt"))
    with pytest.raises(InputError, match=r"A\.txt.*outside of the evidence folder"):
        folder.convert()


def test_the_evidence_folder_may_be_a_link(folder: Folder, tmp_path: Path) -> None:
    folder.document("A.txt", "Sunset Boulevard")
    (tmp_path / "link").symlink_to(folder.folders["wikipedia"])
    folder.folders["wikipedia"] = tmp_path / "link"
    folder.questions(question("q", "A.txt"))
    assert folder.convert().questions == 1


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ([], "the top level is not an object"),
        ({}, "the top level has no 'Data'"),
        ({"Data": {}, "Domain": "Web"}, "'Data' in the top level is dict, not list"),
        ({"Data": [], "Domain": "Web", "Split": "dev"}, "no question has a document"),
        ({"Data": [], "Domain": "Web"}, "no 'Split'; say which with --split"),
        ({"Data": ["x"], "Domain": "Web", "Split": "dev"}, r"Data\[0\] is not an object"),
        (
            {"Data": [question("q", answer=None)], "Domain": "Web", "Split": "train"},
            r"Data\[0\] has no 'Answer'",
        ),
        (
            {"Data": [question("q", answer={"NormalizedAliases": [1]})], "Domain": "Web",
             "Split": "dev"},
            r"an alias in Data\[0\]\.Answer is not text",
        ),
    ],
)  # fmt: skip
def test_other_json_is_refused(tmp_path: Path, root: object, message: str) -> None:
    path = tmp_path / "qa.json"
    path.write_text(json.dumps(root), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_triviaqa(path)


def test_broken_json_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "qa.json"
    path.write_text('{"Data":\n[}', encoding="utf-8")
    with pytest.raises(InputError, match=r"qa\.json:2: not JSON"):
        read_triviaqa(path)
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8 text"):
        read_triviaqa(path)


def test_no_document_at_all_is_an_error(folder: Folder) -> None:
    folder.questions(question("q", "A.txt", web=("b.txt",)))
    with pytest.raises(InputError, match="none of the 2 documents can be read; give the evidence"):
        folder.convert()


def test_no_question_at_all_is_an_error(folder: Folder) -> None:
    folder.document("A.txt", "nothing")
    folder.questions(question("q", "A.txt"))
    with pytest.raises(InputError, match=r"no question remains \(1 left out: the answer is not in"):
        folder.convert()


# The command


def bertbench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys\n"
        "from bertbench.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    assert 'tensorflow' not in sys.modules\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, "convert", "triviaqa", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )


@pytest.fixture
def arguments(folder: Folder, tmp_path: Path) -> list[str | Path]:
    folder.document("A.txt", "It is Sunset Boulevard.")
    folder.questions(question("q", "A.txt", "gone.txt"))
    return ["--triviaqa_file", folder.file, "--data-dir", folder.evidence, "--squad_file",
            tmp_path / "squad.json"]  # fmt: skip


def test_command_writes_and_reports(arguments: list[str | Path], tmp_path: Path) -> None:
    summary_file = tmp_path / "summary.json"
    result = bertbench(*arguments, "--json", summary_file)
    assert result.returncode == 0, result.stderr
    (example,) = read_squad(
        tmp_path / "squad.json", is_training=True, version_2_with_negative=False
    )
    assert example.answer_text == "Sunset Boulevard"
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    assert summary | {"pairs": 2, "questions": 1, "answered": 1, "missing": 1} == summary
    assert set(OUTCOMES) < set(summary)
    assert "1 question in" in result.stdout
    assert "gone.txt" in result.stdout


def test_command_overwrites_only_with_force(arguments: list[str | Path], tmp_path: Path) -> None:
    squad_file = tmp_path / "squad.json"
    squad_file.write_text("mine", encoding="utf-8")
    result = bertbench(*arguments)
    assert (result.returncode, squad_file.read_text(encoding="utf-8")) == (2, "mine")
    assert result.stderr.splitlines()[-1].endswith("--force overwrites it")
    result = bertbench(*arguments, "--force", "--json", "-")
    assert (result.returncode, json.loads(result.stdout)["questions"]) == (0, 1)
    assert squad_file.read_text(encoding="utf-8") != "mine"


def test_command_never_overwrites_its_input(arguments: list[str | Path], folder: Folder) -> None:
    before = folder.file.read_bytes()
    result = bertbench(*arguments[:-1], folder.file, "--force")
    assert (result.returncode, folder.file.read_bytes()) == (2, before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({3: "no/such/folder"}, "no such folder"),
        ({1: "no.json"}, "no.json"),
        ({5: "no/such/squad.json"}, "the folder of --squad_file does not exist"),
        ({2: "--wikipedia_dir", 3: "."}, "none of the 2 documents can be read"),
        ({2: "--max-words", 3: "0"}, "--max_words"),
        ({2: "--max_words", 3: "5"}, "give --data_dir"),
    ],
)
def test_command_refuses(
    arguments: list[str | Path], tmp_path: Path, change: dict[int, str], words: str
) -> None:
    result = bertbench(*(change.get(i, argument) for i, argument in enumerate(arguments)))
    assert result.returncode == 2, result
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("bertbench: ")
    assert words in last
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "squad.json").exists()


def test_help_fits_a_terminal_and_has_an_example() -> None:
    result = bertbench("--help")
    assert "bertbench convert triviaqa --data_dir" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
