"""Trials: real training steps in processes of their own, and what their end means."""
