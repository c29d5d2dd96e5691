"""Printing the results of commands on many images, each as soon as it is available, as text, JSON or CSV."""
import argparse
import csv
import io
import json
import os
import sys
from typing import Any, Callable, Dict, Iterable, List

from tqdm import tqdm

from vt_zoo.devices import DEVICES
from vt_zoo.errors import InputError

from .arguments import num_threads, positive_int

__all__ = ['add_image_arguments', 'print_results']


def add_image_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Add the arguments of a command that processes images.

    Args:
        parser: The command's.
        batch_size: Default of `--batch-size`.
    """
    add = parser.add_argument
    add('images', nargs='+', metavar='IMAGE',
        help="image file, folder of images (with its subfolders), or '-' for paths from standard input, one per line")
    add('--batch-size', type=positive_int, default=batch_size, metavar='N', help='batch size in images')
    add('--device', choices=DEVICES, default=None, help='device to run on (default: cuda if there is one)')
    add('--workers', type=num_threads, default=min(4, os.cpu_count() or 1), metavar='N',
        help='number of threads that read images')
    form = parser.add_mutually_exclusive_group()
    form.add_argument('--json', action='store_true', help='print a JSON list of objects instead of a table')
    form.add_argument('--jsonl', action='store_true', help='print one JSON object per line')
    form.add_argument('--csv', action='store_true', help='print one comma-separated line per image, after a header')


def print_results(
        args: argparse.Namespace,
        results: Iterable[Dict[str, Any]],
        columns: List[str],
        to_row: Callable[[Dict[str, Any]], List[Any]],
        to_text: Callable[[Dict[str, Any]], str],
) -> int:
    """Print results as they arrive, each as a whole and without delay.

    Args:
        args: `json`, `jsonl` and `csv` say how.
        results: Each has `image`, and `error` where it could not be read.
        columns: Headings of CSV.
        to_row: Values of a result under these headings; of one without an error.
        to_text: Result as lines of the table; of one without an error.

    Returns:
        The exit code, which is 1 if there are errors; their number is then printed on standard error.

    Raises:
        InputError: There are no results.
    """
    total = failed = 0
    if args.csv:
        _print(_csv_line(columns))
    for result in tqdm(
            results, unit=' images', leave=False, disable=not sys.stderr.isatty() or sys.stdout.isatty()):
        error = result.get('error')
        if args.json:
            _print(f'{"," if total else "["}\n  {json.dumps(result)}')
        elif args.jsonl:
            _print(f'{json.dumps(result)}\n')
        elif args.csv:
            row = to_row(result) if error is None else [result['image'], *[''] * (len(columns) - 2), error]
            _print(_csv_line(row))
        else:
            _print(to_text(result) if error is None else f'{result["image"]}\n  error: {error}\n')
        total += 1
        failed += error is not None
    if not total:
        raise InputError('no image is named on standard input')
    if args.json:
        _print('\n]\n')
    if failed:
        print(f'vt-zoo: error: {failed} of {total} images could not be used', file=sys.stderr)
    return 1 if failed else 0


def _print(text: str) -> None:
    """Print in one go, so that a killed process leaves only whole lines."""
    print(text, end='', flush=True)


def _csv_line(values: List[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator='\n').writerow(values)
    return line.getvalue()
