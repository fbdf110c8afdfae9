"""TensorFlow's allocator: limited to a budget, recorded, and worked out."""
