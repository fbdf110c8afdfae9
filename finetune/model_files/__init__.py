"""What lies in the folder of a model: configuration, weights, checkpoints, labels."""
