"""Reports of what was measured: tables, pictures and one page; `bertbench report` makes them."""
