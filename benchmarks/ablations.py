"""The paper's ablations and other forms of the VT module in small trainings.

    python benchmarks/ablations.py sums
    python benchmarks/ablations.py photographs --data-dir CIFAR10

`sums`: the sum of two handwritten digits among random strokes, by a small VT-ResNet with each ablation and by timm's
ResNet on the same trunk. `photographs`: CIFAR-10 as JPEG files (see benchmarks/cifar.py), by a model of three VT
modules with each ablation, and with changes of the modules that are no options.

Two seeds of the sums take about 45 minutes on two cores, a run of 6 epochs of 20,000 photographs 7 minutes in bfloat16.
All runs are in benchmarks/results/ablations.md and .json; what was interrupted goes on after the last complete run.
"""
import argparse
import math
import statistics
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, Dict, List, Tuple

import numpy as np
import timm
import torch
import torch.nn as nn
from cifar import fit_plain, give_small_stem, load_cifar, normalise, prepare_cifar
from harness import (
    accuracy,
    add_runs,
    at_least,
    environment,
    environments,
    mean_and_spread,
    run_all,
    table,
    train_epochs,
)
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import create_optimizer_v2

from vt_zoo.analysis.metrics import effective_rank
from vt_zoo.analysis.records import capture_tokens
from vt_zoo.data.digits import read_digits
from vt_zoo.files import whole
from vt_zoo.layers import VTModule

RESULTS = Path(__file__).parent / 'results'
BASE, RESNET = 'VT, base model', 'ResNet, same trunk'
VARIANTS = {  # name: (table of the paper, options, the paper's points against its base model: R18, R34)
    BASE: ('2', {}, ()),
    RESNET: ('2', {}, (-2.1, -1.5)),
    'pooling tokenizer': ('3', {'tokenizer': 'pooling'}, (-1.4, -1.3)),
    'clustering tokenizer': ('3', {'tokenizer': 'clustering'}, (-0.5, 0.3)),
    'no recurrent tokenizer': ('4', {'recurrent': False}, (-0.6, -0.3)),
    'tokens not related': ('5', {'token_mixer': 'none'}, (-3.2, -1.4)),
    'graph convolution': ('5', {'token_mixer': 'graph'}, (-2.8, -1.2)),
    '4 tokens': ('6', {'num_tokens': 4}, ()),
    '32 tokens': ('6', {'num_tokens': 32}, (-0.3, 0.3)),
    'no projector': ('7', {'projector': False}, (-1.1, -0.7)),
}
SIZE, DIGIT = 96, 28  # pixels a side of an image of the sums, and of a digit in it
HIGHEST = 7  # with 8 and 9, an hour is too short for any variant to learn the task
BATCH = 64

Data = Dict[str, Tuple[torch.Tensor, torch.Tensor]]
Trained = Tuple[nn.Module, List[float], Tuple[torch.Tensor, torch.Tensor]]  # model, loss by epoch, held-out images


class Competition(nn.Module):
    """Softmax over the tokens, then over the pixels by their sum: tokens compete for pixels, as in slot attention."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        shares = logits.softmax(1)
        return shares / shares.sum(-1, keepdim=True)


def compete(module: VTModule) -> None:
    module.tokenizer.softmax = Competition()


def project_from_one(module: VTModule) -> None:
    """The projection starts as large as the map that it is added to, and not at zero."""
    if module.projector is not None:
        nn.init.ones_(module.projector.value.norm.weight)


CHANGES = {'competition': compete, 'projection from one': project_from_one}


@lru_cache
def load_scans() -> Dict[str, Tuple[np.ndarray, np.ndarray]]:
    """The digits' scans in grey (N, 28, 28) and the digits (N,) by split, in the order of the digits."""
    scans, digits, parts = read_digits()
    resized = np.stack([
        np.asarray(Image.fromarray(scan).resize((DIGIT, DIGIT), Image.BILINEAR))
        for scan in (scans * (255 / 16)).round().astype(np.uint8)])
    orders = {part: sorted(numbers, key=lambda i: (digits[i], i)) for part, numbers in parts.items()}
    return {part: (resized[order], digits[order]) for part, order in orders.items()}


def strokes(rng: np.random.Generator) -> Image.Image:
    """Random curved strokes of a pen as thick and as blurred as the digits'."""
    small = Image.new('L', (SIZE // 3, SIZE // 3))
    draw = ImageDraw.Draw(small)
    for _ in range(6):
        x, y = rng.uniform(0, small.width, 2)
        angle = rng.uniform(0, 2 * math.pi)
        bend = rng.normal(0, 0.5)
        points = [(x, y)]
        for _ in range(rng.integers(3, 6)):
            angle += bend
            x, y = x + 1.5 * math.cos(angle), y + 1.5 * math.sin(angle)
            points.append((x, y))
        draw.line(points, fill=int(rng.integers(120, 256)), width=1)
    return small.resize((SIZE, SIZE), Image.BILINEAR)


def compose(part: str, number: int, seed: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, 96, 96) of two scans of a split, normalised, and their sums (N,)."""
    rng = np.random.default_rng(seed)
    scans, of = load_scans()[part]
    by_digit = [scans[of == digit] for digit in range(HIGHEST + 1)]
    images = np.empty((number, SIZE, SIZE), np.uint8)
    digits = rng.integers(HIGHEST + 1, size=(number, 2))
    for image, pair in zip(images, digits):
        places = np.zeros((2, 2))
        while np.hypot(*(places[0] - places[1])) < SIZE / 2:
            places = rng.integers(0, SIZE - DIGIT, (2, 2))
        image[:] = np.asarray(strokes(rng))
        for digit, (x, y) in zip(pair, places):
            image[y:y + DIGIT, x:x + DIGIT] = by_digit[digit][rng.integers(len(by_digit[digit]))]
    x = torch.from_numpy(images)[:, None].float() / 255
    return (x - 0.1) / 0.2, torch.from_numpy(digits.sum(1))


@lru_cache
def load_sums() -> Data:
    """Images and sums by split."""
    return {'train': compose('train', 12000, seed=0), 'val': compose('val', 2000, seed=1)}


def train_on_sums(run: dict, data_dir: Path) -> Trained:
    data = load_sums()
    torch.manual_seed(run['seed'])
    trunk = {
        'block': BasicBlock, 'layers': (1, 1, 1, 2), 'stem_type': 'deep', 'stem_width': 8, 'in_chans': 1,
        'num_classes': 2 * HIGHEST + 1}
    if run['variant'] == RESNET:
        model = ResNet(channels=(16, 32, 64, 128), **trunk)
    else:
        model = timm.create_model(
            'test_vt_resnet', channels=(16, 32, 64), feature_dim=128, token_dim=128, **trunk,
            **VARIANTS[run['variant']][1])
    model = model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, 'adamw', lr=2e-3, weight_decay=0.05)
    generator = torch.Generator().manual_seed(run['seed'])
    orders = (torch.randperm(len(data['train'][1]), generator=generator) for _ in range(run['epochs']))
    losses = train_epochs(model, data['train'], optimizer, orders, run['epochs'], BATCH, warmup_lr=2e-5)
    return model, list(losses), data['val']


def train_on_photographs(run: dict, data_dir: Path) -> Trained:
    data = load_cifar(data_dir)
    (x, y), (x_test, y_test) = data['train'], data['test']
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(123))[:run['pictures']]
    x, y = x[chosen], y[chosen]
    torch.manual_seed(run['seed'])
    options = VARIANTS[run['variant']][1] if run['variant'] in VARIANTS else {}
    model = timm.create_model('test_vt_resnet', num_classes=10, layers=(1, 1, 1, 3), **options)
    model = give_small_stem(model).to(memory_format=torch.channels_last)
    if run['variant'] in CHANGES:
        for module in model.vt_stage:
            CHANGES[run['variant']](module)
    with TemporaryDirectory() as folder:
        state = Path(folder) / 'state.safetensors'
        history = fit_plain(model, x, y, run['epochs'], run['seed'], state, run['precision'])
    return model, [loss for loss, _ in history], (normalise(x_test), y_test)


TASKS = {  # name: (training, variants, epochs)
    'sums': (train_on_sums, [*VARIANTS], 7),
    'photographs': (train_on_photographs, [name for name in (*VARIANTS, *CHANGES) if name != RESNET], 6),
}


def ranks(model: nn.Module, x: torch.Tensor) -> List[float]:
    """Effective rank of the tokens of each module, the mean over images."""
    if not hasattr(model, 'vt_stage'):
        return []
    return [effective_rank(record.tokens).mean().item() for record in capture_tokens(model, x)]


def train(run: dict, data_dir: Path) -> dict:
    """Train a variant; its test accuracy is that after the last epoch.

    Args:
        run: `task`, `variant`, `seed` and `epochs`, of photographs `pictures` and `precision` too.
        data_dir: Folder of CIFAR-10.
    """
    torch.set_num_threads(1)
    model, losses, (x, y) = TASKS[run['task']][0](run, data_dir)
    return {
        'loss': losses, 'test': accuracy(model, x, y, 250), 'ranks': ranks(model, x[:256]),
        'parameters': sum(p.numel() for p in model.parameters())}


def _schedule(run: dict) -> str:
    pictures = f' of {run["pictures"]} pictures, {run["precision"]}' if 'pictures' in run else ''
    return f'{run["task"].capitalize()}, {run["epochs"]} epochs{pictures}'


def report(runs: List[dict]) -> str:
    """The result as Markdown."""
    columns = {
        'loss of the last epoch': lambda runs: ', '.join(f'{r["loss"][-1]:.3f}' for r in runs),
        'ranks of the tokens': lambda runs: ', '.join(
            f'{statistics.mean(of_module):.1f}' for of_module in zip(*(r['ranks'] for r in runs)))}
    return '\n'.join([
        '# The VT module in small trainings', '',
        'Command: `python benchmarks/ablations.py TASK`, with `--data-dir DIR` for photographs. '
        f'{environments(runs)}', '',
        'Accuracy on held-out images after the last epoch in percent, mean and standard deviation over seeds, and each '
        "seed; loss, each seed; effective rank of each module's tokens after training; points against the base model, "
        "and the paper's for ResNet-18 and 34 on ImageNet against its own.", '',
        f'*Sums*: 96x96 images of two scans of digits, 0 to {HIGHEST}, at least 48 pixels apart among random strokes; '
        '12,000 training and 2,000 held-out images of different scans. *Photographs*: CIFAR-10 as JPEG files, which is '
        "not the official data; rows of 0.1's module are of benchmarks/design.py at commit d7dbd5c, before the module "
        'changed.',
        '', '![Images of the sums](ablations.png)', *tables(runs, _schedule, BASE, columns), ''])


def in_paper(run: dict) -> Tuple[str, Tuple[float, ...]]:
    """Table of the paper that has the variant, and its points against the paper's base model."""
    number, _, points = VARIANTS.get(run['variant'], ('', {}, ()))
    return number, points


def tables(
        runs: List[dict], schedule: Callable[[dict], str], base: str, columns: Dict[str, Callable[[List[dict]], str]],
        paper: Callable[[dict], Tuple[str, Tuple[float, ...]]] = in_paper,
) -> List[str]:
    """Lines of a table for each schedule, with a row a variant.

    Args:
        runs: Runs of all schedules.
        schedule: Says what a run has in common with others that it is compared with.
        base: Name of the base model.
        columns: What to tell of a variant's runs, by the heads of the columns.
        paper: Gives the table of the paper that a run belongs to, and the paper's points.
    """
    columns = {
        'parameters, M': lambda runs: f'{runs[0]["parameters"] / 1e6:.2f}',
        'accuracy': lambda runs: mean_and_spread([r['test'] for r in runs]),
        'each seed': lambda runs: ', '.join(f'{r["test"]:.2f}' for r in runs), **columns}
    heads = ['variant', *columns, 'against the base model', "the paper's table", 'its points']
    lines = []
    for title in dict.fromkeys(map(schedule, runs)):
        by_name = {}
        for run in sorted((r for r in runs if schedule(r) == title), key=lambda r: r['seed']):
            by_name.setdefault(run['variant'], []).append(run)
        means = {name: statistics.mean(r['test'] for r in same) for name, same in by_name.items()}
        rows = []
        for name in sorted(by_name, key=[base, *VARIANTS, *by_name].index):
            number, points = paper(by_name[name][0])
            against = f'{means[name] - means[base]:+.2f}' if base in means and name != base else ''
            rows.append((
                name, *(cell(by_name[name]) for cell in columns.values()), against, number,
                ', '.join(f'{p:+.1f}' for p in points)))
        lines += ['', f'## {title}', *table(heads, rows)]
    return lines


def draw_sums(path: Path) -> None:
    """Draw images of the sums."""
    figure = Figure(figsize=(10, 1.6), layout='constrained')
    for ax, image, label in zip(figure.subplots(1, 7), *compose('val', 7, seed=1)):
        ax.imshow(image[0], cmap='gray')
        ax.set_title(label.item(), fontsize=10)
        ax.axis('off')
    with whole(path) as new:
        figure.savefig(new, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=[*TASKS])
    parser.add_argument('--data-dir', type=Path, help='folder of CIFAR-10 as JPEG files, for photographs')
    parser.add_argument('--variants', nargs='+', metavar='NAME', help='(default: all of the task)')
    parser.add_argument('--epochs', type=at_least(1), help='(default: 7 of sums, 6 of photographs)')
    parser.add_argument('--pictures', type=int, default=20000, help='training photographs (default: %(default)s)')
    parser.add_argument('--precision', default='bfloat16', choices=['float32', 'bfloat16'], help='of photographs')
    add_runs(parser, [0, 1])
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write')
    args = parser.parse_args()
    _, variants, epochs = TASKS[args.task]
    unknown = {*(args.variants or [])} - {*variants}
    if unknown:
        parser.error(f'--variants must be of {"; ".join(variants)}, got {min(unknown)!r}')
    schedule = {'task': args.task, 'epochs': args.epochs or epochs}
    if args.task == 'photographs':
        if args.data_dir is None:
            parser.error('photographs need --data-dir')
        prepare_cifar(parser, args.data_dir)
        schedule.update(pictures=args.pictures, precision=args.precision)
    if args.task == 'sums':
        draw_sums(args.out / 'ablations.png')
    log = args.out / 'ablations.json'
    jobs = [
        ({**schedule, 'variant': variant, 'seed': seed}, args.data_dir)
        for seed in args.seeds for variant in args.variants or variants]
    print(report(run_all(train, jobs, log, environment(), args.jobs, report)))


if __name__ == '__main__':
    main()
