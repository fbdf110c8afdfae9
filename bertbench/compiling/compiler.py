"""XLA's compilers of GPUs and TPUs, in a program of its own.

It is run as `python -m bertbench.compiling.compiler REQUEST ANSWER`, and imports no TensorFlow,
which holds an XLA of its own.

REQUEST is a JSON file with the values of a `bertbench.compiling.target.CompileTarget` and `module`,
the path of a serialized `HloModuleProto`. ANSWER is written as JSON: `memory`, the values of a
`bertbench.memory.compiled.CompiledMemory`, or `error`, the text of what the compiler raised.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from bertbench.compiling.pjrt import CompilerError, compile_module, load_compiler
from bertbench.memory.allocator.xla_flags import without_rematerialization
from finetune.storage.json_files import json_text, parse_json

_LIBRARIES = {
    "gpu": ("jax_plugins.xla_cuda12", "xla_cuda_plugin.so"),
    "tpu": ("libtpu", "libtpu.so"),
}
"""Package and name of the plug-in of each kind of device."""


def main(request_file: str, answer_file: str) -> None:
    """Compile what a file asks for, and write the answer to another."""
    request = parse_json(Path(request_file).read_text(encoding="utf-8"))
    kind, replicas = request["kind"], request["replicas"]
    topology, options = request["description"], {}
    if kind == "gpu":
        options = {"target_config": request["description"], "topology": f"1x1x{replicas}"}
        topology = "described"
    try:
        set_environment(os.environ, kind)
        answer: dict[str, Any] = {
            "memory": compile_module(
                load_compiler(_library(kind)),
                Path(request["module"]).read_bytes(),
                topology,
                options,
                replicas,
            )
        }
    except CompilerError as error:
        answer = {"error": str(error)}
    Path(answer_file).write_text(json_text(answer), encoding="utf-8")


def set_environment(environment: MutableMapping[str, str], kind: str) -> None:
    """Set the variables that a plug-in reads when it is loaded.

    Args:
        environment: changed.
        kind: of the target.
    """
    # No question to the cloud's metadata server about a TPU that this machine might have.
    environment["TPU_SKIP_MDS_QUERY"] = "1"
    # libtpu lets one process in, by a lock file that a crash leaves behind.
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    environment["XLA_FLAGS"] = ""
    if kind == "gpu":
        folder = _folder("nvidia.cuda_nvcc")
        environment["PATH"] = os.pathsep.join([f"{folder}/bin", environment.get("PATH", "")])
        # Kernels are chosen by rules: there is no GPU to time them on.
        environment["XLA_FLAGS"] = without_rematerialization(
            f"--xla_gpu_cuda_data_dir='{folder}' --xla_gpu_autotune_level=0"
        )


def _library(kind: str) -> Path:
    package, name = _LIBRARIES[kind]
    return _folder(package) / name


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise CompilerError(f"the package {package} is not installed")
    return Path(next(iter(found.submodule_search_locations)))


if __name__ == "__main__":
    main(*sys.argv[1:])
