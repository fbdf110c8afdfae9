"""The same GPU with PyTorch and transformers: largest batch and speed, for `measure.py`.

    python benchmarks/gpu/torch_peer.py MODEL SEQ_LEN BUDGET_BYTES ATTENTION CHECKPOINTING BATCH ...

Prints a line of JSON: the largest batch of a training step in the budget (forward pass, backward
pass, clipping, AdamW, dropout, float32 without TensorFloat-32), and examples a second at each of
the batches that fit. A budget is a share of the GPU's memory that PyTorch's allocator may reserve;
on a CPU there is none, and no largest batch.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

from bertbench.core.bisection import largest_passing
from bertbench.core.workload import published_workload
from finetune.storage.json_files import json_text

_STEPS = 4
_MAX_BATCH = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("seq_len", type=int)
    parser.add_argument("budget_bytes", type=int)
    parser.add_argument("attention", choices=("eager", "sdpa"))
    parser.add_argument("checkpointing", choices=("none", "full"))
    parser.add_argument("batches", type=int, nargs="+")
    arguments = parser.parse_args()
    print(json_text(measure(arguments)))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if on_gpu:
        share = arguments.budget_bytes / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
        torch.backends.cuda.matmul.allow_tf32 = False
    shape = published_workload(arguments.model, arguments.seq_len).config
    config = transformers.BertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_position_embeddings,
        attn_implementation=arguments.attention,
    )
    model = transformers.BertForQuestionAnswering(config).to(device)
    model.train()
    if arguments.checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, weight_decay=0.01)

    def step(batch: int) -> None:
        size = (batch, arguments.seq_len)
        rows = torch.randint(0, config.vocab_size, size, device=device)
        positions = torch.randint(0, arguments.seq_len, (batch,), device=device)
        output = model(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            start_positions=positions,
            end_positions=positions,
        )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(output.loss)

    def fits(batch: int) -> bool:
        try:
            step(batch)
        except torch.OutOfMemoryError:
            return False
        finally:
            # What the failed step left must not make the next one smaller.
            optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
        return True

    rates = {}
    for batch in sorted(arguments.batches):
        if on_gpu and not fits(batch):
            break
        seconds: list[float] = []
        try:
            for _ in range(_STEPS):
                began = time.monotonic()
                step(batch)
                seconds.append(time.monotonic() - began)
        except torch.OutOfMemoryError:
            break
        rates[str(batch)] = batch / statistics.median(seconds[1:])
    return {
        "model": arguments.model,
        "seq_len": arguments.seq_len,
        "attention": arguments.attention,
        "checkpointing": arguments.checkpointing,
        "max_batch": largest_passing(fits, at_most=_MAX_BATCH) if on_gpu else None,
        "examples_per_second": rates,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
