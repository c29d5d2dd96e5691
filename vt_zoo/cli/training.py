"""What the commands that train share: the options of a run, and how it ends."""
import argparse
import os
import sys
from pathlib import Path
from typing import Callable, Optional, TypeVar

from vt_zoo.devices import DEVICES, is_main_process
from vt_zoo.training.run_state import RunFinishedError
from vt_zoo.training.settings import Settings

from .arguments import num_workers

Result = TypeVar('Result')


def add_run_arguments(parser: argparse.ArgumentParser, out: str, device: str) -> None:
    """Add the options that say where and how to train, but do not decide the outcome.

    Args:
        parser: Parser of the command.
        out: Default output folder.
        device: The device that is used if none is named, in words.
    """
    add = parser.add_argument
    add('--out', default=out, metavar='DIR', help='path to the output folder')
    add('--resume', action='store_true', help='continue the run in the output folder')
    add('--overwrite', action='store_true', help='replace the run in the output folder')
    add('--workers', type=num_workers, default=min(4, os.cpu_count() or 1), metavar='N',
        help='number of data loading processes, for each process that trains; the outcome is the same with any number')
    add('--device', choices=DEVICES, default=argparse.SUPPRESS, help=f'device to train on (default: {device})')


def run_training(
        train: Callable[..., Result], args: argparse.Namespace, settings: Settings) -> Optional[Result]:
    """Call a training function with the options of the run.

    Returns:
        What it returns; None where there is nothing to print: the run was finished before, or this process is not the
        first of several.
    """
    try:
        result = train(
            args.data_dir, args.out, settings, args.resume, args.overwrite, args.workers, getattr(args, 'device', None))
    except RunFinishedError as e:
        if is_main_process():
            print(f'finished   {e}')
        return None
    except KeyboardInterrupt:
        if (Path(args.out) / 'checkpoint.safetensors').exists():
            print(f'the last checkpoint is kept in {args.out}, go on with --resume', file=sys.stderr)
        raise
    return result if is_main_process() else None
