"""Errors that more than one layer raises."""


class InputError(ValueError):
    """A path, a flag or a checkpoint that a person gave cannot be used; the message says why and what to do."""
