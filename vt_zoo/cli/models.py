"""List the models with their parameters, multiply-adds and weights.

Parameters are counted the paper's way, without norms and biases; multiply-adds at 224x224 in the training form.
"""
import argparse
import json

import timm

from vt_zoo.analysis.cost import count_multiply_adds, count_weights
from vt_zoo.models import list_classifiers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument('--json', action='store_true', help='print a JSON list instead of a table')


def run(args: argparse.Namespace) -> None:
    """Print the models."""
    rows = []
    for name in list_classifiers():
        model = timm.create_model(name, device='meta')
        rows.append({
            'name': name, 'parameters': count_weights(model), 'multiply_adds': count_multiply_adds(model),
            'weights': timm.list_pretrained(f'{name}.*'),
        })
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(f'{"model":28}{"parameters":>12}{"multiply-adds":>16}  weights')
    for row in rows:
        weights = ', '.join(row['weights']) or 'none'
        print(f'{row["name"]:28}{row["parameters"] / 1e6:10.2f} M{row["multiply_adds"] / 1e6:14.0f} M  {weights}')
