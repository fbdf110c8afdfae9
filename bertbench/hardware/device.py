"""Devices, and budgets: the bytes of a device that a training step may use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bertbench.core.units import GIB_BYTES, MIB_BYTES, format_bytes
from bertbench.hardware.host import host_memory
from finetune.errors import InputError
from finetune.storage.json_files import MAX_WHOLE, build, get_whole, json_text

GPU_CONTEXT_RESERVE_BYTES = 600 * MIB_BYTES
"""Bytes of a GPU that the default budget leaves free. The CUDA context and the workspaces of
cuBLAS and cuDNN are outside TensorFlow's allocator: 300 to 600 MiB, by GPU and CUDA version."""

CPU_FRACTION = 0.75
"""Fraction of the available host memory that the default budget of a CPU takes. Python,
TensorFlow's code and the input pipeline are outside the allocator, and nothing may be swapped."""

TPU_CORE_BYTES = 8 * GIB_BYTES
"""Memory of a core of a Cloud TPU v2, the smallest (Google Cloud's system architecture page)."""

_DESKTOP_FRACTION, _DESKTOP_BYTES = 0.1, 1024 * MIB_BYTES
"""Memory of a GPU, the larger of the two, that other processes may hold during a probe."""


@dataclasses.dataclass(frozen=True)
class TpuSettings:
    """Address of a Cloud TPU, with a field for each flag of the original scripts.

    Attributes:
        name: `--tpu_name`, or a `grpc://` address; None takes the one that the environment names.
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
    """A CPU, GPU or TPU core, or several GPUs that share an effective batch.

    Attributes:
        kind: `cpu`, `gpu` or `tpu`.
        index: number among the devices of this kind; GPUs are numbered by NVML in PCI bus order.
        name: product name; that of a CPU includes the number of usable cores.
        uuid: NVML's identifier of a GPU.
        total_bytes: memory of the device; of a CPU the host memory that its control groups allow.
            That of a TPU is the memory of one core, as assumed: it is not known before connecting.
        free_bytes: memory that no process holds.
        held_by: (process id, process name, bytes) of every process with memory on a GPU.
        driver: version of a GPU's driver.
        tpu: address of a TPU; None for other kinds.
        peers: further GPUs of the same kind that share an effective batch with this one, each with
            memory of its own; see `join_gpus`.
        compute_capability: CUDA's version of what a GPU can do; None if the driver does not tell
            it, and for other kinds.
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
    compute_capability: float | None = None

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
        """Number of copies of the model that train together, each on memory of its own."""
        return 1 + len(self.peers) if self.tpu is None else self.tpu.cores

    def key(self) -> str:
        """Canonical text for the ledger: equal for devices whose trials can be compared.

        It leaves out peers, because a trial runs on one device.
        """
        return json_text(self.key_values(), sort_keys=True)

    def key_values(self) -> dict[str, Any]:
        """The values that `key` writes as text."""
        values = {"kind": self.kind, "name": self.name, "driver": self.driver}
        if self.tpu is not None:
            values["tpu"] = f"{self.tpu.zone} {self.tpu.project}"
        return values

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return dataclasses.asdict(self)


def device_from_json(values: dict[str, Any]) -> Device:
    """Read a device from the values of `Device.to_json`; unknown keys are ignored.

    Raises:
        InputError: the values are not those of a device.
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


def join_gpus(devices: Sequence[Device]) -> Device:
    """Make one device of GPUs that share an effective batch.

    Args:
        devices: at least one; the others become peers of the first.

    Raises:
        InputError: there are several, and they are not different GPUs of one product.
    """
    first, *peers = devices
    names = ",".join(device.label for device in devices)
    if peers and any(device.kind != "gpu" for device in devices):
        raise InputError(f"--device {names}: only GPUs share a batch", hint="name one device")
    check_alike(devices)
    return dataclasses.replace(first, peers=tuple(peers))


def check_alike(devices: Sequence[Device]) -> None:
    """Check that devices are of one product, so that a limit of one is the limit of all.

    Raises:
        InputError: they are of several products, or one is named twice.
    """
    names = ",".join(device.label for device in devices)
    if len({(device.kind, device.index, device.uuid) for device in devices}) < len(devices):
        raise InputError(f"--device {names} names a device twice")
    if len({(device.name, device.driver, device.total_bytes) for device in devices}) > 1:
        raise InputError(
            f"--device {names}: devices of several products have several limits",
            hint="use them one after the other",
        )


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes of a device that TensorFlow's allocator may use.

    Attributes:
        device: the device; each of its peers has a budget of the same size.
        budget_bytes: size in whole MiB, as TensorFlow takes it; `make_budget` rounds down.
    """

    device: Device
    budget_bytes: int

    def __post_init__(self) -> None:
        """Refuse a budget that is larger than the device's memory."""
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
        """Canonical text for the ledger: equal where a trial has the same outcome."""
        values = {**self.device.key_values(), "budget_bytes": self.budget_bytes}
        return json_text(values, sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {"device": self.device.to_json(), "budget_bytes": self.budget_bytes}


def budget_from_json(values: dict[str, Any]) -> Budget:
    """Read a budget from the values of `Budget.to_json`.

    Raises:
        InputError: the values are not those of a budget.
    """
    size_bytes = get_whole(values, "budget_bytes", 1, MAX_WHOLE)
    return Budget(device_from_json(values.get("device", {})), size_bytes)


def default_budget_bytes(device: Device) -> int:
    """Return the bytes of a budget for which the user names no size, in whole MiB.

    - GPU: the free memory less `GPU_CONTEXT_RESERVE_BYTES`; with peers that of the GPU with the
      least free memory.
    - CPU: `CPU_FRACTION` of the available host memory.
    - TPU: all memory of a core. No other process shares it, and no smaller budget can be set.

    Raises:
        InputError: too little memory is free.
    """
    if device.kind == "tpu":
        budget_bytes = device.total_bytes
    elif device.kind == "cpu":
        budget_bytes = int(device.free_bytes * CPU_FRACTION)
    else:
        least_bytes = min(one.free_bytes for one in device.each)
        budget_bytes = least_bytes - GPU_CONTEXT_RESERVE_BYTES
    budget_bytes = budget_bytes // MIB_BYTES * MIB_BYTES
    if budget_bytes < MIB_BYTES:
        raise InputError(f"{device.label} has too little free memory: {describe_use(device)}")
    return budget_bytes


def budget_bytes_if_free(device: Device) -> int:
    """Return `default_budget_bytes`, or 0 where too little memory is free."""
    try:
        return default_budget_bytes(device)
    except InputError:
        return 0


def make_budget(device: Device, budget_bytes: int | None = None) -> Budget:
    """Make a budget, rounded down to whole MiB.

    Args:
        device: the device.
        budget_bytes: its size; None takes `default_budget_bytes`.

    Raises:
        InputError: the device has less memory, or too little is free for a default.
    """
    if budget_bytes is None:
        return Budget(device, default_budget_bytes(device))
    return Budget(device, budget_bytes // MIB_BYTES * MIB_BYTES)


def check_free(budget: Budget) -> None:
    """Check that the whole budget is free on the device now.

    Otherwise a trial would run out of the device's free memory before it has used the budget, and
    the limit that is reported would depend on other processes.

    Raises:
        InputError: less memory than the budget is free.
    """
    for device in budget.device.each:
        if budget.budget_bytes > device.free_bytes:
            raise InputError(
                f"a budget of {format_bytes(budget.budget_bytes)} is more than {device.label} "
                f"has free: {describe_use(device)}",
                hint="give a smaller --memory, or end what holds the memory",
            )


def check_alone(device: Device) -> None:
    """Check that no other process uses a GPU, because its memory may change during the trials.

    The memory that a desktop takes is allowed.

    Raises:
        InputError: other processes hold more than that.
    """
    # Where CPU and GPU share one memory, other processes always hold some of it.
    if device.kind != "gpu" or device.total_bytes == host_memory()[0]:
        return
    held_bytes = device.total_bytes - device.free_bytes
    if held_bytes > max(device.total_bytes * _DESKTOP_FRACTION, _DESKTOP_BYTES):
        raise InputError(
            f"other processes use {device.label}: {describe_use(device)}",
            hint="end them, choose another --device, or probe what is free now with --share",
        )


def describe_use(device: Device) -> str:
    """Describe in one line the free memory and the processes that hold the rest.

    Of several GPUs it describes the one with the least free memory.
    """
    fullest = min(device.each, key=lambda one: one.free_bytes)
    held = "".join(
        f"; process {pid} ({name}) holds {format_bytes(size)}"
        for pid, name, size in fullest.held_by
    )
    return f"{format_bytes(fullest.free_bytes)} of {format_bytes(fullest.total_bytes)} free{held}"
