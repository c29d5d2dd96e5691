"""The error of a person who uses the package, not of the package."""
from pathlib import Path
from typing import Union

__all__ = ['InputError', 'check_utf8', 'first_line', 'printable']


class InputError(ValueError):
    """What was given cannot be used. The message is one sentence; the CLI prints it and exits with code 2."""


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
