"""Step traces: what a step asks the allocator for, for any model and batch."""
