"""Fine-tuning of BERT, faithful to the original release; it knows nothing of bertbench."""
