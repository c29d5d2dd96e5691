"""Train a model on a folder of images.

DATA_DIR holds train/ and val/ (or training/, valid/, validation/, in upper or lower case) with one subfolder per
class, or the class folders themselves, which are then split; a test/ beside them is not read. Images in subfolders of
a class folder belong to that class. The classes are printed before training begins. A file that cannot be read as an
image is named in a warning and left out. --resume continues an interrupted run, to the same result with any number of
workers; a finished run is left as it is, with exit code 0. Two runs at the same time in one output folder are refused.
Models that have a trunk_* tag, such as vt_resnet18 and vt_regnety_016, start from those weights, which come from the
Hugging Face Hub; NAME.untrained starts from random ones. On several GPUs: accelerate launch -m vt_zoo finetune
DATA_DIR ...
"""
import argparse
import os
import sys
from pathlib import Path

from vt_zoo.classification.settings import FinetuneSettings
from vt_zoo.classification.train import finetune
from vt_zoo.devices import DEVICES, is_main_process
from vt_zoo.training.run_state import RunFinishedError

from .arguments import add_settings, num_workers, read_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add('data_dir', metavar='DATA_DIR', help='path to the data set')
    add('--out', default='vt_zoo_finetune', metavar='DIR', help='path to the output folder')
    add('--resume', action='store_true', help='continue the run in the output folder')
    add('--overwrite', action='store_true', help='replace the run in the output folder')
    add('--workers', type=num_workers, default=min(4, os.cpu_count() or 1), metavar='N',
        help='number of data loading processes; the outcome is the same with any number')
    add('--device', choices=DEVICES, default=argparse.SUPPRESS,
        help='device to train on (default: cuda if there is one)')
    add_settings(parser, FinetuneSettings)


def run(args: argparse.Namespace) -> None:
    """Train, and print the result."""
    settings = read_settings(args, FinetuneSettings)
    try:
        result = finetune(
            args.data_dir, args.out, settings, args.resume, args.overwrite, args.workers,
            getattr(args, 'device', None))
    except RunFinishedError as e:
        if is_main_process():
            print(f'finished   {e}')
        return
    except KeyboardInterrupt:
        if (Path(args.out) / 'checkpoint.safetensors').exists():
            print(f'the last complete epoch is kept in {args.out}, go on with --resume', file=sys.stderr)
        raise
    if not is_main_process():
        return
    print_result(result)
    print(f'use        vt-zoo predict IMAGE --model {result.model_dir}')


def print_result(result) -> None:
    """Print the outcome of a run."""
    same = 'the same' if result.same_predictions else f'NOT the same ({result.reloaded_correct} right)'
    print(
        f'accuracy   {100 * result.correct / result.total:.2f} % ({result.correct} of {result.total} held-out images), '
        f'{result.seconds:.0f} s')
    print(f'reloaded   {same} prediction on each of the {result.total} images')
    print(f'model      {result.model_dir}')
