"""What a run does while it trains: show progress, write event files, copy checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bertbench.core.errors import WorkError
from bertbench.core.progress import Advance
from bertbench.core.terminal import say
from bertbench.running.output.cloud_storage import RemoteFolder
from bertbench.running.settings import RunSettings
from finetune.train.evaluation import EvalRecord
from finetune.train.tensorboard import ScalarWriter
from finetune.train.training_loop import Listener, StepRecord


class ProgressListener:
    """Shows the training on the terminal, and knows the last step that was done.

    Attributes:
        done: optimizer steps that are done.
    """

    def __init__(self, advance: Advance, done: int, effective_batch: int) -> None:
        """Begin to listen.

        Args:
            advance: moves the terminal's progress on.
            done: optimizer steps that earlier processes have done.
            effective_batch: examples of a step.
        """
        self.done = done
        self._advance = advance
        self._effective_batch = effective_batch

    def on_step(self, record: StepRecord) -> None:
        """Show loss and speed."""
        self.done = record.step
        rate = self._effective_batch / record.seconds
        self._advance(record.step, f"loss {record.loss:.4f}, {rate:.1f} examples/s")

    def on_evaluation(self, record: EvalRecord) -> None:
        """Say the scores."""
        scores = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
        say(f"step {record.step}: {scores}")

    def on_evaluation_progress(self, examples: int, total: int) -> None:
        """Show how far an evaluation is."""
        self._advance(self.done, f"evaluating {examples}/{total}")

    def listener(self) -> Listener:
        """The functions that the training loop calls."""
        return Listener(on_step=self.on_step, on_evaluation=self.on_evaluation)


@contextlib.contextmanager
def event_files(settings: RunSettings, *, evaluates: bool) -> Iterator[Listener]:
    """Write TensorBoard's event files in the block, if the settings ask for them.

    Args:
        settings: name the folder of the training's events; those of evaluations go to its folder
            `eval`.
        evaluates: whether there are evaluations.

    Yields:
        The listener that writes them.
    """
    if not settings.tensorboard:
        yield Listener()
        return
    folder = settings.output_dir
    with contextlib.ExitStack() as stack:
        train_events = stack.enter_context(contextlib.closing(ScalarWriter(folder)))

        def on_step(record: StepRecord) -> None:
            scalars = {
                "loss": record.loss,
                "learning_rate": record.learning_rate,
                "gradient_norm": record.gradient_norm,
                "examples_per_second": settings.train_batch_size / record.seconds,
            }
            train_events.write(record.step, scalars)

        if not evaluates:
            yield Listener(on_step=on_step)
            return
        eval_events = stack.enter_context(contextlib.closing(ScalarWriter(folder / "eval")))
        yield Listener(
            on_step=on_step,
            on_evaluation=lambda record: eval_events.write(record.step, record.metrics),
        )


def cloud_copy(remote: RemoteFolder | None) -> Listener:
    """Copy the output folder to cloud storage after every checkpoint, if it has a place there.

    If a copy fails the training goes on, because the next copy includes all that is missing.
    """

    def on_save() -> None:
        if remote is None:
            return
        try:
            remote.push()
        except WorkError as error:
            say(f"warning: {error}")

    return Listener(on_save=on_save)


def join_listeners(*listeners: Listener) -> Listener:
    """Make one listener of several, which are told in their order; any of them can stop."""

    def on_step(record: StepRecord) -> None:
        for one in listeners:
            one.on_step(record)

    def on_evaluation(record: EvalRecord) -> None:
        for one in listeners:
            one.on_evaluation(record)

    def on_save() -> None:
        for one in listeners:
            one.on_save()

    return Listener(
        on_step, on_evaluation, on_save, lambda: any(one.should_stop() for one in listeners)
    )
