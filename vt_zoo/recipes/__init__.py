"""Recipes: configuration files for the option `-c` of timm's train.py."""
from pathlib import Path
from typing import List

__all__ = ['list_recipes', 'recipe_path']

_FOLDER = Path(__file__).parent / 'classification'


def list_recipes() -> List[str]:
    """Names of the recipes."""
    return sorted(path.stem for path in _FOLDER.glob('*.yaml'))


def recipe_path(name: str) -> Path:
    """Path of a recipe's file.

    Raises:
        ValueError: There is no such recipe.
    """
    if name not in list_recipes():
        raise ValueError(f'recipe must be one of {", ".join(list_recipes())}, got {name!r}')
    return _FOLDER / f'{name}.yaml'
