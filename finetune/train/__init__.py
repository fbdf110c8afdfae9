"""The optimizer step, the training loop, evaluation, and training state on disk."""
