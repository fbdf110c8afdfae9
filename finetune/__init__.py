"""Fine-tuning of BERT as in the original release. It does not import bertbench."""
