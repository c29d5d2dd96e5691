"""Types of command-line arguments."""
import argparse
import ast
import os
import re
from typing import Any, Optional, Tuple

from vt_zoo.errors import MAX_INT, MAX_SIDE, short

MAX_WORKERS = 8 * (os.cpu_count() or 1)  # each has the memory of a process


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
    raise argparse.ArgumentTypeError(f'{short(text)} is not {allowed}')


def _int(text: str, least: int, most: int) -> int:
    return _number(text, int, f'a whole number from {least} to {most}', lambda v: least <= v <= most)


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    return _int(text, 1, MAX_INT)


def whole_number(text: str) -> int:
    """A whole number of at least 0; the random numbers of a seed of up to 31 bits are right everywhere."""
    return _int(text, 0, MAX_INT)


def keyword(text: str) -> Tuple[str, Any]:
    """`KEY=VALUE`: a value that reads as a Python literal is one, else it is text."""
    key, sign, value = text.partition('=')
    if not sign or not key.isidentifier():
        raise argparse.ArgumentTypeError(f'{short(text)} is not of the form KEY=VALUE')
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return key, value


def side(text: str) -> int:
    """A number of pixels along a side of an image."""
    return _int(text, 1, MAX_SIDE)


def num_workers(text: str) -> int:
    """A number of processes that load images."""
    return _int(text, 0, MAX_WORKERS)


def num_threads(text: str) -> int:
    """A number of threads that open images."""
    return _int(text, 1, MAX_WORKERS)


def area(text: str) -> float:
    """A share of the area of an image."""
    return _number(text, float, 'a number above 0, up to 1', lambda v: 0 < v <= 1)


def aspect_ratio(text: str) -> float:
    """Width / height."""
    return _number(text, float, 'a number from 0.1 to 10', lambda v: 0.1 <= v <= 10)


def positive_float(text: str) -> float:
    """A number above 0, none so large that it can only be a slip."""
    return _number(text, float, 'a number above 0, up to 1e6', lambda v: 0 < v <= 1e6)


def fraction(text: str) -> float:
    """A number from 0 to under 1."""
    return _number(text, float, 'a number from 0 to under 1', lambda v: 0 <= v < 1)


def port(text: str) -> int:
    """A number of a TCP port, or 0."""
    return _number(text, int, 'a port from 0 to 65535', lambda v: 0 <= v <= 65535)


def file_size(text: str) -> str:
    """A size as huggingface_hub writes it: a whole number and KB, MB or GB."""
    if not re.fullmatch('[1-9][0-9]{0,8}[KMG]B', text):
        raise argparse.ArgumentTypeError(f'{short(text)} is not a size such as 500MB')
    return text
