"""BERT's encoder and heads in TensorFlow, written for what a step keeps in memory."""
