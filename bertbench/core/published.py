"""The grid of models and sequence lengths of the original release, and its measured limits."""

from __future__ import annotations

from bertbench.core.workload import Workload

PAPER_MODELS = ("bert-base", "bert-large")
PAPER_SEQ_LENS = (64, 128, 256, 320, 384, 512)

PUBLISHED_MAX_BATCH = {
    ("bert-base", 64): 64,
    ("bert-base", 128): 32,
    ("bert-base", 256): 16,
    ("bert-base", 320): 14,
    ("bert-base", 384): 12,
    ("bert-base", 512): 6,
    ("bert-large", 64): 12,
    ("bert-large", 128): 6,
    ("bert-large", 256): 2,
    ("bert-large", 320): 1,
    ("bert-large", 384): 0,
    ("bert-large", 512): 0,
}
"""Maximum batch of the original release on a Titan X with 12 GB, from its README."""


def published_ratio(workload: Workload, max_batch: int) -> str:
    """Write a batch as a multiple of the published maximum batch; "-" if none was published."""
    published = PUBLISHED_MAX_BATCH.get((workload.model, workload.seq_len))
    return f"{max_batch / published:.2f}" if published else "-"
