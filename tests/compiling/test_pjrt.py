"""The C interface of XLA's plug-ins is spoken as its header says."""

from __future__ import annotations

import ctypes
import re
from importlib import metadata
from pathlib import Path

import pytest

from bertbench.compiling import pjrt
from bertbench.compiling.pjrt import POSITIONS, CompilerError, compile_options, load_compiler


@pytest.fixture(scope="module")
def header() -> str:
    found = [
        file
        for file in metadata.files("tensorflow") or ()
        if file.as_posix().endswith("include/xla/pjrt/c/pjrt_c_api.h")
    ]
    if not found:
        pytest.skip("TensorFlow's package has no header of the interface")
    return Path(str(found[0].locate())).read_text(encoding="utf-8")


def test_functions_are_at_the_positions_of_the_header(header: str) -> None:
    table = header[header.index("typedef struct PJRT_Api {") : header.index("} PJRT_Api;")]
    names = re.findall(r"_PJRT_API_STRUCT_FIELD\((\w+)\)", table)
    assert {name: names.index(name) for name in POSITIONS} == POSITIONS


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (pjrt._Error, "PJRT_Error_Destroy_Args"),
        (pjrt._ErrorMessage, "PJRT_Error_Message_Args"),
        (pjrt._ErrorCode, "PJRT_Error_GetCode_Args"),
        (pjrt._Initialize, "PJRT_Plugin_Initialize_Args"),
        (pjrt._CreateTopology, "PJRT_TopologyDescription_Create_Args"),
        (pjrt._GetDevices, "PJRT_TopologyDescription_GetDeviceDescriptions_Args"),
        (pjrt._GetId, "PJRT_DeviceDescription_Id_Args"),
        (pjrt._Program, "PJRT_Program"),
        (pjrt._Compile, "PJRT_Compile_Args"),
    ],
)
def test_arguments_have_the_fields_of_the_header(
    ours: type[ctypes.Structure], name: str, header: str
) -> None:
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", header, re.DOTALL)
    assert body is not None
    lines = re.sub(r"//[^\n]*", "", body.group(1)).split(";")
    fields = [line.split()[-1].lstrip("*") for line in lines if line.strip()]
    assert [field[0] for field in ours._fields_] == fields


def test_memory_has_the_fields_of_the_header(header: str) -> None:
    body = re.search(
        r"struct PJRT_Executable_GetCompiledMemoryStats_Args \{(.*?)\n\};", header, re.DOTALL
    )
    assert body is not None
    lines = re.sub(r"//[^\n]*", "", body.group(1)).split(";")
    theirs = [line.split()[-1].removesuffix("_in_bytes") for line in lines if line.strip()]
    ours = [field[0] for field in pjrt._GetMemory._fields_]
    assert [name.lstrip("*") for name in theirs[:8]] == ours[:8]
    assert all(name.startswith("host_") for name in theirs[8:13])
    assert theirs[13] == ours[9] == "peak_memory"
    # There is room for all results of the header, and for more of newer plug-ins.
    assert ctypes.sizeof(pjrt._GetMemory) >= 8 * len(theirs) + 128


def test_options_name_one_replica_for_each_device() -> None:
    """Written out by the numbers of the fields of `compile_options.proto` and `xla_data.proto`."""
    minus_one = b"\x08" + b"\xff" * 9 + b"\x01"
    assignment = b"\x08\x02" + b"\x10\x01" + b"\x1a\x05" + b"\x0a\x03" + b"\x05\xac\x02"
    build = minus_one + b"\x20\x02" + b"\x28\x01" + b"\x4a\x0b" + assignment
    assert compile_options([5, 300]) == b"\x1a" + bytes([len(build)]) + build


def test_what_is_no_plug_in_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.so").write_bytes(b"no library")
    for library in (tmp_path / "a.so", tmp_path / "missing.so"):
        with pytest.raises(CompilerError, match="is no plug-in of XLA"):
            load_compiler(library)
