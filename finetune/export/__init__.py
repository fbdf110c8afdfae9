"""Fine-tuned weights for other tools."""
