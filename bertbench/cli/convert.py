"""`bertbench convert`: other data sets in a format that `bertbench run` reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from bertbench.cli.options.common import (
    CONTEXT,
    MAX_SEED,
    PathName,
    Whole,
    json_option,
    write_json,
)
from bertbench.core.progress import progress
from bertbench.core.terminal import echo, say
from finetune.errors import InputError
from finetune.storage.files import write_atomically
from finetune.tasks.triviaqa import (
    MAX_WORDS,
    OUTCOMES,
    SEED,
    Conversion,
    Source,
    TriviaQA,
    convert_pairs,
    read_triviaqa,
)

_FOLDER = PathName(file_okay=False)


@click.group(context_settings=CONTEXT)
def command() -> None:
    """Convert other data sets to a format that `bertbench run` reads.

    \b
    Example:
      bertbench convert triviaqa --help
    """


@command.command(context_settings=CONTEXT)
@click.option(
    "--triviaqa_file",
    type=PathName(exists=True, dir_okay=False),
    required=True,
    help="File of questions, as qa/wikipedia-train.json.",
)
@click.option(
    "--data_dir", type=_FOLDER, help="Evidence folder, which has the folders wikipedia and web."
)
@click.option("--wikipedia_dir", type=_FOLDER, help="Default: wikipedia in --data_dir.")
@click.option("--web_dir", type=_FOLDER, help="Default: web in --data_dir.")
@click.option(
    "--squad_file",
    type=PathName(dir_okay=False),
    required=True,
    help="File to write, in SQuAD's format.",
)
@click.option("--force", is_flag=True, help="Overwrite --squad_file.")
@click.option(
    "--max_words",
    "--max_num_tokens",
    "max_words",
    type=Whole(1),
    default=MAX_WORDS,
    show_default=True,
    help="Words to keep from the beginning of each document.",
)
@click.option(
    "--version_2_with_negative",
    type=bool,
    is_flag=False,
    flag_value="true",
    default=False,
    help="Keep questions whose answer is not in the context, as unanswerable (SQuAD 2.0).",
)
@click.option(
    "--max_questions",
    "--sample_size",
    "max_questions",
    type=Whole(1),
    help="Take a random sample of this size. Default: 80000 of a web training file, else all.",
)
@click.option(
    "--seed",
    type=Whole(-MAX_SEED, MAX_SEED),
    default=SEED,
    show_default=True,
    help="Seed for the order and the sample.",
)
@click.option(
    "--split",
    type=click.Choice(["train", "dev", "test"]),
    help="Split of the questions. Default: the one that --triviaqa_file names.",
)
@json_option
def triviaqa(
    triviaqa_file: Path,
    data_dir: Path | None,
    wikipedia_dir: Path | None,
    web_dir: Path | None,
    squad_file: Path,
    force: bool,
    max_words: int,
    version_2_with_negative: bool,
    max_questions: int | None,
    seed: int,
    split: str | None,
    json_file: Path | None,
) -> None:
    """Convert TriviaQA to SQuAD's format, for training or for prediction.

    Each question gets a paragraph for each of its documents, with the offset of the first answer in
    it. A training question whose answer is not found is left out.

    \b
    Example:
      bertbench convert triviaqa --data_dir evidence \\
        --triviaqa_file qa/wikipedia-train.json --squad_file triviaqa-train.json
    """
    folders = _evidence_folders(data_dir, wikipedia_dir, web_dir)
    _check_outputs(triviaqa_file, squad_file, json_file, force)
    say(f"reading {triviaqa_file}")
    data = read_triviaqa(triviaqa_file, split)
    limit = data.default_max_questions if max_questions is None else max_questions
    with _shown_progress(data, limit) as on_pair:
        conversion = convert_pairs(
            data,
            folders,
            max_words=max_words,
            version_2_with_negative=version_2_with_negative,
            seed=seed,
            max_questions=limit,
            on_pair=on_pair,
        )
    _write_questions(squad_file, conversion.text)
    if json_file is not None:
        write_json(json_file, _summary(data, conversion, squad_file))
    if str(json_file) != "-":
        _show(conversion, squad_file)


@contextlib.contextmanager
def _shown_progress(data: TriviaQA, limit: int | None) -> Iterator[Callable[[int, int], None]]:
    """Show how far the conversion is: in questions of a sample, or in documents of everything.

    Yields:
        A function that takes the number of documents read and of questions written.
    """
    if limit is not None and limit < len(data.pairs):
        with progress("convert", limit, "questions") as advance:
            yield lambda read, written: advance(written, "")
    else:
        with progress("convert", len(data.pairs), "documents") as advance:
            yield lambda read, written: advance(read, "")


def _write_questions(squad_file: Path, text: str) -> None:
    try:
        write_atomically(squad_file, text)
    except OSError as error:
        raise InputError(
            f"cannot write the questions ({error.strerror})",
            path=squad_file,
            hint="give another --squad_file",
        ) from error


def _evidence_folders(
    data_dir: Path | None, wikipedia_dir: Path | None, web_dir: Path | None
) -> dict[Source, Path]:
    if data_dir is None and wikipedia_dir is None and web_dir is None:
        raise InputError("no evidence folder", hint="give --data_dir")
    for folder in (data_dir, wikipedia_dir, web_dir):
        if folder is not None and not folder.is_dir():
            raise InputError(
                "no such folder", path=folder, hint="give TriviaQA's evidence folder as --data_dir"
            )
    folders: dict[Source, Path] = {}
    if data_dir is not None:
        folders = {"wikipedia": data_dir / "wikipedia", "web": data_dir / "web"}
    if wikipedia_dir is not None:
        folders["wikipedia"] = wikipedia_dir
    if web_dir is not None:
        folders["web"] = web_dir
    return folders


def _check_outputs(
    triviaqa_file: Path, squad_file: Path, json_file: Path | None, force: bool
) -> None:
    """Refuse output files that could not be written at the end of the work."""
    if squad_file.exists():
        if squad_file.samefile(triviaqa_file):
            raise InputError(
                "--squad_file is --triviaqa_file", path=squad_file, hint="give another one"
            )
        if not force:
            raise InputError(
                "the file exists already", path=squad_file, hint="--force overwrites it"
            )
    for flag, path in (("--squad_file", squad_file), ("--json", json_file)):
        if path is not None and str(path) != "-" and not path.parent.is_dir():
            raise InputError(
                f"the folder of {flag} does not exist",
                path=path,
                hint="make it, or give another file",
            )


def _summary(data: TriviaQA, conversion: Conversion, squad_file: Path) -> dict[str, Any]:
    return {
        "squad_file": str(squad_file),
        "split": data.split,
        "domain": data.domain,
        "pairs": len(data.pairs),
        "questions": conversion.questions,
        **conversion.counts,
        "not_needed": conversion.not_needed,
        "not_utf8": conversion.not_utf8,
    }


def _show(conversion: Conversion, squad_file: Path) -> None:
    plural = "" if conversion.questions == 1 else "s"
    echo(f"{conversion.questions:,} question{plural} in {squad_file}")
    for outcome, count in conversion.counts.items():
        if count:
            echo(f"{count:>9,} {OUTCOMES[outcome]}")
    if conversion.first_lost:
        # `repr`, as a name may hold characters that a terminal cannot show.
        echo(f"{'':>9} first document lost: {conversion.first_lost!r}")
    if conversion.not_utf8:
        echo(f"{conversion.not_utf8:>9,} contexts had bytes replaced that are not UTF-8")
    if conversion.not_needed:
        echo(f"{conversion.not_needed:>9,} pairs not needed")
