"""Wrong flags and files on the command line: one line and exit code 2, never a traceback."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bertbench.cli import cli, main
from bertbench.cli.options.common import FiniteFloat, MemorySize, Number, Whole
from bertbench.core.units import parse_bytes
from finetune.errors import InputError
from finetune.spec.checkpointing import parse_checkpointing

UGLY = [
    "-1", "0", "1", "nan", "inf", "-inf", "1e400", "1e308", "1e18", "-1e-400", "2", "0.5",
    str(2**31), str(2**63), str(-(2**63) - 1), str(10**12), "9" * 5000, "1_0", "²", "٣", "", " ",
    "abc", "0x10", "1e400GiB", "9" * 400 + "GiB", "-1GiB", "1GiB", "1 GiB ", "\x1b[31m", "½",
]  # fmt: skip


def commands(command: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All verbs with their flags."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from commands(inner, *path, name)
    else:
        yield path, command


VERBS = dict(commands(cli))


def numeric_options() -> list[tuple[tuple[str, ...], str]]:
    kinds = (click.types.IntParamType, click.types.FloatParamType, MemorySize)
    return [
        (path, option.opts[0])
        for path, command in VERBS.items()
        for option in command.params
        if isinstance(option, click.Option) and isinstance(option.type, kinds)
    ]


def test_every_number_has_bounds() -> None:
    """Also numbers that are added later: one without bounds ends in a traceback somewhere."""
    found = numeric_options()
    assert len(found) > 30
    for path, flag in found:
        (option,) = (o for o in VERBS[path].params if flag in o.opts)
        bounded = isinstance(option.type, (Whole, FiniteFloat, MemorySize, Number)) or (
            isinstance(option.type, click.IntRange) and option.type.max is not None
        )
        assert bounded, (path, flag)
        # "[x<=None]" is what click makes of a range without an end.
        assert "None]" not in str(option.get_help_record(click.Context(VERBS[path]))), (path, flag)


@pytest.mark.parametrize(("path", "flag"), numeric_options(), ids=lambda part: str(part))
def test_ugly_numbers_are_refused_or_taken(path: tuple[str, ...], flag: str) -> None:
    (option,) = (o for o in VERBS[path].params if flag in o.opts)
    context = click.Context(VERBS[path])
    for text in UGLY:
        try:
            value = option.type_cast_value(context, text)
        except (click.UsageError, InputError) as error:
            message = getattr(error, "message", str(error))
            assert "\n" not in message
            continue
        # What is taken can be computed with, or at least compared.
        if isinstance(option.type, Number) and option.type.infinite:
            assert value == value, text
            continue
        assert 0 * float(value) == 0, (text, value)
        assert isinstance(value, float) or abs(value) < 2**63


def run_line(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and error of a command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("main always exits")


STARTS = {
    # Enough to come as far as the flag goes without TensorFlow, a trial or a download.
    ("plan",): ["--gpu", "rtx-2080", "--model", "bert-tiny", "--seq-len", "64"],
    ("report",): [],
    ("ledger", "prune"): ["--all"],
    ("ledger", "list"): [],
    ("ledger", "export"): ["x.csv"],
    ("devices",): [],
    ("fetch",): ["--list", "squad-v1.1"],
    ("eval", "squad"): ["data.json", "predictions.json"],
    ("convert", "triviaqa"): ["--triviaqa_file", "data.json", "--squad_file", "out.json"],
    ("probe",): ["--check", "data.json"],
    ("export",): ["folder", "--to", "new", "--format", "huggingface"],
    ("run", "squad"): ["--output_dir", "o", "--train_file", "data.json"],
    ("run", "classifier"): ["--output_dir", "o", "--train_file", "t.csv"],
}
FILES = ["missing.json", "folder", "data.json", "empty", "binary", "deep.json", "list.json"]
WORDS = ["", "-", "--", "\x1b[2J", "../..", "a" * 5000, "full:²", "full:" + "9" * 5000, "gpu:²",
         "gpu:" + "9" * 5000, "tpu:", "auto,auto", "none,none", "bf16", "=1", "\udcff"]  # fmt: skip


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BERTBENCH_LEDGER", str(tmp_path / "no" / "ledger.sqlite"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "data.json").write_text('{"data": []}')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "list.json").write_text(json.dumps([1e300, None, {"a": 10**400}]))
    (tmp_path / "t.csv").write_text("text,label\na,0\n")
    return tmp_path


def wrong_lines(count: int) -> list[list[str]]:
    """Command lines of all verbs in turn, each with one or two odd flags; seeded."""
    draw, lines = random.Random(count), []
    for path, command in itertools.islice(itertools.cycle(VERBS.items()), count):
        line = [*path, *STARTS[path]]
        options = [o for o in command.params if isinstance(o, click.Option)]
        for option in draw.sample(options, min(len(options), draw.randint(1, 2))):
            if option.opts[0] in ("--help", "--demo", "--verify", "--use_tpu", "--master"):
                continue
            line.append(draw.choice(option.opts))
            if not option.is_flag:
                kind = draw.choice((UGLY, FILES, WORDS))
                line += [draw.choice(kind) for _ in range(option.nargs)]
        lines.append(line)
    return lines


@pytest.mark.parametrize(
    "count", [pytest.param(60, id="60"), pytest.param(400, id="400", marks=pytest.mark.slow)]
)
def test_wrong_command_lines_end_in_one_line(files: Path, count: int) -> None:
    codes = []
    for line in wrong_lines(count):
        try:
            code, out, err = run_line(line)
        except Exception as error:
            raise AssertionError(f"{line!r:.600}: {error!r:.300}") from error
        codes.append(code)
        if code:
            assert code in (1, 2), line
            last = err.rstrip("\n").split("\n")[-1]
            assert last.startswith("bertbench: "), (line, err)
            assert "Traceback" not in err
        assert not {c for c in out + err if not c.isprintable() and c not in "\n\t"}, line
    assert codes.count(2) > count // 2


def paths_of(command: click.Command) -> list[click.Parameter]:
    """Options and arguments of a command that name a file or folder."""
    return [p for p in command.params if p.type.name in ("path", "file", "directory")]


PATHS = [(*words, one.opts[0]) for words, command in VERBS.items() for one in paths_of(command)]


@pytest.mark.parametrize("place", PATHS, ids=" ".join)
def test_an_empty_name_is_no_file(files: Path, place: tuple[str, ...]) -> None:
    *words, option = place
    start = [*words, *STARTS[tuple(words)]]
    if option.startswith("-"):
        line = [*start, option, ""]
    else:
        arguments = [p for p in VERBS[tuple(words)].params if isinstance(p, click.Argument)]
        line = [*words, *("" if one.opts[0] == option else "folder" for one in arguments)]
    code, _, err = run_line(line)
    assert code == 2, (line, err)
    assert err.rstrip("\n").split("\n")[-1].startswith("bertbench: "), err


def test_paths_are_found_in_all_verbs_that_take_any() -> None:
    assert len(PATHS) > 40


@pytest.mark.parametrize(
    "text", ["1e400GiB", "9" * 400 + "GiB", "9" * 30, "99999999999999TiB", "nan", "inf GiB", "²GiB"]
)
def test_memory_beyond_all_bounds(text: str) -> None:
    with pytest.raises(InputError):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["full:²", "full:" + "9" * 5000, "full:-1", "full:1e3"])
def test_policies_with_odd_numbers(text: str) -> None:
    with pytest.raises(InputError, match="unknown checkpointing policy"):
        parse_checkpointing(text)


def test_a_number_out_of_range_names_its_flag() -> None:
    result = CliRunner().invoke(cli, ["run", "squad", "--demo", "--seed", str(2**63)])
    assert result.exit_code == 2
    assert "--seed" in result.output
    assert "more than 9,223,372,036,854,775,807" in result.output
