"""What every wing uses: memory sizes, errors, the terminal, workloads and levers."""
