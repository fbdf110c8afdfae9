"""What a model and its training are made of, as values."""
