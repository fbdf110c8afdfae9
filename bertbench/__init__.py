"""Makes BERT fine-tuning fit: probes the largest batch, plans, and runs with that plan.

The names below are loaded when they are first used:

    import bertbench

    bertbench.devices()                                        # what is attached
    bertbench.plan("bert-large", 384, 24, on="rtx-3060")       # the fastest setting that fits
    bertbench.probe("bert-tiny", 128, on="cpu", memory="256MiB")  # the largest batch that fits
    bertbench.run("squad", output_dir="out", demo=True)        # a fine-tuning

Each returns a dataclass with `to_frame()`, a table of pandas, and shows itself in a notebook.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bertbench.api.devices import devices
    from bertbench.api.plan import plan
    from bertbench.api.probe import probe
    from bertbench.api.run import run
    from bertbench.core.workload import Levers, Workload
    from bertbench.hardware.device import Budget

    __version__: str

__all__ = ["Budget", "Levers", "Workload", "__version__", "devices", "plan", "probe", "run"]

_MODULES = {
    "Budget": "bertbench.hardware.device",
    "Levers": "bertbench.core.workload",
    "Workload": "bertbench.core.workload",
    "devices": "bertbench.api.devices",
    "plan": "bertbench.api.plan",
    "probe": "bertbench.api.probe",
    "run": "bertbench.api.run",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("bertbench")
    if name not in _MODULES:
        raise AttributeError(f"module 'bertbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
