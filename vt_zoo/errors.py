"""The error of a person who uses the package, not of the package."""
import reprlib
from pathlib import Path
from typing import Any, Union

__all__ = ['InputError']

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


def printable(name: str) -> str:
    r"""A name of a file as text that can be written as UTF-8: bytes that are none become `\udcff` and the like."""
    return name.encode('utf-8', 'backslashreplace').decode('utf-8')


def check_utf8(out: Union[str, Path]) -> None:
    """Raise InputError where what is to be written has a name that is not UTF-8, which some libraries cannot read."""
    if printable(str(out)) != str(out):
        raise InputError(f'out must be a name in UTF-8, as the libraries that read it need, got {out}')
