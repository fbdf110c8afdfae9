"""Predicted memory of a step: by formula, by its trace, and as TensorFlow's allocator."""
