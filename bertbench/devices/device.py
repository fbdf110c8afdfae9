"""Devices and budgets: what a training step can run on, and how many of its bytes it may use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bertbench.core.units import GIB_BYTES, MIB_BYTES, format_bytes
from bertbench.devices.host import host_memory
from finetune.errors import InputError
from finetune.storage.json_files import MOST_WHOLE, build, get_whole, json_text

GPU_CONTEXT_RESERVE_BYTES = 600 * MIB_BYTES
"""Left free on a GPU by default: the CUDA context and the handles and workspaces of cuBLAS and
cuDNN live outside TensorFlow's allocator (300 to 600 MiB, by card and CUDA version)."""

CPU_SHARE = 0.75
"""Part of the available host memory that a default budget takes: Python, TensorFlow's code and
the input pipeline live outside the allocator, and the machine must not begin to swap."""

TPU_CORE_BYTES = 8 * GIB_BYTES
"""Memory of a core of a Cloud TPU v2, the smallest (Google Cloud's system architecture page)."""

_DESKTOP_SHARE, _DESKTOP_BYTES = 0.1, 1024 * MIB_BYTES


@dataclasses.dataclass(frozen=True)
class TpuSettings:
    """Where a Cloud TPU is, as the flags of the original's scripts say it.

    Attributes:
        name: `--tpu_name`, or a `grpc://` address; None asks the environment.
        zone: `--tpu_zone`, as in `us-central1-b`.
        project: `--gcp_project`.
        cores: `--num_tpu_cores`.
    """

    name: str | None = None
    zone: str | None = None
    project: str | None = None
    cores: int = 8


@dataclasses.dataclass(frozen=True)
class Device:
    """Something that a training step can run on.

    Attributes:
        kind: `cpu`, `gpu` or `tpu`.
        index: number among devices of its kind; for GPUs NVML's, which is PCI bus order.
        name: product name; for a CPU with the number of usable cores.
        uuid: NVML's identifier of a GPU.
        total_bytes: memory of the device; for a CPU what its control groups allow.
        free_bytes: memory that nobody holds.
        held_by: (process id, process name, bytes) of every process with memory on a GPU.
        driver: version of a GPU's driver.
        tpu: where a TPU is. Its bytes are those of one core, and cannot be asked for before
            connecting.
        peers: further GPUs, each as this one and with as much memory of its own, that share an
            effective batch with it; see `together`.
    """

    kind: str
    index: int
    name: str
    uuid: str | None
    total_bytes: int
    free_bytes: int
    held_by: tuple[tuple[int, str, int], ...] = ()
    driver: str | None = None
    tpu: TpuSettings | None = None
    peers: tuple[Device, ...] = ()

    @property
    def label(self) -> str:
        """Name on the command line: `cpu`, `gpu:0`, `gpu:0,gpu:1`, `tpu:NAME`."""
        if self.tpu is not None:
            return f"tpu:{self.tpu.name}" if self.tpu.name else "tpu"
        own = self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"
        return ",".join([own, *(peer.label for peer in self.peers)])

    @property
    def each(self) -> tuple[Device, ...]:
        """This device and its peers, each alone."""
        return (dataclasses.replace(self, peers=()), *self.peers)

    @property
    def replicas(self) -> int:
        """Copies of the model that train together, each on its own memory."""
        return 1 + len(self.peers) if self.tpu is None else self.tpu.cores

    def key(self) -> str:
        """Canonical text for the ledger: equal for devices whose trials tell the same.

        Peers do not count: a trial runs on one of them.
        """
        return json_text(self.key_values(), sort_keys=True)

    def key_values(self) -> dict[str, Any]:
        """What `key` is the text of."""
        values = {"kind": self.kind, "name": self.name, "driver": self.driver}
        if self.tpu is not None:
            values["tpu"] = f"{self.tpu.zone} {self.tpu.project}"
        return values

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return dataclasses.asdict(self)


def device_from_json(values: dict[str, Any]) -> Device:
    """Read what `Device.to_json` wrote; unknown keys are ignored.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(values, dict):
        raise InputError("not a device")
    tpu, peers, held = values.get("tpu"), values.get("peers") or (), values.get("held_by") or ()
    whole = all(isinstance(one, list | tuple) and len(one) == 3 for one in held)
    if not isinstance(peers, list | tuple) or not whole:
        raise InputError("not a device")
    device = build(
        Device,
        {
            **values,
            "held_by": tuple((pid, str(name), size) for pid, name, size in held),
            "tpu": build(TpuSettings, tpu) if tpu else None,
            "peers": tuple(map(device_from_json, peers)),
        },
    )
    if min(device.total_bytes, device.free_bytes, device.index) < 0:
        raise InputError("not a device")
    return device


def together(devices: Sequence[Device]) -> Device:
    """Have GPUs share an effective batch, each with its part of it.

    Args:
        devices: at least one; the first stands for all.

    Raises:
        InputError: several that are not different GPUs of one kind.
    """
    first, *peers = devices
    names = ",".join(device.label for device in devices)
    if peers and any(device.kind != "gpu" for device in devices):
        raise InputError(f"--device {names}: only GPUs share a batch", hint="name one device")
    check_alike(devices)
    return dataclasses.replace(first, peers=tuple(peers))


def check_alike(devices: Sequence[Device]) -> None:
    """Refuse devices that have several limits, or one that is named twice.

    Raises:
        InputError: they are not different ones of one kind.
    """
    names = ",".join(device.label for device in devices)
    if len({(device.kind, device.index, device.uuid) for device in devices}) < len(devices):
        raise InputError(f"--device {names} names a device twice")
    if len({(device.name, device.driver, device.total_bytes) for device in devices}) > 1:
        raise InputError(
            f"--device {names}: devices of several kinds have several limits",
            hint="use them one after the other",
        )


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes of a device that TensorFlow's allocator may use.

    Attributes:
        device: where; with peers, each has a budget of its own of this size.
        budget_bytes: whole MiB, because TensorFlow's limits are; `make_budget` rounds down.
    """

    device: Device
    budget_bytes: int

    def __post_init__(self) -> None:
        """Refuse what the device cannot hold."""
        if self.budget_bytes < MIB_BYTES:
            raise InputError(f"a budget of {self.budget_bytes} bytes is below 1 MiB")
        if self.budget_bytes > self.device.total_bytes:
            raise InputError(
                f"a budget of {format_bytes(self.budget_bytes)} is more than the "
                f"{format_bytes(self.device.total_bytes)} of {self.device.label} "
                f"({self.device.name})",
                hint="give a smaller --memory",
            )

    def key(self) -> str:
        """Canonical text for the ledger: equal where the same trial has the same outcome."""
        values = {**self.device.key_values(), "budget_bytes": self.budget_bytes}
        return json_text(values, sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {"device": self.device.to_json(), "budget_bytes": self.budget_bytes}


def budget_from_json(values: dict[str, Any]) -> Budget:
    """Read what `Budget.to_json` wrote.

    Raises:
        InputError: it is something else.
    """
    size_bytes = get_whole(values, "budget_bytes", 1, MOST_WHOLE)
    return Budget(device_from_json(values.get("device", {})), size_bytes)


def default_budget_bytes(device: Device) -> int:
    """Bytes that a training step may use when the user does not say, in whole MiB.

    A GPU's free memory less `GPU_CONTEXT_RESERVE_BYTES`, or `CPU_SHARE` of the available host
    memory; all of a TPU's core, which nobody shares and whose limit is not ours to set.

    Raises:
        InputError: too little memory is free.
    """
    if device.kind == "tpu":
        budget_bytes = device.total_bytes
    elif device.kind == "cpu":
        budget_bytes = int(device.free_bytes * CPU_SHARE)
    else:
        least_bytes = min(one.free_bytes for one in device.each)
        budget_bytes = least_bytes - GPU_CONTEXT_RESERVE_BYTES
    budget_bytes = budget_bytes // MIB_BYTES * MIB_BYTES
    if budget_bytes < MIB_BYTES:
        raise InputError(f"{device.label} has too little free memory: {describe_use(device)}")
    return budget_bytes


def make_budget(device: Device, budget_bytes: int | None = None) -> Budget:
    """Budget of a device, rounded down to whole MiB; None means `default_budget_bytes`.

    Raises:
        InputError: more than the device has, or too little is free for a default.
    """
    if budget_bytes is None:
        return Budget(device, default_budget_bytes(device))
    return Budget(device, budget_bytes // MIB_BYTES * MIB_BYTES)


def check_free(budget: Budget) -> None:
    """Refuse a budget that cannot be had now, because others hold the device's memory.

    A trial in such a budget would meet the end of the device before the end of the budget, and
    a limit would be reported that belongs to somebody else's process.

    Raises:
        InputError: less than the budget is free.
    """
    for device in budget.device.each:
        if budget.budget_bytes > device.free_bytes:
            raise InputError(
                f"a budget of {format_bytes(budget.budget_bytes)} is more than {device.label} "
                f"has free: {describe_use(device)}",
                hint="give a smaller --memory, or end what holds the memory",
            )


def check_alone(device: Device) -> None:
    """Refuse a GPU that others use: they may take or give back memory while it is measured.

    The little that a desktop holds is let pass.

    Raises:
        InputError: others hold more than that.
    """
    # Boards with one memory for CPU and GPU are never free of others.
    if device.kind != "gpu" or device.total_bytes == host_memory()[0]:
        return
    held_bytes = device.total_bytes - device.free_bytes
    if held_bytes > max(device.total_bytes * _DESKTOP_SHARE, _DESKTOP_BYTES):
        raise InputError(
            f"others use {device.label}: {describe_use(device)}",
            hint="end them, choose another --device, or probe what is free now with --share",
        )


def describe_use(device: Device) -> str:
    """Free and total memory and who holds the rest, as one line; with peers, of the fullest."""
    fullest = min(device.each, key=lambda one: one.free_bytes)
    held = "".join(
        f"; process {pid} ({name}) holds {format_bytes(size)}"
        for pid, name, size in fullest.held_by
    )
    return f"{format_bytes(fullest.free_bytes)} of {format_bytes(fullest.total_bytes)} free{held}"
