"""BERT's tokenization, and the files that say how a model's text is split."""
