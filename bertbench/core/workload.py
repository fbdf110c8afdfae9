"""Workloads, levers, and the training steps that they make up.

Memory, time and limits are predicted and measured for these values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from finetune.errors import InputError
from finetune.spec.checkpointing import NO_CHECKPOINTING, Checkpointing, parse_checkpointing
from finetune.spec.config import HEADS, BertConfig, is_trained, preset, variable_shapes
from finetune.spec.optimizers import EXACT_OPTIMIZER, OPTIMIZERS, PLACEMENTS
from finetune.spec.precisions import EXACT_PRECISION, PRECISIONS
from finetune.spec.step_settings import ModelSpec, StepSettings
from finetune.storage.json_files import build, get_whole, json_text, parse_json

MAX_BATCH = 1 << 20
"""Largest batch that is accepted; BERT has been trained with 2 ** 16 (You et al. 2020, "LAMB")."""

_MAX_LABELS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model configuration, a task head and a sequence length.

    Attributes:
        model: name of the model, for people; `key` leaves it out.
        config: shape of the encoder.
        head: one of `finetune.spec.config.HEADS`.
        seq_len: tokens per example.
        num_labels: classes of the classifier; the SQuAD head has two outputs.
    """

    model: str
    config: BertConfig
    head: str
    seq_len: int
    num_labels: int = 2

    def __post_init__(self) -> None:
        """Refuse a workload that no graph could be built for."""
        if self.head not in HEADS:
            raise InputError(f"unknown task head {self.head!r}", hint=f"use {' or '.join(HEADS)}")
        if not 1 <= self.num_labels <= _MAX_LABELS:
            raise InputError(f"{self.num_labels:,} labels; a classifier has 1 to {_MAX_LABELS:,}")
        if not 1 <= self.seq_len <= self.config.max_position_embeddings:
            raise InputError(
                f"sequence length {self.seq_len} is outside 1 to "
                f"{self.config.max_position_embeddings}, the positions that {self.model} has "
                "embeddings for"
            )

    @property
    def parameters(self) -> dict[str, list[int]]:
        """Shape of every variable by name."""
        return variable_shapes(self.config, self.head, self.num_labels)

    @property
    def spec(self) -> ModelSpec:
        """The model as `finetune` takes it."""
        return ModelSpec(self.config, self.head, self.seq_len)

    def trained(self, name: str) -> bool:
        """Whether a variable of this workload receives gradients."""
        return is_trained(name, self.head)

    def key(self) -> str:
        """Canonical text of everything but the name, by which workloads are compared."""
        values = {**dataclasses.asdict(self), "config": self.config.values()}
        del values["model"]
        return json_text(values, sort_keys=True)

    def model_key(self) -> str:
        """Canonical text of everything but the name and the sequence length."""
        values = {**dataclasses.asdict(self), "config": self.config.values()}
        del values["model"], values["seq_len"]
        return json_text(values, sort_keys=True)


def workload_from_key(model: str, key: str) -> Workload:
    """Read a workload from the text of `Workload.key`.

    Args:
        model: name of the model, which is not part of the key.
        key: the text.

    Raises:
        InputError: the text is not the key of a workload of this version.
    """
    try:
        values = parse_json(key)
    except ValueError as error:
        raise InputError(f"not a workload ({error})") from error
    if not isinstance(values, dict):
        raise InputError("not a workload")
    return workload_from_json({"model": model, **values})


def workload_from_json(values: Mapping[str, Any]) -> Workload:
    """Read a workload from the values that `dataclasses.asdict` returns for it.

    Raises:
        InputError: the values are not those of a workload of this version.
    """
    config = values.get("config")
    shape = {field.name for field in dataclasses.fields(BertConfig)}
    if not isinstance(config, dict) or not config.keys() <= shape:
        raise InputError("a workload of another version")
    return build(Workload, {**values, "config": build(BertConfig, config)})


def published_workload(model: str, seq_len: int, head: str = "squad") -> Workload:
    """Return the workload of a published model size.

    Raises:
        InputError: the model or the head is unknown, or the sequence is too long for the model.
    """
    return Workload(model.lower().replace("_", "-"), preset(model), head, seq_len)


@dataclasses.dataclass(frozen=True)
class Levers:
    """The levers of a training step: all that is chosen but the micro-batch.

    Example:
        >>> Levers(parse_checkpointing("full"), accumulation_steps=4).describe_fully()
        'full, 4 micro-batches'

    Attributes:
        checkpointing: which activations are kept.
        accumulation_steps: micro-batches per optimizer step; above 1 the step holds accumulators.
        precision: one of `finetune.spec.precisions.PRECISIONS`.
        optimizer: one of `finetune.spec.optimizers.OPTIMIZERS`.
        xla: whether the step is compiled by XLA.
        placement: of the optimizer's state, one of `finetune.spec.optimizers.PLACEMENTS`.
    """

    checkpointing: Checkpointing = NO_CHECKPOINTING
    accumulation_steps: int = 1
    precision: str = EXACT_PRECISION
    optimizer: str = EXACT_OPTIMIZER
    xla: bool = False
    placement: str = PLACEMENTS[0]

    @property
    def inexact(self) -> tuple[str, ...]:
        """Names of the levers that make the update differ from the published recipe's."""
        exact = (EXACT_PRECISION, EXACT_OPTIMIZER)
        return tuple(name for name in (self.precision, self.optimizer) if name not in exact)

    @property
    def exact(self) -> bool:
        """Whether the update is the same as that of the published recipe."""
        return not self.inexact

    def describe(self) -> str:
        """Write all but the number of micro-batches for people: `full`, `nested, adafactor`."""
        on_host = ["optimizer state on the host"] * (self.placement == "host")
        return ", ".join([str(self.checkpointing), *self.inexact, *["XLA"] * self.xla, *on_host])

    def describe_fully(self) -> str:
        """Write all levers for people: `full`, `nested, adafactor, 4 micro-batches`."""
        steps = self.accumulation_steps
        return self.describe() + (f", {steps} micro-batches" if steps > 1 else "")

    def step_settings(self, seed: int = 0) -> StepSettings:
        """The levers as `finetune` takes them; the optimizer is not among them.

        Args:
            seed: seed of the dropout masks.
        """
        return StepSettings(
            self.accumulation_steps,
            self.checkpointing,
            self.precision,
            self.xla,
            self.placement,
            seed,
        )

    def to_json(self) -> dict[str, Any]:
        """Values for JSON, with the policy as text."""
        return {**dataclasses.asdict(self), "checkpointing": str(self.checkpointing)}

    def key(self) -> str:
        """Canonical text for the ledger."""
        return json_text(self.to_json(), sort_keys=True)


def check_layers(workload: Workload, checkpointing: Checkpointing) -> None:
    """Check that a model has the number of layers that a checkpointing policy names.

    Raises:
        InputError: the number is 0, or larger than the model's.
    """
    layers, most = checkpointing.layers, workload.config.num_hidden_layers
    if layers is not None and not 1 <= layers <= most:
        raise InputError(
            f"checkpointing {checkpointing}: {workload.model} has {most} layers",
            hint=f"give 1 to {most} layers, or {checkpointing.policy} for all",
        )


def levers_from_json(values: dict[str, Any]) -> Levers:
    """Read levers from the values of `Levers.to_json`; unknown keys are ignored.

    Raises:
        InputError: a value is unknown, or has another type.
    """
    chosen = dict(values)
    if "checkpointing" in chosen:
        if not isinstance(chosen["checkpointing"], str):
            raise InputError(f"{chosen['checkpointing']!r} is not a checkpointing policy")
        chosen["checkpointing"] = parse_checkpointing(chosen["checkpointing"])
    get_whole(chosen, "accumulation_steps", 1, MAX_BATCH, default=1)
    levers = build(Levers, chosen)
    for kind, name, known_names in (
        ("optimizer", levers.optimizer, OPTIMIZERS),
        ("precision", levers.precision, PRECISIONS),
        ("placement", levers.placement, PLACEMENTS),
    ):
        if name not in known_names:
            raise InputError(
                f"unknown {kind} {name!r}", hint=f"use one of {', '.join(known_names)}"
            )
    return levers


@dataclasses.dataclass(frozen=True)
class Setup:
    """A workload and its levers: a training step without the size of its micro-batch.

    Example:
        >>> setup = Setup(published_workload("bert-tiny", 128))
        >>> setup.step(8).micro_batch
        8

    Attributes:
        workload: model, head and sequence length.
        levers: lever settings, including the number of micro-batches.
    """

    workload: Workload
    levers: Levers = Levers()

    def step(self, micro_batch: int) -> TrainingStep:
        """Return the training step with this number of examples in each micro-batch."""
        return TrainingStep(self, micro_batch)


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """One optimizer step: a setup with the size of its micro-batch.

    Attributes:
        setup: workload and levers.
        micro_batch: number of examples in one forward and backward pass.
    """

    setup: Setup
    micro_batch: int

    @property
    def workload(self) -> Workload:
        """Model, head and sequence length."""
        return self.setup.workload

    @property
    def levers(self) -> Levers:
        """Lever settings."""
        return self.setup.levers
