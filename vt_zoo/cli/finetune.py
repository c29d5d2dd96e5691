"""Train a model on a folder of images.

DATA_DIR holds train/ and val/ (or training/, valid/, validation/, in any case) with a subfolder a class, or the class
folders themselves, which are then split; test/ beside them is left alone. Pictures in subfolders of a class folder
belong to the class. The classes are printed before training begins. A file that cannot be read as an image is named in
a warning and left out. A run that was interrupted goes on with --resume, to the same result with any number of workers;
one that is finished stays as it is, with exit code 0. Two runs at a time in one DIR are refused.
Models with a trunk_* tag, as vt_resnet18 and vt_regnety_016, start from its weights, which come from the Hugging Face
Hub; NAME.untrained starts from random ones. On several GPUs: accelerate launch -m vt_zoo finetune DATA_DIR ...
"""
import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

from vt_zoo.classification.settings import FinetuneSettings
from vt_zoo.classification.train import finetune
from vt_zoo.devices import DEVICES, is_main_process
from vt_zoo.training.run_state import RunFinishedError

from .arguments import (
    area,
    aspect_ratio,
    fraction,
    keyword,
    num_workers,
    positive_float,
    positive_int,
    side,
    whole_number,
)

DEFAULTS = FinetuneSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add('data_dir', metavar='DATA_DIR', help='path to the data set')
    add('--model', default=DEFAULTS.model, metavar='NAME_OR_DIR',
        help='name of the model to train, NAME.TAG or a folder for its weights, NAME.untrained for new ones')
    add('--model-kwargs', type=keyword, nargs='+', default=argparse.SUPPRESS, metavar='KEY=VALUE',
        help='arguments of the model, e.g. trunk=regnety_016 trunk_pretrained=True with --model vt_net')
    add('--out', default='vt_zoo_finetune', metavar='DIR', help='path to the output folder')
    add('--resume', action='store_true', help='continue the run in the output folder')
    add('--overwrite', action='store_true', help='replace the run in the output folder')
    add('--epochs', type=positive_int, default=DEFAULTS.epochs, metavar='N', help='number of epochs to train')
    add('--batch-size', type=positive_int, default=DEFAULTS.batch_size, metavar='N',
        help='batch size in images, of all processes together')
    add('--img-size', type=side, default=argparse.SUPPRESS, metavar='PIXELS',
        help="height and width of the input (default: the model's own)")
    add('--opt', choices=['momentum', 'sgd', 'rmsproptf', 'adamw'], default=DEFAULTS.opt,
        help='optimizer, by its name in timm')
    add('--lr', type=positive_float, default=DEFAULTS.lr, metavar='LR', help='peak learning rate')
    add('--weight-decay', type=fraction, default=DEFAULTS.weight_decay, metavar='W', help='weight decay')
    add('--warmup-epochs', type=whole_number, default=DEFAULTS.warmup_epochs, metavar='N',
        help='number of epochs in which the learning rate rises')
    add('--smoothing', type=fraction, default=DEFAULTS.smoothing, metavar='P', help='label smoothing')
    add('--drop', type=fraction, default=DEFAULTS.drop, metavar='P', help='dropout rate before the classifier')
    add('--drop-path', type=fraction, default=DEFAULTS.drop_path, metavar='P', help='drop path (stochastic depth) rate')
    add('--model-ema-decay', type=fraction, default=DEFAULTS.model_ema_decay, metavar='DECAY',
        help='decay of the moving average of the weights')
    add('--scale', type=area, nargs=2, default=DEFAULTS.scale, metavar=('MIN', 'MAX'),
        help='random crop area, as a share of the image')
    add('--ratio', type=aspect_ratio, nargs=2, default=DEFAULTS.ratio, metavar=('MIN', 'MAX'),
        help='random crop aspect ratio, width by height')
    add('--hflip', type=fraction, default=DEFAULTS.hflip, metavar='P', help='horizontal flip probability')
    add('--color-jitter', type=fraction, default=DEFAULTS.color_jitter, metavar='X', help='color jitter factor')
    add('--aa', default=argparse.SUPPRESS, metavar='POLICY',
        help='AutoAugment policy of timm, e.g. rand-m9-mstd0.5 (default: none)')
    add('--val-fraction', type=fraction, default=DEFAULTS.val_fraction, metavar='P',
        help='share of the images to hold out if DATA_DIR has no val/')
    add('--seed', type=whole_number, default=DEFAULTS.seed, metavar='N',
        help='random seed of weights, order and augmentation')
    add('--workers', type=num_workers, default=min(4, os.cpu_count() or 1), metavar='N',
        help='number of data loading processes; the outcome is the same with any number')
    add('--device', choices=DEVICES, default=argparse.SUPPRESS,
        help='device to train on (default: cuda if there is one)')
    add('--precision', choices=['auto', 'float32', 'bfloat16', 'float16'], default=DEFAULTS.precision,
        help='precision of training; auto is mixed precision on cuda, else float32')


def run(args: argparse.Namespace) -> None:
    """Train, and print what came of it."""
    given = {f.name: getattr(args, f.name) for f in fields(FinetuneSettings) if hasattr(args, f.name)}
    settings = FinetuneSettings(**{**given, 'model_kwargs': dict(given.get('model_kwargs', ()))})
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
