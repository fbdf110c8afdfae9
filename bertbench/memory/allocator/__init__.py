"""TensorFlow's allocator: put under a budget, recorded, and modelled."""
