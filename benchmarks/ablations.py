"""The paper's ablations on a task made of real digits: the sum of two handwritten digits that stand far apart.

    python benchmarks/ablations.py

trains every variant and timm's ResNet on the same trunk by one recipe, three seeds each, and writes
benchmarks/results/ablations.md, .json and .png. Each image shows two scans from scikit-learn's digits at least half an
image apart among random strokes; the label is their sum. Training images are composed of the scans of the training
split of `vt_zoo.data.digits`, test images of its held-out scans. Two runs at a time, one thread each, take less than an
hour on two cores; an interrupted benchmark goes on after the last complete run.
"""
import argparse
import math
import statistics
import time
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Dict, List, Tuple

import numpy as np
import timm
import torch
from harness import accuracy, environment, mean_and_spread, read_runs, run_all, train_epochs
from PIL import Image, ImageDraw
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import create_optimizer_v2

from vt_zoo.data.digits import write_digits
from vt_zoo.data.images import find_split, load_image
from vt_zoo.files import whole

RESULTS = Path(__file__).parent / 'results'
SIZE, DIGIT = 96, 28  # pixels a side of an image and of a digit in it
DIGITS = 8  # 0 to 7: with all ten, an hour is too short for any variant to learn the task
TRAIN_IMAGES, TEST_IMAGES = 12000, 2000
EPOCHS, BATCH, LR, WEIGHT_DECAY = 7, 64, 2e-3, 0.05
JOBS = 2
TRUNK = {
    'block': BasicBlock, 'layers': (1, 1, 1, 2), 'stem_type': 'deep', 'stem_width': 8, 'in_chans': 1,
    'num_classes': 2 * DIGITS - 1}
VT = {'channels': (16, 32, 64), 'feature_dim': 128, 'token_dim': 128}
VARIANTS = {  # name: (table of the paper, options, the paper's points against its base model: R18, R34)
    'VT, base model': ('2', {}, None),
    'pooling tokenizer': ('3', {'tokenizer': 'pooling'}, (-1.4, -1.3)),
    'clustering tokenizer': ('3', {'tokenizer': 'clustering'}, (-0.5, 0.3)),
    'no recurrent tokenizer': ('4', {'recurrent': False}, (-0.6, -0.3)),
    'tokens not related': ('5', {'token_mixer': 'none'}, (-3.2, -1.4)),
    'graph convolution': ('5', {'token_mixer': 'graph'}, (-2.8, -1.2)),
    '4 tokens': ('6', {'num_tokens': 4}, None),
    '32 tokens': ('6', {'num_tokens': 32}, (-0.3, 0.3)),
    'no projector': ('7', {'projector': False}, (-1.1, -0.7)),
}
BASE, BASELINE = next(iter(VARIANTS)), 'ResNet, same trunk'
PAPER = {**{name: points for name, (_, _, points) in VARIANTS.items()}, BASELINE: (-2.1, -1.5)}


def create(name: str) -> torch.nn.Module:
    """A variant by its name, or the ResNet whose last stage is as wide as the VT modules' map."""
    if name == BASELINE:
        return ResNet(channels=(*VT['channels'], VT['feature_dim']), **TRUNK)
    return timm.create_model('test_vt_resnet', **TRUNK, **VT, **VARIANTS[name][1])


def _strokes(rng: np.random.Generator) -> Image.Image:
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


def compose(scans: List[List[Image.Image]], number: int, seed: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Compose images.

    Args:
        scans: Scans of each digit.
        number: Images.
        seed: Of everything random.

    Returns:
        Images (N, 1, 96, 96), normalised, and labels (N,), the sum of both digits.
    """
    rng = np.random.default_rng(seed)
    images = np.empty((number, SIZE, SIZE), np.uint8)
    digits = rng.integers(DIGITS, size=(number, 2))
    for image, pair in zip(images, digits):
        places = np.zeros((2, 2))
        while np.hypot(*(places[0] - places[1])) < SIZE / 2:
            places = rng.integers(0, SIZE - DIGIT, (2, 2))
        image[:] = np.asarray(_strokes(rng))
        for digit, (x, y) in zip(pair, places):
            image[y:y + DIGIT, x:x + DIGIT] = np.asarray(scans[digit][rng.integers(len(scans[digit]))])
    x = torch.from_numpy(images)[:, None].float() / 255
    return (x - 0.1) / 0.2, torch.from_numpy(digits.sum(1))


def _load_scans() -> Dict[str, List[List[Image.Image]]]:
    """The digits' scans by split and digit, at the size in which they are pasted."""
    with TemporaryDirectory() as folder:
        write_digits(folder)
        split = find_split(folder)
        return {
            name: [[load_image(p).convert('L').resize((DIGIT, DIGIT), Image.BILINEAR) for p, t in samples if t == digit]
                   for digit in range(DIGITS)]
            for name, samples in (('train', split.train), ('test', split.val))}


@lru_cache
def load_data() -> Dict[str, Tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels of the training and the test split."""
    scans = _load_scans()
    return {
        'train': compose(scans['train'], TRAIN_IMAGES, seed=0),
        'test': compose(scans['test'], TEST_IMAGES, seed=1),
    }


def train(name: str, seed: int, epochs: int) -> dict:
    """Train a variant; its test accuracy is that after the last epoch."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = load_data()
    model = create(name).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, 'adamw', lr=LR, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(TRAIN_IMAGES, generator=generator) for _ in range(epochs))
    start = time.monotonic()
    losses = list(train_epochs(model, data['train'], optimizer, orders, epochs, BATCH, warmup_lr=LR / 100))
    return {
        'variant': name, 'seed': seed, 'epochs': epochs, 'loss': losses, 'test': accuracy(model, *data['test'], 256),
        'train': accuracy(model, *(t[:2000] for t in data['train']), 256),
        'parameters': sum(p.numel() for p in model.parameters()), 'seconds': time.monotonic() - start}


def report(runs: List[dict], environment: str) -> str:
    """The result as Markdown."""
    seeds, epochs = len({r['seed'] for r in runs}), runs[0]['epochs']
    minutes = sum(r['seconds'] for r in runs) / 60 / JOBS
    lines = [
        "# The paper's ablations on sums of two digits", '',
        f'Command: `python benchmarks/ablations.py --seeds {seeds}`. {environment} {len(runs)} runs, {JOBS} at a time, '
        f'about {minutes:.0f} minutes.', '',
        f"Each {SIZE}x{SIZE} image shows two of scikit-learn's scanned digits, 0 to {DIGITS - 1}, at least {SIZE // 2} "
        f'pixels apart among random strokes; the label is their sum. {TRAIN_IMAGES} training and {TEST_IMAGES} test '
        f'images of different scans, {epochs} epochs of AdamW (peak lr {LR}, cosine, batch {BATCH}), the same for all. '
        f'Accuracy after the last epoch in percent, mean and standard deviation over {seeds} seeds; always guessing '
        f'{DIGITS - 1} gives {100 / DIGITS:.1f}. Models '
        'are small (test_vt_resnet with a narrower trunk), so this says nothing of ImageNet.', '',
        '| variant | table | parameters, M | test accuracy | each seed | training accuracy | against the base model | '
        "the paper's R18, R34 against its own |", f'|{"---|" * 8}']
    by_variant = _by_variant(runs)
    base = statistics.mean(r['test'] for r in by_variant[BASE])
    otherwise = []
    for name, mine in by_variant.items():
        test, fitted = ([r[k] for r in mine] for k in ('test', 'train'))
        points = statistics.mean(test) - base
        paper = PAPER[name]
        if paper and all(p * points < 0 for p in paper):
            otherwise.append(name)
        cells = (
            name, VARIANTS[name][0] if name in VARIANTS else '2', f'{mine[0]["parameters"] / 1e6:.2f}',
            mean_and_spread(test, 1), ', '.join(f'{a:.1f}' for a in test), mean_and_spread(fitted, 1),
            '' if name == BASE else f'{points:+.1f}',
            ', '.join(f'{p:+.1f}' for p in paper) if paper else '')
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join([
        *lines, '', "The paper's points are those of its Tables 2 to 7 on ImageNet, unverified. Here the sign is not "
        f'that of both of its models for: {", ".join(otherwise) or "none"}.', '',
        '![Test accuracy of each variant](ablations.png)', ''])


def _by_variant(runs: List[dict]) -> Dict[str, List[dict]]:
    runs = sorted(runs, key=lambda r: r['seed'])
    return {name: [r for r in runs if r['variant'] == name] for name in (*VARIANTS, BASELINE)}


def draw(runs: List[dict], images: torch.Tensor, path: Path) -> None:
    """Draw the accuracy of each variant, a point a seed, and a few of the images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout='constrained')
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    ax = left.subplots()
    for row, (name, mine) in enumerate(_by_variant(runs).items()):
        values = [r['test'] for r in mine]
        colour = '#0072b2' if name == BASELINE else '#d55e00'
        ax.barh(row, statistics.mean(values), color=colour, alpha=0.35)
        ax.plot(values, [row] * len(values), 'o', color=colour, markersize=4)
    ax.set_yticks(range(len(VARIANTS) + 1), [*VARIANTS, BASELINE])
    ax.invert_yaxis()
    ax.set_xlabel('test accuracy, %: mean and each seed')
    for ax, image in zip(right.subplots(3, 3).flat, images):
        ax.imshow(image[0], cmap='gray')
        ax.set(xticks=[], yticks=[])
    right.suptitle('test images', fontsize=10)
    with whole(path) as new:
        figure.savefig(new, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--epochs', type=int, default=EPOCHS)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write')
    args = parser.parse_args()
    log = args.out / 'ablations.json'
    runs = [r for r in read_runs(log) if r['epochs'] == args.epochs and r['seed'] < args.seeds]
    machine = environment()
    missing = [
        (name, seed, args.epochs) for seed in range(args.seeds) for name in (*VARIANTS, BASELINE)
        if not any((r['variant'], r['seed']) == (name, seed) for r in runs)]
    run_all(train, missing, runs, log, machine, JOBS)
    text = report(runs, machine)
    with whole(args.out / 'ablations.md') as new:
        new.write_text(text)
    draw(runs, load_data()['test'][0], args.out / 'ablations.png')
    print(text)


if __name__ == '__main__':
    main()
