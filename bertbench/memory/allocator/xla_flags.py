"""The flag of XLA that trials, runs, and compilations for a GPU elsewhere have in common."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.errors import InputError

_PASS = "rematerialization"
_DISABLED_RE = re.compile(r"(?<!\S)--xla_disable_hlo_passes=(\S*)")


def without_rematerialization(flags: str) -> str:
    """Add to the flags of XLA's compilers that they compute no activation a second time.

    When a program would take more than about four fifths of a GPU's memory, XLA computes some
    results again instead of keeping them. Which ones it chooses depends on small things: BERT-Base
    at sequence length 512 took 11,055 MB of a Titan X with 27 examples and 17,518 MB with 28. The
    checkpointing policies do the same for less time, and what they need is close to a line in the
    batch. JAX's developers give the same advice (github.com/jax-ml/jax, pull request 23738).

    Example:
        >>> without_rematerialization("--xla_gpu_cuda_data_dir=/usr/local/cuda")
        '--xla_gpu_cuda_data_dir=/usr/local/cuda --xla_disable_hlo_passes=rematerialization'

    Args:
        flags: value of the environment variable `XLA_FLAGS`, as a user may have set it. A value
            that does not begin with `-` names a file with flags.

    Raises:
        InputError: that file cannot be read.
    """
    if flags.strip() and not flags.strip().startswith("-"):
        # XLA takes it for the name of a file with flags.
        try:
            flags = Path(flags.strip()).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise InputError(
                f"XLA_FLAGS names a file that cannot be read ({error})",
                hint="unset XLA_FLAGS, or correct it",
            ) from error
    found = _DISABLED_RE.findall(flags)
    # Of several such flags XLA takes the last.
    passes = [name for name in found[-1].split(",") if name] if found else []
    if _PASS in passes:
        return flags
    others = _DISABLED_RE.sub("", flags).strip()
    return f"{others} --xla_disable_hlo_passes={','.join([*passes, _PASS])}".strip()
