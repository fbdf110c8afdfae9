"""A run: from settings and files to trained weights, predictions and scores."""
