"""Types of command-line arguments."""
import argparse
import re
from typing import Optional

__all__ = ['HelpFormatter', 'file_size', 'fraction', 'port', 'positive_float', 'positive_int', 'whole_number']


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of an option that has one, as it would be given."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        if action.required or action.default in (None, False):
            return action.help
        if isinstance(action.default, tuple):
            return f'{action.help} (default: {" ".join(f"{value:.3g}" for value in action.default)})'
        return super()._get_help_string(action)


def _number(text: str, kind: type, allowed: str, accept) -> float:
    try:
        value = kind(text)
        if accept(value):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f'{text!r} is not {allowed}')


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    return _number(text, int, 'a whole number of at least 1', lambda v: v >= 1)


def whole_number(text: str) -> int:
    """A whole number of at least 0."""
    return _number(text, int, 'a whole number of at least 0', lambda v: v >= 0)


def positive_float(text: str) -> float:
    """A number above 0."""
    return _number(text, float, 'a number above 0', lambda v: 0 < v < float('inf'))


def fraction(text: str) -> float:
    """A number from 0 to under 1."""
    return _number(text, float, 'a number from 0 to under 1', lambda v: 0 <= v < 1)


def port(text: str) -> int:
    """A number of a TCP port, or 0."""
    return _number(text, int, 'a port from 0 to 65535', lambda v: 0 <= v <= 65535)


def file_size(text: str) -> str:
    """A size as huggingface_hub writes it: a whole number and KB, MB or GB."""
    if not re.fullmatch('[1-9][0-9]*[KMG]B', text):
        raise argparse.ArgumentTypeError(f'{text!r} is not a size such as 500MB')
    return text
