"""`bertbench devices`: what is said of each device, with facts that are given."""

from __future__ import annotations

import json

from click.testing import CliRunner

from bertbench.cli.devices import command, support_lines
from bertbench.core.units import GIB_BYTES
from bertbench.hardware.device import Device
from bertbench.hardware.tensorflow_support import CUDA_CAPABILITIES, Software

CPU = Device("cpu", 0, "Some CPU (2 cores)", None, 16 * GIB_BYTES, 8 * GIB_BYTES)
LINUX = Software((("tensorflow", "2.21.0"),), CUDA_CAPABILITIES)


def gpu(index: int, capability: float | None) -> Device:
    return Device("gpu", index, "Card", None, GIB_BYTES, GIB_BYTES, compute_capability=capability)


def test_each_gpu_has_its_line() -> None:
    lines = support_lines([gpu(0, 8.6), gpu(1, 5.2), gpu(2, None), CPU], LINUX)
    assert lines[0] == ("gpu:0: TensorFlow can use it: tensorflow 2.21.0, compute capability 8.6")
    assert lines[1].startswith("gpu:1: TensorFlow cannot use it: tensorflow 2.21.0 has no kernels")
    assert lines[2].endswith("tensorflow 2.21.0, unknown compute capability")
    assert len(lines) == 3


def test_a_machine_with_a_cpu_alone_is_told_nothing_more() -> None:
    assert support_lines([CPU], LINUX) == []


def test_a_tpu_is_spoken_of_where_there_are_signs_of_one() -> None:
    (line,) = support_lines([CPU], Software(LINUX.packages, (), tpu_chips=4))
    assert line.startswith(
        "tpu: 4 chips of this machine. TensorFlow cannot use it: tensorflow 2.21"
    )
    assert "pip install tensorflow-tpu==" in line
    package = (("tensorflow-tpu", "2.20.0"),)
    (line,) = support_lines([CPU], Software(package, (), libtpu="0.0.20"))
    assert line.startswith("tpu: TensorFlow can use it: tensorflow-tpu 2.20.0, libtpu 0.0.20")


def test_json_has_the_reasons() -> None:
    result = CliRunner().invoke(command, ["--json", "-"], catch_exceptions=False)
    values = json.loads(result.output)
    assert set(values["tpu"]) == {"chips", "usable", "why", "remedy"}
    cpu = values["devices"][-1]
    assert (cpu["kind"], cpu["compute_capability"], cpu["tensorflow"]) == ("cpu", None, None)
    for device in values["devices"][:-1]:
        assert set(device["tensorflow"]) == {"usable", "why", "remedy"}
