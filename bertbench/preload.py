"""Imported once by the fork server of `bertbench.isolation`, so that trials start quickly.

Nothing here may run a TensorFlow op: the first op fixes the allocator and starts threads, and a
fork inherits the former and loses the latter.
"""

from __future__ import annotations

import os

# TensorFlow greets on the standard error stream while it is imported, whatever its log level is.
# The server has nothing to say after that either, and its children redirect their own streams.
_null = os.open(os.devnull, os.O_RDWR)
os.dup2(_null, 1)
os.dup2(_null, 2)
os.close(_null)

import tensorflow  # noqa: E402, F401
