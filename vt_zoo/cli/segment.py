"""Train, evaluate and use models for semantic segmentation: VT-FPN and the panoptic FPN.

Needs the extra `segmentation`. On several GPUs: accelerate launch -m vt_zoo segment train --config ...
"""
import argparse
import json
import os
from dataclasses import fields
from itertools import zip_longest
from typing import Optional

from vt_zoo.data.image_stream import find_images
from vt_zoo.data.label_map import read_label_map
from vt_zoo.devices import find_device
from vt_zoo.errors import InputError
from vt_zoo.segmentation.settings import SegmentSettings
from vt_zoo.weights.loading import SEGMENTATION, load

from .arguments import (
    HelpFormatter,
    add_settings,
    num_workers,
    positive_int,
    read_option,
    read_settings,
    side,
    whole_number,
)
from .results import add_image_arguments, print_results
from .training import add_run_arguments, run_training

FIELDS = {f.name: f for f in fields(SegmentSettings)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    commands = parser.add_subparsers(dest='action', metavar='ACTION', required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=text, formatter_class=HelpFormatter)

    train = command('train', 'train a model')
    train.add_argument('--data-dir', required=True, metavar='DIR', help='path to the data set')
    add_run_arguments(train, 'vt_zoo_segment', 'a GPU if there is one')
    add_settings(train, SegmentSettings)

    add = command('digits', 'write a small data set to try: handwritten digits on textured backgrounds').add_argument
    add('root', metavar='DIR', help='path to the output folder, new or empty')
    add('--train', type=positive_int, default=1200, metavar='N', help='number of training images')
    add('--val', type=positive_int, default=300, metavar='N', help='number of validation images')
    add('--size', type=side, default=64, metavar='PIXELS', help='height and width of the images')
    add('--seed', type=whole_number, default=0, metavar='N', help='random seed')

    add = command('eval', 'evaluate a model on a data set').add_argument
    add('--model', required=True, metavar='DIR', help='path to the model folder')
    add('--data-dir', required=True, metavar='DIR', help='path to the data set')
    add('--format', default='folder', metavar='NAME', help=FIELDS['format'].metadata['text'])
    add('--label-map', metavar='MAP', default=argparse.SUPPRESS,
        help=f"{FIELDS['label_map'].metadata['text']}; null for none (default: the model's own)")
    add('--split', choices=['train', 'val', 'test'], default='val', help='split of the data set')
    add('--workers', type=num_workers, default=min(4, os.cpu_count() or 1), metavar='N',
        help='number of data loading processes')
    add('--json', action='store_true', help='print a JSON object instead of a table')

    predict = command('predict', 'segment images; an image that cannot be used gets a line with its error')
    add = predict.add_argument
    add('--model', required=True, metavar='DIR', help='path to the model folder')
    add('--out', default='vt_zoo_segmented', metavar='DIR',
        help='path to the output folder; subfolders of an input folder are recreated in it')
    add_image_arguments(predict, batch_size=1)


def run(args: argparse.Namespace) -> Optional[int]:
    """Run the action."""
    try:
        return {'train': _train, 'eval': _eval, 'predict': _predict, 'digits': _digits}[args.action](args)
    except ImportError as e:
        raise InputError(f"segmentation needs {e.name}: pip install 'vt_zoo[segmentation]'") from None


def _train(args: argparse.Namespace) -> None:
    settings = read_settings(args, SegmentSettings)
    from vt_zoo.segmentation.train import train_segmenter
    result = run_training(train_segmenter, args, settings)
    if result is None:
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
    from vt_zoo.segmentation.label_counts import check_classes, count_labels
    from vt_zoo.segmentation.metrics import evaluate
    from vt_zoo.segmentation.transforms import eval_transform
    from vt_zoo.training.sampling import read_batches

    loaded = load(args.model, SEGMENTATION)
    dataset = load_dataset(
        args.format, args.data_dir, args.split,
        eval_transform(loaded.preprocessing['mean'], loaded.preprocessing['std']))
    if dataset.classes != loaded.classes:
        ours, theirs = next((a, b) for a, b in zip_longest(loaded.classes, dataset.classes) if a != b)
        raise InputError(
            f'model {args.model} and data set {args.data_dir} must have the same classes, got {ours!r} and {theirs!r}')
    if hasattr(args, 'label_map'):
        dataset.map_labels(read_label_map(read_option('label_map', args.label_map, dict)))
    elif dataset.own_labels:
        dataset.map_labels(loaded.label_map)
    try:
        check_classes(dataset, count_labels(dataset), args.split)
    except InputError as e:
        if dataset.label_map is None or hasattr(args, 'label_map') or 'label_map' not in str(e):
            raise
        raise InputError(f'{e}; the label_map is that of the model, --label-map gives another') from e
    batches = read_batches(DataLoader(dataset, num_workers=args.workers))
    metrics = evaluate(
        loaded.model, tqdm(batches, desc='evaluating', total=len(dataset), disable=None, leave=False),
        len(loaded.classes), loaded.eval_size)
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


def _predict(args: argparse.Namespace) -> int:
    from vt_zoo.segmentation.predict import predict_files

    device = find_device(args.device)
    loaded = load(args.model, SEGMENTATION)
    loaded.model.to(device)
    segmented = predict_files(loaded, find_images(args.images), args.out, args.batch_size, args.workers)
    results = (
        {'image': s.path, 'overlay': str(s.overlay), 'classes': str(s.classes)} if s.error is None else
        {'image': s.path, 'error': s.error} for s in segmented)
    return print_results(
        args, results, ['image', 'overlay', 'classes', 'error'], lambda result: [*result.values(), ''],
        lambda result: f'{result["overlay"]}  {result["classes"]}\n')


def _digits(args: argparse.Namespace) -> None:
    from vt_zoo.data.composed_digits import write_composed_digits

    write_composed_digits(args.root, args.train, args.val, args.size, args.seed)
    print(f'data       {args.root}, {args.train} training and {args.val} validation images')
    print(f'use        vt-zoo segment train --config digits --data-dir {args.root}')
