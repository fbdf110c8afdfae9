"""The record of all trials, and what trials say together."""
