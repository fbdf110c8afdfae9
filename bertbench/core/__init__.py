"""What every wing uses: sizes, errors, the terminal, locks, and the values everything is asked about."""
