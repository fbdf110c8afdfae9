"""Training state on disk, in the format and under the names of the original's checkpoints.

`model.ckpt-N` holds the weights, the optimizer's state (Adam's moments are `…/adam_m` and
`…/adam_v`) and `global_step`. So the original's tools can read it, and any output folder can be the
`init_checkpoint` of another training.

A checkpoint exists only once it is complete: its files are written under a temporary name, flushed
and renamed, and then the file `checkpoint` is replaced. `finetune.model_files.checkpoint_files`
finds the checkpoints of a folder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import tensorflow as tf

from finetune.errors import DamagedFileError, InputError
from finetune.model.modeling import Variables
from finetune.model.weights import open_tf_checkpoint
from finetune.model_files.checkpoint_files import (
    DATA,
    INDEX,
    PREFIX,
    STATE_FILE,
    list_checkpoints,
    remove_half_written,
)
from finetune.storage.files import write_atomically
from finetune.train.optimization import OptimizerState

_logger = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2
_SUFFIXES = (DATA, INDEX)


def _named_state(variables: Variables, state: OptimizerState) -> dict[str, tf.Variable]:
    trained = [name for name, variable in variables.items() if variable.trainable]
    return {
        **variables,
        **{
            f"{name}/{slot}": variable
            for name, slots in zip(trained, state.slots, strict=True)
            for slot, variable in slots.items()
        },
        "global_step": state.step,
        **_named_loss_scale(state),
    }


def _named_loss_scale(state: OptimizerState) -> dict[str, tf.Variable]:
    if state.loss_scale is None:
        return {}
    return {
        "loss_scale": state.loss_scale.scale,
        "loss_scale_updates": state.loss_scale.updates,
    }


def save_state(output_dir: Path, variables: Variables, state: OptimizerState) -> Path:
    """Write a checkpoint of the current step and remove all but the newest `KEPT_CHECKPOINTS`.

    Args:
        output_dir: an existing folder.
        variables: the model.
        state: the optimizer's state.

    Returns:
        The checkpoint's prefix.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; the checkpoints in it are as
            before.
    """
    prefix = _write(output_dir, _named_state(variables, state), int(state.step.numpy()))
    others = [checkpoint for checkpoint in list_checkpoints(output_dir) if checkpoint != prefix]
    for old in others[: 1 - KEPT_CHECKPOINTS]:
        _remove(old)
    return prefix


def save_weights(output_dir: Path, variables: Variables, step: int) -> Path:
    """Write the weights alone, without optimizer state, and remove those of earlier steps.

    Args:
        output_dir: a folder that holds nothing but one such checkpoint. A missing folder is
            created, but not the folders above it.
        variables: the model.
        step: number of optimizer steps that the weights have had.

    Returns:
        The checkpoint's prefix.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    output_dir.mkdir(exist_ok=True)
    prefix = _write(output_dir, variables, step)
    for old in list_checkpoints(output_dir):
        if old != prefix:
            _remove(old)
    return prefix


def _write(output_dir: Path, named: Mapping[str, tf.Variable], step: int) -> Path:
    prefix = output_dir / f"{PREFIX}{step}"
    temporary = output_dir / f".tmp-{prefix.name}"
    remove_half_written(output_dir)
    try:
        tf.raw_ops.SaveV2(
            prefix=str(temporary),
            tensor_names=list(named),
            shape_and_slices=[""] * len(named),
            tensors=[variable.read_value() for variable in named.values()],
        )
        # The index last: a checkpoint is found by it.
        for suffix in _SUFFIXES:
            _flush(Path(f"{temporary}{suffix}"))
            os.replace(f"{temporary}{suffix}", f"{prefix}{suffix}")
    except tf.errors.OpError as error:
        if isinstance(error, tf.errors.ResourceExhaustedError) and "OOM" in str(error):
            raise
        # TensorFlow's file system wraps what the operating system said.
        raise OSError(f"cannot write the checkpoint {prefix} ({error.message})") from error
    finally:
        remove_half_written(output_dir)
    _write_state_file(output_dir, prefix.name)
    return prefix


def restore_state(output_dir: Path, variables: Variables, state: OptimizerState) -> int | None:
    """Continue from the newest complete checkpoint of a folder.

    One that cannot be read, as after a disk error, is passed over with a warning: an older one
    only costs the steps since it. Afterwards the file `checkpoint` names what was restored.

    Args:
        output_dir: the folder; it need not exist.
        variables: the model; changed.
        state: the optimizer's state; changed.

    Returns:
        The step that was restored, or None where there is no checkpoint.

    Raises:
        InputError: the newest checkpoint is of another model, or all are damaged.
        OSError: the file `checkpoint` cannot be written.
    """
    every = _named_state(variables, state)
    first_damage: InputError | None = None
    for prefix in reversed(list_checkpoints(output_dir)):
        hint = "choose another output folder, or remove this one"
        try:
            shapes, read = open_tf_checkpoint(prefix, hint=hint)
            # The checkpoint may have been written in a precision that scales no loss.
            missing = set(_named_loss_scale(state)) - set(shapes)
            named = {name: v for name, v in every.items() if name not in missing}
            _check_shapes(prefix, shapes, named, hint)
            for name, variable in named.items():
                value = read(name)
                if value.dtype != variable.dtype.as_numpy_dtype:
                    raise DamagedFileError(f"{name} has type {value.dtype}", path=prefix, hint=hint)
                variable.assign(value)
        except DamagedFileError as error:
            _logger.warning("passing over a damaged checkpoint: %s", error)
            first_damage = first_damage or error
            continue
        # For the original's tools; a kill or a full disk may have left it behind.
        _write_state_file(output_dir, prefix.name)
        return int(state.step.numpy())
    if first_damage is not None:
        raise first_damage
    return None


def _check_shapes(
    prefix: Path, shapes: Mapping[str, tuple[int, ...]], named: Mapping[str, tf.Variable], hint: str
) -> None:
    for name, variable in named.items():
        if shapes.get(name) != tuple(variable.shape):
            raise InputError(
                f"the checkpoint to continue from has no {name} of shape "
                f"{variable.shape.as_list()}",
                path=prefix,
                hint=hint,
            )


def _remove(prefix: Path) -> None:
    # The index first: what is left of a checkpoint half removed must not look like one.
    for suffix in reversed(_SUFFIXES):
        Path(f"{prefix}{suffix}").unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_state_file(output_dir: Path, newest: str) -> None:
    """Name the newest checkpoint in the text form that `tf.train.latest_checkpoint` reads."""
    path = output_dir / STATE_FILE
    text = f'model_checkpoint_path: "{newest}"\nall_model_checkpoint_paths: "{newest}"\n'
    if not path.is_file() or path.read_bytes() != text.encode():
        write_atomically(path, text)
