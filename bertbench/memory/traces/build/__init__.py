"""Makes step traces out of recordings; for developers, no command needs it."""
