"""What every wing uses: sizes, errors, the terminal, and the values asked about."""
