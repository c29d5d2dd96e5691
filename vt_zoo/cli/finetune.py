"""Train a model on a folder of images, on CPU or one GPU.

DATA_DIR holds train/ and val/ with a subfolder a class, or the class folders themselves, which are then split. A file
that cannot be read as an image is named in a warning and left out. A run that was interrupted goes on with --resume;
one that is finished stays as it is, with exit code 0. Two runs at a time in one DIR are refused.
vt_resnet18, 34, 50 and 101 start from the trunk of a pretrained ResNet if the Hugging Face Hub can be reached.
"""
import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

from vt_zoo.finetune import FinetuneSettings, finetune
from vt_zoo.run_state import RunFinishedError

from .arguments import area, aspect_ratio, fraction, num_workers, positive_float, positive_int, side, whole_number

DEFAULTS = FinetuneSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add('data_dir', metavar='DATA_DIR', help='folder of images')
    add('--model', default=DEFAULTS.model, metavar='NAME_OR_DIR',
        help='name, or name.tag or folder with weights; name.untrained begins new')
    add('--out', default='vt_zoo_finetune', metavar='DIR', help='folder to write')
    add('--resume', action='store_true', help='go on with the run that DIR holds')
    add('--overwrite', action='store_true', help='begin anew where DIR holds a run')
    add('--epochs', type=positive_int, default=DEFAULTS.epochs, help='passes over the training images')
    add('--batch-size', type=positive_int, default=DEFAULTS.batch_size, help='images a step')
    add('--img-size', type=side, default=None, help="side of the input; the model's own if not given")
    add('--opt', choices=['momentum', 'sgd', 'rmsproptf', 'adamw'], default=DEFAULTS.opt, help="timm's optimizer")
    add('--lr', type=positive_float, default=DEFAULTS.lr, help='peak learning rate')
    add('--weight-decay', type=fraction, default=DEFAULTS.weight_decay, help='weight decay')
    add('--warmup-epochs', type=whole_number, default=DEFAULTS.warmup_epochs, help='epochs of rising learning rate')
    add('--smoothing', type=fraction, default=DEFAULTS.smoothing, help='label smoothing')
    add('--drop', type=fraction, default=DEFAULTS.drop, help='dropout before the classifier')
    add('--drop-path', type=fraction, default=DEFAULTS.drop_path, help='stochastic depth')
    add('--model-ema-decay', type=fraction, default=DEFAULTS.model_ema_decay, help='decay of the moving average')
    add('--scale', type=area, nargs=2, default=DEFAULTS.scale, help='area of a random crop')
    add('--ratio', type=aspect_ratio, nargs=2, default=DEFAULTS.ratio, help='aspect ratio of a random crop')
    add('--hflip', type=fraction, default=DEFAULTS.hflip, help='probability of a horizontal flip')
    add('--color-jitter', type=fraction, default=DEFAULTS.color_jitter, help='strength of colour jitter')
    add('--aa', default=DEFAULTS.aa, metavar='POLICY', help="timm's AutoAugment policy, as rand-m9-mstd0.5")
    add('--val-fraction', type=fraction, default=DEFAULTS.val_fraction, help='share held out where there is no val/')
    add('--seed', type=whole_number, default=DEFAULTS.seed, help='of weights, order and augmentation')
    add('--workers', type=num_workers, default=min(4, os.cpu_count() or 1), help='processes that load images')
    add('--device', choices=['cpu', 'cuda'], default=None, help='a GPU if there is one, if not given')
    add('--precision', choices=['auto', 'float32', 'bfloat16', 'float16'], default=DEFAULTS.precision,
        help='of the arithmetic in training; auto is mixed precision on a GPU')


def run(args: argparse.Namespace) -> None:
    """Train, and print what came of it."""
    settings = FinetuneSettings(**{f.name: getattr(args, f.name) for f in fields(FinetuneSettings)})
    try:
        result = finetune(
            args.data_dir, args.out, settings, args.resume, args.overwrite, args.workers, args.device)
    except RunFinishedError as e:
        print(f'finished   {e}')
        return
    except KeyboardInterrupt:
        if (Path(args.out) / 'checkpoint.safetensors').exists():
            print(f'the last complete epoch is kept in {args.out}, go on with --resume', file=sys.stderr)
        raise
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
