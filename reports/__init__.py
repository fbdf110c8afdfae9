"""Reports of what was measured; the command line stands above them."""
