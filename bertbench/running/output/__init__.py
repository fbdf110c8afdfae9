"""What a run leaves: its folder, the record in it, and its copy in cloud storage."""
