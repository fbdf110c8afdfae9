"""Whether XLA's compilers are installed, and which versions, without importing them."""

from __future__ import annotations

from importlib import metadata

from finetune.errors import InputError

_PACKAGES = {
    "cpu": ("tensorflow",),
    "gpu": ("jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"),
    "tpu": ("libtpu",),
}
"""Packages that compile for a kind of device; for the CPU TensorFlow itself. The plug-in of CUDA 13
does not compile for GPUs of compute capability 6.0 to 7.0 any more."""


def compiler_versions(kind: str) -> dict[str, str]:
    """Versions of the packages that compile for a kind of device, by name.

    Args:
        kind: `cpu`, `gpu` or `tpu`.

    Raises:
        InputError: one is not installed; the message says what to install.
    """
    versions = {}
    for name in _PACKAGES[kind]:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise InputError(
                f"XLA's compiler for a {kind.upper()} needs the package {name}, which is not "
                "installed",
                hint=f"pip install 'bertbench[compile-{kind}]'",
            ) from error
    return versions


def has_compiler(kind: str) -> bool:
    """Whether everything is installed that compiles for a kind of device."""
    try:
        compiler_versions(kind)
    except InputError:
        return False
    return True
