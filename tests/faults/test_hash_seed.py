"""What is computed and written does not depend on the order in which sets are gone through."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers.paths import HELPERS


def test_nothing_depends_on_the_hash_seed(tmp_path: Path) -> None:
    """Of two processes; texts have other hashes in each, so that sets have other orders."""
    program = HELPERS / "hash_seed_program.py"
    outputs = []
    for seed in ("1", "2", "3"):
        result = subprocess.run(
            [sys.executable, str(program), str(tmp_path)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    assert outputs[0].startswith("(('-0', '0', '00', '0001', '001', '01', '1', '02', '2'), ")
    assert outputs[1:] == outputs[:1] * 2
