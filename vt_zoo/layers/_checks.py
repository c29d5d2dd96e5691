"""Argument checks shared by layers and models; errors name the argument, its value and what is allowed."""
from typing import Any, List

from timm.layers import get_norm_layer


def check_choice(name: str, value: Any, choices: List[Any]) -> None:
    """Raise ValueError if an argument is not one of the choices."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {", ".join(repr(c) for c in choices)}, got {value!r}')


def check_positive(name: str, value: Any, multiple_of: int = 1) -> None:
    """Raise ValueError unless an argument is a whole number of at least 1 and a multiple of `multiple_of`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value % multiple_of:
        allowed = 'a whole number of at least 1' if multiple_of == 1 else f'a multiple of {multiple_of}'
        raise ValueError(f'{name} must be {allowed}, got {value!r}')


def check_norm(norm_layer: Any) -> None:
    """Raise ValueError if `norm_layer` is neither a name that timm has for a norm nor a class."""
    try:
        known = get_norm_layer(norm_layer) is not None
    except KeyError:
        known = False
    if not known:
        raise ValueError(f"norm_layer must be timm's name of a norm or a class, got {norm_layer!r}")
