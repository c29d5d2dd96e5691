"""Recipes: configuration files for `-c` of timm's train.py, and for `--config` of this package's commands."""
from pathlib import Path
from typing import List

__all__ = ['list_recipes', 'recipe_path']

_FOLDER = Path(__file__).parent


def list_recipes(folder: str = 'classification') -> List[str]:
    """Names of the recipes.

    Args:
        folder: What they are for: 'classification' for timm's train.py, 'finetune' for `vt-zoo finetune`,
            'segmentation' for `vt-zoo segment train`.
    """
    return sorted(path.stem for path in (_FOLDER / folder).glob('*.yaml'))


def recipe_path(name: str, folder: str = 'classification') -> Path:
    """Path of a recipe's file; see `list_recipes` for `folder`.

    Raises:
        ValueError: There is no such recipe.
    """
    names = list_recipes(folder)
    if name not in names:
        raise ValueError(f'recipe must be one of {", ".join(names)}, got {name!r}')
    return _FOLDER / folder / f'{name}.yaml'
