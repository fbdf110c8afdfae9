"""Files that appear complete or not at all, and files that are read within bounds."""
