"""The largest batch that fits, searched and certified."""
