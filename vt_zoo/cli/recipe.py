"""Print the path of a recipe for timm's train.py, as in `python train.py -c $(vt-zoo recipe advanced) ...`."""
import argparse

from vt_zoo.errors import either
from vt_zoo.recipes import list_recipes, recipe_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    names = list_recipes()
    parser.add_argument('name', choices=names, metavar='NAME', help=f'recipe: {either(names)}')
    parser.add_argument('--show', action='store_true', help='print the recipe instead of its path')


def run(args: argparse.Namespace) -> None:
    """Print the recipe's path or text."""
    path = recipe_path(args.name)
    if args.show:
        print(path.read_text(encoding='utf-8'), end='')
    else:
        print(path)
