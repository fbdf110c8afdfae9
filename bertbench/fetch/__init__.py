"""Data sets and weights by name: downloaded, verified, unpacked."""
