"""Checking timm's version, which no package manager has chosen if, for example, a clone comes first in the path."""
import re
import sys

import timm

OLDEST_TIMM = '1.0.22'  # also the bound in pyproject.toml


class OldTimmError(ImportError):
    """The timm that Python finds is too old for this package."""


def _numbers(version: str) -> list:
    return [int(n) for n in re.match(r'\d+(?:\.\d+)*', version)[0].split('.')]


def timm_is_at_least(version: str) -> bool:
    """Whether the timm that Python finds has at least this version."""
    return _numbers(timm.__version__) >= _numbers(version)


def check_timm() -> None:
    """Check that the timm that Python finds is not too old.

    Raises:
        OldTimmError: It is too old. If nothing catches this error, the program prints its message and exits with code
            2.
    """
    if timm_is_at_least(OLDEST_TIMM):
        return
    hook = sys.excepthook

    def say_sentence(kind, error, traceback):
        if not isinstance(error, OldTimmError):
            return hook(kind, error, traceback)
        print(f'vt_zoo: error: {error}', file=sys.stderr)
        raise SystemExit(2)

    sys.excepthook = say_sentence
    raise OldTimmError(
        f'vt_zoo needs timm {OLDEST_TIMM} or newer, Python finds timm {timm.__version__} in {timm.__path__[0]}')
