"""Work that was asked for rightly and failed: one line on the terminal and exit code 1."""


class WorkError(RuntimeError):
    """What failed and what to do, as one line."""


class StoppedEarlyError(WorkError):
    """The user interrupted; what was done is saved. Exit code 130, as shells have it."""
