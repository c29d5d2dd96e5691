"""Train a model on a folder of images.

DATA_DIR holds train/ and val/ (or training/, valid/, validation/, in upper or lower case) with one subfolder per
class, or the class folders themselves, which are then split; a test/ beside them is not read. Images in subfolders of
a class folder belong to that class. The classes are printed before training begins. A file that cannot be read as an
image is named in a warning and left out. --resume continues an interrupted run, with the same result for any number of
workers; a finished run is left as it is, with exit code 0. Two runs at the same time in one output folder are refused.
Models that have a trunk_* tag, such as vt_resnet18 and vt_regnety_016, start from those weights, which come from the
Hugging Face Hub; NAME.untrained starts from random ones. On several GPUs: accelerate launch -m vt_zoo finetune
DATA_DIR ...
"""
import argparse

from vt_zoo.classification.settings import FinetuneSettings
from vt_zoo.classification.train import FinetuneResult, finetune

from .arguments import add_settings, read_settings
from .training import add_run_arguments, run_training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument('data_dir', metavar='DATA_DIR', help='path to the data set')
    add_run_arguments(parser, 'vt_zoo_finetune', 'cuda if there is one')
    add_settings(parser, FinetuneSettings)


def run(args: argparse.Namespace) -> None:
    """Train, and print the result."""
    result = run_training(finetune, args, read_settings(args, FinetuneSettings))
    if result is not None:
        print_result(result)
        print(f'use        vt-zoo predict IMAGE --model {result.model_dir}')


def print_result(result: FinetuneResult) -> None:
    """Print the outcome of a run."""
    same = 'the same' if result.same_predictions else f'NOT the same ({result.reloaded_correct} right)'
    print(
        f'accuracy   {100 * result.correct / result.total:.2f} % ({result.correct} of {result.total} held-out images), '
        f'{result.seconds:.0f} s')
    print(f'reloaded   {same} prediction on each of the {result.total} images')
    print(f'model      {result.model_dir}')
