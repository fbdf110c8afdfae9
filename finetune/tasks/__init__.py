"""Tasks: their files, model inputs, predictions and official metrics."""
