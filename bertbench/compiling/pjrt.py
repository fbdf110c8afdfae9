"""A compiler behind PJRT's C interface, for a device that is not there.

XLA's plug-ins for GPUs and TPUs are shared libraries with this interface
(`xla/pjrt/c/pjrt_c_api.h`, version 0.90 in TensorFlow 2.21). It takes a step as TensorFlow lowered
it. JAX's own functions would rewrite the step on the way, and the memory with it.

The interface only grows at its end: a position in its table, or in an argument, stays what it is.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

POSITIONS = {
    "PJRT_Error_Destroy": 0,
    "PJRT_Error_Message": 1,
    "PJRT_Error_GetCode": 2,
    "PJRT_Plugin_Initialize": 3,
    "PJRT_DeviceDescription_Id": 23,
    "PJRT_TopologyDescription_Create": 82,
    "PJRT_TopologyDescription_GetDeviceDescriptions": 86,
    "PJRT_Compile": 89,
    "PJRT_Executable_GetCompiledMemoryStats": 96,
}
"""Functions that are called here, by their position in the interface's table."""

_CODES = {3: "INVALID_ARGUMENT", 8: "RESOURCE_EXHAUSTED", 12: "UNIMPLEMENTED", 13: "INTERNAL"}

_size, _pointer, _text, _int64 = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64


class CompilerError(Exception):
    """What the compiler raised; its text begins with a code such as `RESOURCE_EXHAUSTED`."""


class _Api(ctypes.Structure):
    _fields_ = (
        ("struct_size", _size),
        ("extension_start", _pointer),
        ("version", _size * 3),
        ("functions", _pointer * (max(POSITIONS.values()) + 1)),
    )


def _arguments(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    """Make the type of a function's arguments."""
    every = (("struct_size", _size), ("extension_start", _pointer), *fields)
    return type(name, (ctypes.Structure,), {"_fields_": every})


_Error = _arguments("_Error", ("error", _pointer))
_ErrorMessage = _arguments(
    "_ErrorMessage", ("error", _pointer), ("message", _pointer), ("message_size", _size)
)
_ErrorCode = _arguments("_ErrorCode", ("error", _pointer), ("code", ctypes.c_int))
_Initialize = _arguments("_Initialize")
_NamedValue = _arguments(
    "_NamedValue",
    ("name", _text),
    ("name_size", _size),
    ("type", ctypes.c_int),
    ("value", _text),
    ("value_size", _size),
)
_CreateTopology = _arguments(
    "_CreateTopology",
    ("topology_name", _text),
    ("topology_name_size", _size),
    ("create_options", _pointer),
    ("num_options", _size),
    ("topology", _pointer),
)
_GetDevices = _arguments(
    "_GetDevices",
    ("topology", _pointer),
    ("descriptions", ctypes.POINTER(_pointer)),
    ("num_descriptions", _size),
)
_GetId = _arguments("_GetId", ("device_description", _pointer), ("id", ctypes.c_int))
_Program = _arguments(
    "_Program",
    ("code", _text),
    ("code_size", _size),
    ("format", _text),
    ("format_size", _size),
)
_Compile = _arguments(
    "_Compile",
    ("topology", _pointer),
    ("program", _pointer),
    ("compile_options", _text),
    ("compile_options_size", _size),
    ("client", _pointer),
    ("executable", _pointer),
)
_GetMemory = _arguments(
    "_GetMemory",
    ("executable", _pointer),
    ("generated_code_size", _int64),
    ("argument_size", _int64),
    ("output_size", _int64),
    ("alias_size", _int64),
    ("temp_size", _int64),
    ("host_sizes", _int64 * 5),
    ("peak_memory", _int64),
    # Newer plug-ins have further results, and may write them without asking for the size.
    ("later", _int64 * 32),
)


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A plug-in that has been loaded.

    Attributes:
        library: keeps it loaded.
        functions: addresses of the interface's functions, by position.
    """

    library: ctypes.CDLL
    functions: Sequence[int]

    def call(self, name: str, arguments: ctypes.Structure) -> None:
        """Call a function of the interface.

        Raises:
            CompilerError: it returned an error.
        """
        arguments.struct_size = ctypes.sizeof(arguments)
        error = self._function(name)(ctypes.byref(arguments))
        if error:
            raise CompilerError(self._describe(error))

    def _function(self, name: str) -> ctypes._FuncPointer:
        kind = ctypes.CFUNCTYPE(_pointer, _pointer)
        return kind(self.functions[POSITIONS[name]])

    def _describe(self, error: int) -> str:
        """Write an error as text, and free it."""
        message, code, done = _ErrorMessage(), _ErrorCode(), _Error()
        for name, arguments in (
            ("PJRT_Error_Message", message),
            ("PJRT_Error_GetCode", code),
        ):
            arguments.struct_size, arguments.error = ctypes.sizeof(arguments), error
            self._function(name)(ctypes.byref(arguments))
        text = ctypes.string_at(message.message, message.message_size).decode(errors="replace")
        done.struct_size, done.error = ctypes.sizeof(done), error
        self._function("PJRT_Error_Destroy")(ctypes.byref(done))
        number = code.code
        return f"{_CODES.get(number, f'code {number}')}: {text}"


def load_compiler(library: Path) -> Compiler:
    """Load a plug-in.

    Args:
        library: its shared library.

    Raises:
        CompilerError: it cannot be loaded, is older than what is needed, or does not start.
    """
    try:
        loaded = ctypes.CDLL(str(library))
        get_api = loaded.GetPjrtApi
    except (OSError, AttributeError) as error:
        raise CompilerError(f"{library} is no plug-in of XLA ({error})") from error
    get_api.restype = ctypes.POINTER(_Api)
    api = get_api().contents
    if api.struct_size < ctypes.sizeof(_Api):
        raise CompilerError(f"{library} is too old: it has no memory statistics")
    compiler = Compiler(loaded, tuple(api.functions))
    compiler.call("PJRT_Plugin_Initialize", _Initialize())
    return compiler


def compile_module(
    compiler: Compiler, module: bytes, topology: str, options: Mapping[str, str], replicas: int
) -> dict[str, int]:
    """Compile a module for devices of a topology.

    Args:
        compiler: the plug-in.
        module: a serialized `HloModuleProto`.
        topology: name of the topology.
        options: of the topology, as the plug-in takes them.
        replicas: how many of its devices run the module, from the first on.

    Returns:
        What it needs of each device: the values of `bertbench.memory.compiled.CompiledMemory`.

    Raises:
        CompilerError: the topology is unknown or has too few devices, or the module does not
            compile; on a TPU also if it does not fit.
    """
    name, made = topology.encode(), _CreateTopology()
    values = (_NamedValue * len(options))()
    for value, (key, text) in zip(values, options.items(), strict=True):
        value.struct_size = ctypes.sizeof(_NamedValue)
        value.name, value.name_size, value.type = key.encode(), len(key.encode()), 0
        value.value, value.value_size = text.encode(), len(text.encode())
    made.topology_name, made.topology_name_size = name, len(name)
    made.create_options, made.num_options = ctypes.addressof(values), len(options)
    compiler.call("PJRT_TopologyDescription_Create", made)
    devices = _device_ids(compiler, made.topology)
    if len(devices) < replicas:
        raise CompilerError(f"topology {topology} has {len(devices)} devices, not {replicas}")
    program, compiled = _Program(), _Compile()
    program.struct_size = ctypes.sizeof(program)
    program.code, program.code_size = module, len(module)
    program.format, program.format_size = b"hlo", 3
    build = compile_options(devices[:replicas])
    compiled.topology, compiled.program = made.topology, ctypes.addressof(program)
    compiled.compile_options, compiled.compile_options_size = build, len(build)
    compiler.call("PJRT_Compile", compiled)
    memory = _GetMemory()
    memory.executable = compiled.executable
    compiler.call("PJRT_Executable_GetCompiledMemoryStats", memory)
    return {
        "argument_bytes": memory.argument_size,
        "output_bytes": memory.output_size - memory.alias_size,
        "temporary_bytes": memory.temp_size,
        "program_bytes": memory.generated_code_size,
    }


def _device_ids(compiler: Compiler, topology: int) -> list[int]:
    found = _GetDevices()
    found.topology = topology
    compiler.call("PJRT_TopologyDescription_GetDeviceDescriptions", found)
    numbers = []
    for index in range(found.num_descriptions):
        one = _GetId()
        one.device_description = found.descriptions[index]
        compiler.call("PJRT_DeviceDescription_Id", one)
        numbers.append(one.id)
    return numbers


def compile_options(devices: Sequence[int]) -> bytes:
    """Write a `CompileOptionsProto`: one replica on each device, and defaults for all else.

    The numbers of the fields are those of `xla/pjrt/proto/compile_options.proto` and
    `xla/xla_data.proto`.
    """
    ids = b"".join(_number(device) for device in devices)
    computation = _field(1, ids)
    assignment = _whole(1, len(devices)) + _whole(2, 1) + _field(3, computation)
    build = _whole(1, -1) + _whole(4, len(devices)) + _whole(5, 1) + _field(9, assignment)
    return _field(3, build)


def _number(value: int) -> bytes:
    """Write an integer as protocol buffers do, 7 bits in a byte."""
    value &= (1 << 64) - 1
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def _whole(field: int, value: int) -> bytes:
    return _number(field << 3) + _number(value)


def _field(field: int, value: bytes) -> bytes:
    return _number(field << 3 | 2) + _number(len(value)) + value
