"""The paper's claims on photographs: VT against timm's ResNet of the same trunk on CIFAR-10, and its ablations.

    python benchmarks/cifar10.py --data-dir CIFAR10 --work-dir runs

trains `test_vt_resnet` and the ResNet whose last stage it replaces by one recipe, on the same pictures in the same
order, and writes benchmarks/results/cifar10.md, .json and .png: Table 2 of the paper, and Tables 3 to 7 with
`--variants ablations`. CIFAR-10 are JPEG files (see benchmarks/cifar.py) of 32x32 pixels; the stem is a 3x3 convolution
of stride 1 without pooling, so that the VT modules see 8x8 pixels and the ResNet's last stage works on 4x4.

A run is recorded when it ends and goes on after its last epoch when it was killed; `--work-dir` keeps a log with a line
an epoch. An epoch takes about 2.7 minutes on one thread in bfloat16, 5 in float32.
"""
import argparse
import os
import platform
import statistics
from pathlib import Path
from typing import List

import timm
import torch
import torch.nn as nn
from cifar import crop_and_flip, fit, give_small_stem, load_cifar, normalise
from runs import read_runs, run_all
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import create_optimizer_v2
from training import accuracy
from versions import versions

from vt_zoo.analysis.count import count_multiply_adds
from vt_zoo.checkpoint import whole

RESULTS = Path(__file__).parent / 'results'
BATCH, LR, WEIGHT_DECAY = 128, 0.1, 5e-4
BASE, RESNET = 'VT', 'ResNet, same trunk'
ABLATIONS = {  # name: (table of the paper, options, the paper's points against its base model: R18, R34)
    'pooling tokenizer': ('3', {'tokenizer': 'pooling'}, (-1.4, -1.3)),
    'clustering tokenizer': ('3', {'tokenizer': 'clustering'}, (-0.5, 0.3)),
    'no recurrent tokenizer': ('4', {'recurrent': False}, (-0.6, -0.3)),
    'tokens not related': ('5', {'token_mixer': 'none'}, (-3.2, -1.4)),
    'graph convolution': ('5', {'token_mixer': 'graph'}, (-2.8, -1.2)),
    '32 tokens': ('6', {'num_tokens': 32}, (-0.3, 0.3)),
    'no projector': ('7', {'projector': False}, (-1.1, -0.7)),
}
PAPER_RESNET = (-2.1, -1.5)
GROUPS = {'models': [BASE, RESNET], 'ablations': [*ABLATIONS]}


def create(name: str) -> nn.Module:
    """A variant of `test_vt_resnet`, or the ResNet of the same trunk, for 32x32 pixels."""
    if name == RESNET:
        return give_small_stem(ResNet(BasicBlock, (1, 1, 1, 2), channels=(32, 48, 96, 128), num_classes=10))
    options = ABLATIONS[name][1] if name in ABLATIONS else {}
    return give_small_stem(timm.create_model('test_vt_resnet', num_classes=10, **options))


def train(name: str, seed: int, epochs: int, precision: str, data_dir: Path, work_dir: Path) -> dict:
    """Train a variant; its accuracies are those after the last epoch, on pictures as they are."""
    torch.set_num_threads(1)
    data = load_cifar(data_dir)
    (x, y), test = data['train'], data['test']
    torch.manual_seed(seed)
    model = create(name).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, 'sgd', lr=LR, weight_decay=WEIGHT_DECAY, momentum=0.9)
    state = work_dir / f'{name}_{seed}_{epochs}_{precision}.safetensors'.replace(' ', '_').replace(',', '')
    autocast = None if precision == 'float32' else getattr(torch, precision)
    history = fit(
        model, lambda i, g: normalise(crop_and_flip(x[i], g)), y, optimizer, epochs, BATCH, seed, state, autocast)
    result = {
        'variant': name, 'seed': seed, 'epochs': epochs, 'precision': precision, 'loss': [loss for loss, _ in history],
        'test': accuracy(model, normalise(test[0]), test[1], batch_size=500),
        'train': accuracy(model, normalise(x[::5]), y[::5], batch_size=500),
        'parameters': sum(p.numel() for p in model.parameters()),
        'multiply_adds': count_multiply_adds(model, (3, 32, 32)),
        'epoch_cpu_seconds': statistics.median(seconds for _, seconds in history)}
    state.unlink()
    return result


def report(runs: List[dict], environment: str) -> str:
    """The result as Markdown."""
    lines = [
        '# VT against ResNet on photographs', '',
        f'Command: `python benchmarks/cifar10.py --data-dir DIR`. {environment}', '',
        'CIFAR-10 as JPEG files of 32x32, which is not the official data: 50,000 training and 10,000 test pictures, '
        f'crops and flips, SGD with momentum, peak learning rate {LR}, one epoch of warm-up and a cosine, batch '
        f'{BATCH}, weight decay {WEIGHT_DECAY}. Both models have the trunk of `test_vt_resnet`, with a 3x3 stem of '
        'stride 1 and no pooling. Accuracy after the last epoch in percent, mean and standard deviation over seeds; '
        'training accuracy is that on every fifth training picture, as it is. CPU seconds are those of one thread.']
    for epochs, precision in sorted({(r['epochs'], r['precision']) for r in runs}):
        mine = [r for r in runs if (r['epochs'], r['precision']) == (epochs, precision)]
        base = statistics.mean([r['test'] for r in mine if r['variant'] == BASE] or [float('nan')])
        lines += [
            '', f'## {epochs} epochs, {precision}', '',
            '| variant | table | parameters, M | multiply-adds, M | test | each seed | training | against VT | the '
            "paper's R18, R34 against its VT | CPU s an epoch |", f'|{"---|" * 10}']
        for name in [BASE, RESNET, *ABLATIONS]:
            same = sorted((r for r in mine if r['variant'] == name), key=lambda r: r['seed'])
            if same:
                lines.append(_row(name, same, base))
    return '\n'.join([*lines, '', "The paper's points are those of its Tables 2 to 7 on ImageNet, unverified.", ''])


def _row(name: str, runs: List[dict], base: float) -> str:
    table, _, paper = ABLATIONS.get(name, ('2', {}, PAPER_RESNET if name == RESNET else ()))
    test, fitted = ([r[key] for r in runs] for key in ('test', 'train'))
    cells = (
        name, table, f'{runs[0]["parameters"] / 1e6:.2f}', f'{runs[0]["multiply_adds"] / 1e6:.1f}', _mean(test),
        ', '.join(f'{a:.2f}' for a in test), _mean(fitted),
        '' if name == BASE else f'{statistics.mean(test) - base:+.2f}', ', '.join(f'{p:+.1f}' for p in paper),
        f'{statistics.median(r["epoch_cpu_seconds"] for r in runs):.0f}')
    return f'| {" | ".join(cells)} |'


def _mean(values: List[float]) -> str:
    spread = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{spread}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True, help='folder of CIFAR-10 as JPEG files')
    parser.add_argument('--work-dir', type=Path, default=Path('cifar10_runs'), help='folder for unfinished runs, logs')
    parser.add_argument(
        '--variants', nargs='+', default=['models'], metavar='NAME',
        help=f'of {", ".join([*GROUPS, BASE, RESNET, *ABLATIONS])} (default: models)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--precision', default='bfloat16', choices=['float32', 'bfloat16'])
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, one thread each (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write')
    args = parser.parse_args()
    variants = [name for group in args.variants for name in GROUPS.get(group, [group])]
    unknown = {*variants} - {BASE, RESNET, *ABLATIONS}
    if unknown:
        parser.error(f'--variants must be of {", ".join([*GROUPS, BASE, RESNET, *ABLATIONS])}, got {min(unknown)!r}')
    load_cifar(args.data_dir)  # before processes do so at the same time
    args.work_dir.mkdir(parents=True, exist_ok=True)
    log = args.out / 'cifar10.json'
    runs = read_runs(log)
    done = {(r['variant'], r['seed'], r['epochs'], r['precision']) for r in runs}
    jobs = [
        (name, seed, args.epochs, args.precision, args.data_dir, args.work_dir)
        for seed in args.seeds for name in variants if (name, seed, args.epochs, args.precision) not in done]
    environment = f'{platform.machine()}, {os.cpu_count()} CPU cores, {versions()}.'
    for _ in run_all(train, jobs, runs, log, environment, args.jobs):
        with whole(args.out / 'cifar10.md') as new:
            new.write_text(report(runs, environment))
    print(report(runs, environment))


if __name__ == '__main__':
    main()
