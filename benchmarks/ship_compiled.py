"""Make the table of compiled steps that the package comes with.

    python benchmarks/ship_compiled.py PROBE.json ... [--out FILE]

Each PROBE.json is of `bertbench probe --gpu NAME --json PROBE.json`. All of them must be of the
same TensorFlow and compilers. Files of several versions of bertbench may be put together, if the
training step is the same: a test compiles a row of the table again. Without `--out` the table is
`bertbench/compiling/compiled_steps.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bertbench.compiling.shipped import TABLE
from finetune.storage.json_files import json_text, load_object

_PACKAGE = Path(__file__).parents[1] / "bertbench" / "compiling"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("probes", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=_PACKAGE / TABLE)
    arguments = parser.parse_args()
    probes = [load_object(path, what="a probe's result") for path in arguments.probes]
    versions = {json_text(_without_own(probe["versions"]), sort_keys=True) for probe in probes}
    if len(versions) > 1:
        parser.error("the files are of several versions")
    rows = sorted({json_text(row) for probe in probes for row in rows_of(probe)})
    text = ",\n".join(rows)
    arguments.out.write_text(
        f'{{"versions": {versions.pop()},\n"steps": [\n{text}\n]}}\n', encoding="utf-8"
    )
    print(f"{len(rows)} steps in {arguments.out}")


def _without_own(versions: dict[str, str]) -> dict[str, str]:
    return {name: version for name, version in versions.items() if name != "bertbench"}


def rows_of(probe: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All compilations of a probe, as `bertbench.compiling.shipped` reads them."""
    for cell in probe["cells"]:
        for compilation in cell["compilations"]:
            yield {
                "product": probe["compiled_for"]["name"],
                "replicas": probe["compiled_for"]["replicas"],
                "model": cell["model"],
                "seq_len": cell["seq_len"],
                "head": cell["head"],
                "levers": cell["levers"],
                "micro_batch": compilation["micro_batch"],
                "memory": compilation["memory"],
            }


if __name__ == "__main__":
    main()
