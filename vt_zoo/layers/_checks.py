"""Checks of arguments that layers and models share; what they raise names argument, value and what is allowed."""
from typing import Any, List

from timm.layers import get_norm_layer


def check_choice(name: str, value: Any, choices: List[Any]) -> None:
    """Raise ValueError where an argument is none of the choices."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {", ".join(repr(c) for c in choices)}, got {value!r}')


def check_positive(name: str, value: Any, multiple_of: int = 1) -> None:
    """Raise ValueError where an argument is no whole number of at least 1, or no multiple of another."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value % multiple_of:
        allowed = 'a whole number of at least 1' if multiple_of == 1 else f'a multiple of {multiple_of}'
        raise ValueError(f'{name} must be {allowed}, got {value!r}')


def check_norm(norm_layer: Any) -> None:
    """Raise ValueError where `norm_layer` is neither timm's name of a norm nor a class."""
    try:
        known = get_norm_layer(norm_layer) is not None
    except KeyError:
        known = False
    if not known:
        raise ValueError(f"norm_layer must be timm's name of a norm or a class, got {norm_layer!r}")
