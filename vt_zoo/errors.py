"""The error of a person who uses the package, not of the package."""

__all__ = ['InputError']


class InputError(ValueError):
    """What was given cannot be used. The message is one sentence; the CLI prints it and exits with code 2."""
