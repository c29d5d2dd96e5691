"""The error for mistakes in the user's input, as opposed to bugs in the package, and helpers for its messages."""
import reprlib
from pathlib import Path
from typing import Any, Sequence, Union

__all__ = ['InputError']

MAX_INT = 2 ** 31 - 1  # largest count
MAX_SIDE = 4096  # pixels along a side of a model's input; more is probably a typo, and would use up all memory
MAX_PIXELS = 2 ** 30  # in a batch, which take 12 GB in float32

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 120
_repr.maxlong = 40
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 12


class InputError(ValueError):
    """An input that cannot be used. The message is one sentence; the CLI prints it and exits with code 2."""


def short(value: Any) -> str:
    """Return `repr(value)`, shortened if it is too long for a message."""
    return _repr.repr(value)


def either(names: Sequence[str]) -> str:
    """Names as a choice in a sentence: `a`, `a or b`, `a, b or c`."""
    return ' or '.join(filter(None, [', '.join(names[:-1]), names[-1]]))


def first_line(error: BaseException) -> str:
    """First line of an error's message that is not blank, or the name of its type if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def printable(name: str) -> str:
    r"""Make a file name printable as UTF-8: bytes that are not valid UTF-8 become `\udcff` and the like."""
    return name.encode('utf-8', 'backslashreplace').decode('utf-8')


def check_utf8(out: Union[str, Path]) -> None:
    """Raise InputError if an output path is not valid UTF-8, since some libraries could not read it."""
    if printable(str(out)) != str(out):
        raise InputError(f'out must be a name in UTF-8, which the libraries that read it need, got {out}')
