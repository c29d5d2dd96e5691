"""Convert a checkpoint of timm's train.py to safetensors in timm's hub layout.

CHECKPOINT is a file saved by train.py (last.pth.tar, model_best.pth.tar, ...) or by another program: a plain state
dict, or one stored under a common name (model, model_state_dict, ...), with any prefix before the names, such as
Lightning's. Nothing in the file is executed; a file that cannot be read that way is refused. DIR can then be loaded by
timm.create_model('local-dir:DIR', pretrained=True), `vt-zoo predict` and `vt-zoo publish`.
"""
import argparse

import torch

from vt_zoo.weights.conversion import convert

from .arguments import file_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add('checkpoint', metavar='CHECKPOINT', help='path to the checkpoint')
    add('--out', required=True, metavar='DIR', help='path to the output folder, which must not exist')
    add('--model', default=None, metavar='NAME', help='model name, if not the one in the checkpoint')
    add('--ema', action=argparse.BooleanOptionalAction, default=None,
        help='use the moving average of the weights, or do not (default: use it if there is one)')
    add('--dtype', choices=['float16', 'bfloat16'], default=None, help='data type of the weights, if not their own')
    add('--max-shard-size', type=file_size, default=None, metavar='SIZE',
        help='maximum file size, e.g. 500MB, above which the weights are split into shards. timm cannot read '
             'shards; `vt-zoo predict`, transformers and huggingface_hub.load_torch_model can')


def run(args: argparse.Namespace) -> None:
    """Convert, and print what was written."""
    dtype = getattr(torch, args.dtype) if args.dtype else None
    converted = convert(args.checkpoint, args.out, args.model, args.ema, dtype, args.max_shard_size)
    epoch = f' of epoch {converted.epoch}' if converted.epoch else ''
    print(f'weights    {converted.name}, {converted.weights}{epoch}')
    print(f'model      {args.out}')
