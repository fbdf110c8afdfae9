"""Record what a process asks of TensorFlow's allocator, by TensorFlow's own profiler."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from bertbench.memory.allocator.recording import Recording

_ALLOCATION, _RELEASE = b"MemoryAllocation", b"MemoryDeallocation"


@contextlib.contextmanager
def recorded_allocations(device: str) -> Iterator[list[Recording]]:
    """Record a device's allocations inside a `with` statement.

    Nothing that was allocated before may be freed inside. If that happens, or if the profiler gave
    nothing, there is no recording.

    Args:
        device: TensorFlow's name of the device, `CPU:0` or `GPU:0`.

    Yields:
        A list, to which the recording is added when the statement ends.
    """
    result: list[Recording] = []
    with tempfile.TemporaryDirectory(prefix="bertbench-") as folder:
        options = tf.profiler.experimental.ProfilerOptions(
            host_tracer_level=2, python_tracer_level=0, device_tracer_level=0
        )
        tf.profiler.experimental.start(folder, options)
        try:
            yield result
        finally:
            tf.profiler.experimental.stop()
        for path in sorted(Path(folder).rglob("*.xplane.pb")):
            recording = _read(path.read_bytes(), device)
            if recording is not None:
                result.append(recording)


def _read(data: bytes, device: str) -> Recording | None:
    """Find the events of a device's allocator in a profile, in order of time.

    Returns:
        None if there are no events, or if something is freed that was allocated before.
    """
    kind, _, number = device.partition(":")
    allocator = f"{kind}_{number}_bfc" if kind == "GPU" else "bfc_cpu_allocator_for_gpu"
    space = _profile_class()()
    space.ParseFromString(data)
    found: list[tuple[int, bool, int, int, str]] = []
    for plane in space.planes:
        names = {number: value.name for number, value in plane.event_metadata.items()}
        stats = {number: value.name for number, value in plane.stat_metadata.items()}
        for line in plane.lines:
            for event in line.events:
                event_name = names[event.metadata_id]
                if event_name not in (_ALLOCATION, _RELEASE):
                    continue
                size, address, operation, owner = 0, 0, "", ""
                for stat in event.stats:
                    name = stats[stat.metadata_id]
                    if name == b"requested_bytes":
                        size = _number(stat)
                    elif name == b"addr":
                        address = _number(stat)
                    elif name == b"tf_op":
                        operation = _text(stat, stats)
                    elif name == b"allocator_name":
                        owner = _text(stat, stats)
                if owner != allocator:
                    continue
                time = line.timestamp_ns * 1000 + event.offset_ps
                found.append((time, event_name == _ALLOCATION, size, address, operation))
    found.sort(key=lambda event: event[0])
    events: list[int] = []
    sizes: list[int] = []
    operations: list[str] = []
    live: dict[int, int] = {}
    for _, allocates, size, address, name in found:
        if allocates:
            live[address] = len(sizes)
            events.append(len(sizes))
            sizes.append(size)
            operations.append(name)
        elif address in live:
            events.append(~live.pop(address))
        else:
            return None
    return Recording(tuple(events), tuple(sizes), tuple(operations)) if sizes else None


def _text(stat: Any, stats: dict[int, bytes]) -> str:
    text = stats[stat.ref_value] if stat.ref_value else stat.str_value
    return text.decode(errors="replace")


def _number(stat: Any) -> int:
    return int(stat.int64_value or stat.uint64_value)


def _profile_class() -> Any:
    """Class of a profile whose texts are bytes: some that TensorFlow writes are not UTF-8."""
    file = descriptor_pb2.FileDescriptorProto()
    xplane_pb2.DESCRIPTOR.CopyToProto(file)
    messages = list(file.message_type)
    while messages:
        message = messages.pop()
        messages += message.nested_type
        for field in message.field:
            if field.type == field.TYPE_STRING:
                field.type = field.TYPE_BYTES
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.profiler.XSpace"))
