"""The functions that `import bertbench` offers, for scripts and notebooks."""
