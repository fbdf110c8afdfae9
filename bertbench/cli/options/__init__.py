"""Options that several verbs share, and flags of the original release."""
