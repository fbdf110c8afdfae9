"""Pictures: of limits, plans, runs, and of SQuAD 2.0 results."""
