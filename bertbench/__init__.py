"""Makes BERT fine-tuning fit: probes the largest batch, plans, and runs with that plan."""
