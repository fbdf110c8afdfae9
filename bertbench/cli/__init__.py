"""The command line: a module for each verb, which is imported only when the verb is used."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
from typing import Any

import click

from bertbench.cli.options.common import CONTEXT, CONTINUE_VARIABLE
from bertbench.core.errors import (
    SteppedDownError,
    StoppedEarlyError,
    WorkError,
    describe_system_error,
)
from bertbench.core.interruption import EXIT_CODE, end_quietly, handle_signals, was_interrupted
from bertbench.core.standard_streams import give_up_stdout, prepare_standard_streams
from bertbench.core.terminal import clean_warnings, say
from bertbench.core.without_keras import leave_out_keras
from bertbench.hardware.threads import limit_library_threads
from finetune.errors import InputError

_VERBS = {
    "convert": "TriviaQA to SQuAD's format.",
    "devices": "What is attached, how much memory it has, and who holds it.",
    "eval": "Official metrics of predictions.",
    "export": "Fine-tuned weights for other tools.",
    "fetch": "Data sets and Google's BERT releases, by name.",
    "ledger": "The record of all trials: list, export, prune.",
    "plan": "Fastest lever setting that fits, for a target batch.",
    "probe": "Largest batch that really fits, certified.",
    "report": "Tables, pictures and a page of what was measured.",
    "run": "Fine-tune, predict and evaluate with a plan.",
}


class _LazyGroup(click.Group):
    """A click group that imports the module of a verb only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        command: click.Command = importlib.import_module(f"bertbench.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a verb; for an unknown one suggest a similar name."""
        name = args[0] if args else ""
        unknown = name and not name.startswith("-") and name not in _VERBS
        if unknown and not ctx.resilient_parsing:  # as during completion in a shell
            near = difflib.get_close_matches(name, _VERBS, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise click.UsageError(
                f"no verb {name!r}; {meant}`bertbench --help` has all of them", ctx
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(_VERBS.items()))


@click.group(cls=_LazyGroup, context_settings=CONTEXT)
@click.version_option(package_name="bertbench")
def cli() -> None:
    """Make BERT fine-tuning fit: probe the largest batch, plan, and run.

    \b
    Example:
      bertbench probe
      bertbench plan --target-batch 32
      bertbench run squad
    """


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line.

    Exits with code 0 on success, 2 for wrong input, 1 for work that failed, 130 when interrupted.

    Args:
        arguments: arguments after the program's name. None takes those of the process, and means
            that the process runs this command only: its streams and signals are set up, and a run
            that must continue in a fresh process replaces it.
    """
    code = EXIT_CODE
    # It may be raised before the command begins, or while its result is printed.
    with contextlib.suppress(KeyboardInterrupt):
        clean_warnings()
        if arguments is None:
            prepare_standard_streams()
            handle_signals()
        code = _flush(_run(arguments, dict(os.environ)))
    if arguments is None:
        end_quietly(code)
    sys.exit(code)


def _run(arguments: list[str] | None, environment: dict[str, str]) -> int:
    """Run the command and print its error, if there is one; return the exit code."""
    try:
        if arguments is None:
            limit_library_threads()
            leave_out_keras()
        cli.main(args=arguments, prog_name="bertbench", standalone_mode=False)
    except click.exceptions.Exit as finished:
        return finished.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        say(error.format_message())
        return 2
    except click.ClickException as error:
        return _fail(error.format_message(), 2)
    except InputError as error:
        return _fail(str(error), 2)
    except SteppedDownError as error:
        if arguments is not None or not _is_own_process():
            return _fail(f"{error}: the same command continues", 1)
        return _restart(error, environment)
    except StoppedEarlyError as error:
        return _fail(str(error), EXIT_CODE)
    except WorkError as error:
        return _fail(str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", EXIT_CODE)
    except BrokenPipeError:
        # The reader of a pipe has ended, as in `bertbench plan | head`.
        give_up_stdout()
        return 1
    except OSError as error:
        return _fail(describe_system_error(error), 1)
    except Exception as error:
        if was_interrupted():  # a library may have turned the KeyboardInterrupt into another error
            return _fail("interrupted", EXIT_CODE)
        if not isinstance(error, MemoryError) and "can't start new thread" not in str(error):
            raise
        return _fail(describe_system_error(error), 1)
    return 0


def _flush(code: int) -> int:
    """Flush standard output; print an error if that fails and the command succeeded."""
    try:
        sys.stdout.flush()
    except OSError as error:
        give_up_stdout()
        if not code and not isinstance(error, BrokenPipeError):
            _fail(f"standard output: {describe_system_error(error)}", 1)
        return code or 1
    return code


def _is_own_process() -> bool:
    """Whether the process was started for this command, and not for a notebook that calls it."""
    own = sys.argv[1:]
    return bool(own) and sys.orig_argv[-len(own) :] == own


def _restart(error: SteppedDownError, environment: dict[str, str]) -> int:
    """Replace the process by a fresh one that continues the run in the same output folder."""
    say(f"bertbench: {error}")
    sys.stdout.flush()
    environment[CONTINUE_VARIABLE] = str(error.output_dir)
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError as failure:
        return _fail(f"cannot start again ({failure.strerror}): the same command continues", 1)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    say(f"bertbench: {line}")
    return code
