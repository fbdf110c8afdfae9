"""What a training step can run on: devices, their memory, and how fast they are."""
