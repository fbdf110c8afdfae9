"""The fastest setting that fits, and the smallest memory that will do."""
