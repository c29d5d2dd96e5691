"""The error of a person who uses the package, not of the package."""

__all__ = ['InputError', 'first_line']


class InputError(ValueError):
    """What was given cannot be used. The message is one sentence; the CLI prints it and exits with code 2."""


def first_line(error: BaseException) -> str:
    """First line of what an error says, or its type's name where it says nothing."""
    return next(iter(str(error).splitlines()), '') or type(error).__name__
