"""Types of command-line arguments, and the options of settings."""
import argparse
import ast
import os
import re
from dataclasses import fields
from typing import Any, Dict, List, Optional, Tuple, Type, TypeVar, Union, get_args, get_origin, get_type_hints

from vt_zoo.errors import MAX_INT, MAX_SIDE, InputError, short
from vt_zoo.training.settings import YAML_ERRORS, Settings, read_yaml, shown_default

Kind = TypeVar('Kind', bound=Settings)

WORDS = {type(None): ('null',), bool: ('true', 'True', 'false', 'False')}  # that YAML reads as these types
MAX_WORKERS = 8 * (os.cpu_count() or 1)  # each takes the memory of a process


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of an option that has one."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        if action.required or action.default is None or action.default is False:
            return action.help
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
    """A whole number of at least 0 and of at most 31 bits, which is a valid seed everywhere."""
    return _int(text, 0, MAX_INT)


def keyword(text: str) -> Tuple[str, Any]:
    """`KEY=VALUE`, where the value is a Python literal if it reads as one, otherwise text."""
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


def port(text: str) -> int:
    """A number of a TCP port, or 0."""
    return _number(text, int, 'a port from 0 to 65535', lambda v: 0 <= v <= 65535)


def file_size(text: str) -> str:
    """A size as huggingface_hub writes it: a whole number and KB, MB or GB."""
    if not re.fullmatch('[1-9][0-9]{0,8}[KMG]B', text):
        raise argparse.ArgumentTypeError(f'{short(text)} is not a size such as 500MB')
    return text


def add_settings(parser: argparse.ArgumentParser, kind: Type[Settings]) -> None:
    """Add `--config` and an option for each field of settings."""
    recipes = kind.recipes()
    parser.add_argument('--config', metavar='RECIPE', help=f'recipe, a YAML file or one of: {", ".join(recipes)}')
    add = parser.add_argument_group(
        'settings', 'Each overrides the field of the same name in the recipe. If neither is given, the default applies.'
    ).add_argument
    types = get_type_hints(kind)
    for f in fields(kind):
        add(f'--{f.name.replace("_", "-")}', dest=f'set_{f.name}', default=argparse.SUPPRESS,
            nargs='+' if _is_keywords(types[f.name]) or _takes_several(types[f.name]) else None,
            type=keyword if _is_keywords(types[f.name]) else str, metavar=f.metadata['metavar'],
            help=f'{f.metadata["text"]} (default: the recipe\'s, else {shown_default(f)})')


def read_settings(args: argparse.Namespace, kind: Type[Kind]) -> Kind:
    """Read settings from `--config` and from the options that override it."""
    types = get_type_hints(kind)
    given = {f.name: getattr(args, f'set_{f.name}') for f in fields(kind) if hasattr(args, f'set_{f.name}')}
    return kind.read(args.config, {name: read_option(name, value, types[name]) for name, value in given.items()})


def read_option(name: str, given: Union[str, List[Any]], kind: Any) -> Any:
    """Parse the value of an option of settings.

    Args:
        name: Of the field.
        given: A word, or a YAML text, or several that make a list; one of a list may stand for it whole.
        kind: Type of the field.

    Raises:
        InputError: The value is not YAML.
    """
    if _is_keywords(kind):
        return dict(given)
    if isinstance(given, list):
        values = [read_option(name, text, Any) for text in given]
        whole = len(values) == 1 and (int in get_args(kind) or not isinstance(values[0], (int, float)))
        return values[0] if whole else values
    kinds = get_args(kind)
    if kind is str or (str in kinds and not any(given in WORDS.get(k, ()) for k in kinds)):
        return given
    try:
        return read_yaml(given)
    except YAML_ERRORS as e:
        raise InputError(f'{name} must be a value as in YAML, got {short(given)}') from e


def _is_keywords(kind: Any) -> bool:
    return kind == Dict[str, Any]


def _takes_several(kind: Any) -> bool:
    return any(get_origin(k) in (tuple, list) for k in (kind, *get_args(kind)))
