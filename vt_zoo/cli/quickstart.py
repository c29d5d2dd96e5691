"""Train a small VT-ResNet on real handwriting and show what its tokens look at.

Writes the 1,797 scanned digits that come with scikit-learn as a folder of images, trains test_vt_resnet on three
quarters of them and measures it on the rest. Nothing is downloaded; it takes a minute or two on two CPU cores.
"""
import argparse
import importlib.util
import shutil
from pathlib import Path

import torch

from vt_zoo.analysis.figures import draw_token_attention
from vt_zoo.analysis.records import capture_tokens
from vt_zoo.classification.settings import FinetuneSettings
from vt_zoo.classification.train import FinetuneResult, finetune
from vt_zoo.data.digits import write_digits
from vt_zoo.data.images import load_image
from vt_zoo.errors import InputError
from vt_zoo.files import run_folder, whole
from vt_zoo.weights.loading import CLASSIFICATION, load

from .arguments import positive_int, whole_number
from .finetune import print_result

WRITTEN = ('data', 'model', 'history.csv', 'tokens.png', 'checkpoint.safetensors')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument('--out', default='vt_zoo_quickstart', metavar='DIR', help='path to the output folder')
    parser.add_argument('--epochs', type=positive_int, default=12, metavar='N', help='number of epochs to train')
    parser.add_argument(
        '--seed', type=whole_number, default=0, metavar='N', help='random seed of weights, order and augmentation')


def run(args: argparse.Namespace) -> None:
    """Write the digits, train, validate, reload, draw."""
    for package, extra in (('sklearn', 'digits'), ('matplotlib', 'figures')):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"the quickstart needs {package}: pip install 'vt_zoo[{extra}]'")
    with run_folder(Path(args.out)):
        _run(Path(args.out), args)


def _run(out: Path, args: argparse.Namespace) -> None:
    old = [name for name in WRITTEN if (out / name).exists()]
    if old and not _is_of_quickstart(out / 'data'):
        raise InputError(f'{out} holds {", ".join(old)} that is not of an earlier quickstart: choose another --out')
    if old:
        print(f'replacing  {", ".join(old)} of an earlier run in {out}')
    for name in old:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    with whole(out / 'data') as new:
        write_digits(new)
    settings = FinetuneSettings.read('digits', {'epochs': args.epochs, 'seed': args.seed})
    result = finetune(out / 'data', out, settings, device='cpu')
    draw_tokens(result, out / 'tokens.png')
    print_result(result)
    print(f'data       {out / "data"}')
    print(f'history    {out / "history.csv"}')
    print(f'picture    {out / "tokens.png"}')
    print(f'use        vt-zoo predict {result.val_samples[0][0]} --model {result.model_dir}')


def _is_of_quickstart(data: Path) -> bool:
    """Whether a folder holds what `write_digits` writes, and nothing else."""
    if not data.is_dir() or {p.name for p in data.iterdir()} != {'train', 'val'}:
        return False
    return all({p.name for p in split.iterdir()} == set('0123456789') for split in data.iterdir())


def draw_tokens(result: FinetuneResult, path: Path) -> None:
    """Draw where the tokens of the first module look on the first held-out image of six digits."""
    loaded = load(result.model_dir, CLASSIFICATION)
    first = {target: path for path, target in reversed(result.val_samples)}
    paths = [first[target] for target in sorted(first)][:6]
    batch = torch.stack([loaded.prepare(load_image(p)) for p in paths])
    attention = capture_tokens(loaded.model, batch)[0].attention
    draw_token_attention([loaded.shown(x) for x in batch], attention, [Path(p).parent.name for p in paths], path)
