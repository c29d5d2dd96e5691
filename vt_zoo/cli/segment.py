"""Train, measure and use models for semantic segmentation: VT-FPN and the panoptic FPN.

Needs the extra `segmentation`. On several GPUs: accelerate launch -m vt_zoo segment train --config ...
"""
import argparse
import json
import os
import sys
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vt_zoo.errors import InputError, short
from vt_zoo.run_state import RunFinishedError
from vt_zoo.segmentation.settings import (
    YAML_ERRORS,
    SegmentSettings,
    list_segmentation_recipes,
    read_settings,
    read_yaml,
)

from .arguments import num_workers, positive_int, side, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    commands = parser.add_subparsers(dest='action', metavar='ACTION', required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    add = command('train', 'train a model').add_argument
    recipes = ', '.join(list_segmentation_recipes())
    add('--config', metavar='RECIPE', help=f'YAML file, or one of: {recipes}')
    add('--data-dir', required=True, metavar='DIR', help='folder of the data set')
    add('--out', default='vt_zoo_segment', metavar='DIR', help='folder to write')
    add('--resume', action='store_true', help='go on with the run that DIR holds')
    add('--overwrite', action='store_true', help='begin anew where DIR holds a run')
    add('--workers', type=num_workers, default=min(4, os.cpu_count() or 1), help='processes that load images')
    add('--device', choices=['cpu', 'cuda'], default=None, help='a GPU if there is one, if not given')
    for f in fields(SegmentSettings):
        add(f'--{f.name.replace("_", "-")}', dest=f'set_{f.name}', default=argparse.SUPPRESS, metavar='VALUE',
            help='in place of the recipe\'s, as YAML')

    add = command('digits', 'write a set of handwritten digits on textured backgrounds, to try it').add_argument
    add('root', metavar='DIR', help='folder to write, new or empty')
    add('--train', type=positive_int, default=1200, metavar='N', help='training images')
    add('--val', type=positive_int, default=300, metavar='N', help='validation images')
    add('--size', type=side, default=64, metavar='PIXELS', help='height and width')
    add('--seed', type=whole_number, default=0, help='of what is drawn at random')

    add = command('eval', 'measure a model on a data set').add_argument
    add('--model', required=True, metavar='DIR', help='folder of the model')
    add('--data-dir', required=True, metavar='DIR', help='folder of the data set')
    add('--format', default='folder', help='layout of the data set')
    add('--split', choices=['train', 'val'], default='val', help='part of the data set')
    add('--workers', type=num_workers, default=min(4, os.cpu_count() or 1), help='processes that load images')
    add('--json', action='store_true', help='print an object instead of a table')

    add = command('predict', 'segment images').add_argument
    add('images', nargs='+', metavar='IMAGE', help='image file')
    add('--model', required=True, metavar='DIR', help='folder of the model')
    add('--out', default='vt_zoo_segmented', metavar='DIR', help='folder to write')


def run(args: argparse.Namespace) -> None:
    """Run the action."""
    try:
        {'train': _train, 'eval': _eval, 'predict': _predict, 'digits': _digits}[args.action](args)
    except ImportError as e:
        raise InputError(f"segmentation needs {e.name}: pip install 'vt_zoo[segmentation]'") from None


def _from_yaml(name: str, text: str) -> Any:
    try:
        return read_yaml(text)
    except YAML_ERRORS as e:
        raise InputError(f'{name} must be a value as in YAML, got {short(text)}') from e


def _train(args: argparse.Namespace) -> None:
    overrides = {
        f.name: _from_yaml(f.name, getattr(args, f'set_{f.name}'))
        for f in fields(SegmentSettings) if hasattr(args, f'set_{f.name}')}
    settings = read_settings(args.config, overrides)
    from vt_zoo.segmentation.train import train
    try:
        result = train(
            args.data_dir, args.out, settings, args.resume, args.overwrite, args.workers, args.device)
    except RunFinishedError as e:
        if not int(os.environ.get('RANK', 0)):
            print(f'finished   {e}')
        return
    except KeyboardInterrupt:
        if (Path(args.out) / 'checkpoint.safetensors').exists():
            print(f'the last checkpoint is kept in {args.out}, go on with --resume', file=sys.stderr)
        raise
    if int(os.environ.get('RANK', 0)):  # of several processes one speaks
        return
    print(
        f'mIoU       {100 * result.last.miou:.2f} % after the last iteration, pixel accuracy '
        f'{100 * result.last.pixel_accuracy:.2f} %, {result.seconds:.0f} s')
    print(f'best       {100 * result.best_miou:.2f} %')
    print(f'models     {result.last_dir}, {result.best_dir}')
    print(f'use        vt-zoo segment predict IMAGE --model {result.last_dir}')


def _eval(args: argparse.Namespace) -> None:
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from vt_zoo.segmentation.datasets import load_dataset
    from vt_zoo.segmentation.evaluate import evaluate, read_batches
    from vt_zoo.segmentation.model_files import load_segmentation_model
    from vt_zoo.segmentation.transforms import eval_transform

    loaded = load_segmentation_model(args.model)
    dataset = load_dataset(args.format, args.data_dir, args.split, eval_transform(loaded.mean, loaded.std))
    if dataset.classes != loaded.classes:
        ours, theirs = next((a, b) for a, b in zip_longest(loaded.classes, dataset.classes) if a != b)
        raise InputError(
            f'model {args.model} and data set {args.data_dir} must have the same classes, got {ours!r} and {theirs!r}')
    batches = read_batches(DataLoader(dataset, num_workers=args.workers))
    metrics = evaluate(
        loaded.model, tqdm(batches, desc='evaluating', total=len(dataset), leave=False), len(loaded.classes),
        loaded.eval_size)
    if args.json:
        print(json.dumps({
            'images': len(dataset), 'miou': metrics.miou, 'pixel_accuracy': metrics.pixel_accuracy,
            'iou': dict(zip(loaded.classes, metrics.iou))}, indent=2))
        return
    width = max(map(len, loaded.classes))
    for name, iou in zip(loaded.classes, metrics.iou):
        print(f'{name:{width}}  {"absent" if iou is None else f"{100 * iou:6.2f} %"}')
    miou, accuracy = 100 * metrics.miou, 100 * metrics.pixel_accuracy
    print(f'mIoU {miou:.2f} %, pixel accuracy {accuracy:.2f} %, {len(dataset)} images')


def _predict(args: argparse.Namespace) -> None:
    from vt_zoo.segmentation.model_files import load_segmentation_model
    from vt_zoo.segmentation.predict import predict_files

    for overlay, classes in predict_files(load_segmentation_model(args.model), args.images, args.out):
        print(f'{overlay}  {classes}')


def _digits(args: argparse.Namespace) -> None:
    from vt_zoo.segmentation.composed_digits import write_composed_digits

    write_composed_digits(args.root, args.train, args.val, args.size, args.seed)
    print(f'data       {args.root}, {args.train} training and {args.val} validation images')
    print(f'use        vt-zoo segment train --config digits --data-dir {args.root}')
