"""Errors that more than one layer raises."""


class InputError(ValueError):
    """What a person gave (a path, a flag, a checkpoint) cannot be used; the message says why and what to do."""
