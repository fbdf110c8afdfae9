"""TensorFlow without Keras, in processes that are this program's own."""

from __future__ import annotations

import sys
from typing import Any

_modules: dict[str, Any] = sys.modules


def leave_out_keras() -> None:
    """Make TensorFlow leave out Keras when this process imports it.

    TensorFlow imports Keras at the end of its own import, and passes over one that cannot be
    imported. Keras in turn imports scikit-learn and Matplotlib where they are installed. That is
    two fifths of the time that TensorFlow takes to import, and no training step uses any of it.

    Afterwards `import keras` raises `ImportError`, so a process that also runs a user's own code
    must not call this.
    """
    _modules.setdefault("keras", None)
