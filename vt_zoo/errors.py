"""The error of a person who uses the package, not of the package."""

import reprlib
from typing import Any

__all__ = ['MAX_INT', 'MAX_PIXELS', 'MAX_SIDE', 'InputError', 'first_line', 'short']

MAX_INT = 2 ** 31 - 1  # of a count
MAX_SIDE = 4096  # pixels along a side of what a model is given: more is a slip, and takes the memory of a machine
MAX_PIXELS = 2 ** 30  # of a batch, which take 12 GB as numbers

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 120
_repr.maxlong = 40
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 12


class InputError(ValueError):
    """What was given cannot be used. The message is one sentence; the CLI prints it and exits with code 2."""


def short(value: Any) -> str:
    """What `repr` gives, cut where it is too long for a sentence."""
    return _repr.repr(value)


def first_line(error: BaseException) -> str:
    """First line of what an error says, or its type's name where it says nothing."""
    return next(iter(str(error).splitlines()), '') or type(error).__name__
