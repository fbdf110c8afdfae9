"""The processes that import TensorFlow without Keras, and those that must not."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from bertbench.cli import main
from bertbench.core.without_keras import leave_out_keras
from bertbench.trials import fork_client
from helpers.isolated import run


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is imported before")
def test_trials_have_tensorflow_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # With this variable, which other tests are run with, TensorFlow leaves Keras out by itself.
    monkeypatch.delenv("TF_USE_LEGACY_KERAS", raising=False)
    fork_client._stop()
    [message], ending = run("imports")
    assert ending.preloaded
    assert "tensorflow" in message["modules"]
    assert not {"keras", "sklearn", "matplotlib"} & set(message["modules"])


def test_a_command_leaves_keras_out() -> None:
    program = (
        "import sys\n"
        "from bertbench.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    assert sys.modules['keras'] is None\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, "devices", "--help"], check=True, capture_output=True
    )


def test_a_user_s_own_process_keeps_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    with pytest.raises(SystemExit):
        main(["devices", "--help"])
    assert "keras" not in sys.modules
    keras = types.ModuleType("keras")
    monkeypatch.setitem(sys.modules, "keras", keras)
    leave_out_keras()
    assert sys.modules["keras"] is keras
