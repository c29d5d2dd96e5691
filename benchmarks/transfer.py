"""Whether the trunk of a pretrained ResNet helps a VT-ResNet: test_vt_resnet on five digits that the trunk never saw.

    python benchmarks/transfer.py

trains a small ResNet of timm on the digits 0 to 4, writes its weights as those of timm's ResNets on the hub are
written, takes its trunk into test_vt_resnet as the `trunk_*` tags do, and trains that on a few images of each of the
digits 5 to 9, against test_vt_resnet that begins new: same images, order, steps and learning rate. It writes
benchmarks/results/transfer.md, .json and .png and goes on where it was interrupted; about 9 minutes on one CPU core.
"""
import json
import platform
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Dict, Iterator, List, Optional, Tuple

import timm
import torch
from digits import SIZE, load_digits
from harness import accuracy, train_epochs, versions
from matplotlib.figure import Figure
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from tqdm import tqdm

import vt_zoo  # noqa: F401  registers the models
from vt_zoo.files import whole

RESULTS = Path(__file__).parent / 'results'
IMAGES = (5, 10, 50)  # of each class
RATES = (0.01, 0.05)
SEEDS, STEPS, BATCH = 3, 150, 25
PRETRAINING = {'epochs': 15, 'batch': 32, 'lr': 0.05}
RESNET = {'layers': (1, 1, 1, 1), 'channels': (32, 48, 96, 128)}  # the trunk of test_vt_resnet
SOURCE, TARGET = range(5), range(5, 10)

Data = Tuple[torch.Tensor, torch.Tensor]


def of_classes(data: Data, classes: range, images: Optional[int] = None, seed: int = 0) -> Data:
    """The images of some digits, which become classes 0 to 4.

    Args:
        data: Images (N, 3, H, W) and digits (N,).
        classes: Digits to keep.
        images: So many of each digit, drawn at random; all where None.
        seed: Of the draw.
    """
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for digit in classes:
        places = (y == digit).nonzero().flatten()
        kept.append(places[torch.randperm(len(places), generator=generator)][:images])
    indices = torch.cat(kept)
    return x[indices], y[indices] - classes[0]


def train(model: torch.nn.Module, data: Data, epochs: int, batch: int, lr: float, seed: int) -> float:
    """Train by the SGD of the paper's section 5.1 and return the mean loss of the last epoch."""
    optimizer = create_optimizer_v2(model, 'momentum', lr=lr, weight_decay=4e-5, momentum=0.9)
    orders = _orders(len(data[0]), epochs, seed)
    return list(train_epochs(model, data, optimizer, orders, epochs, batch, warmup_lr=lr / 16))[-1]


def _orders(images: int, epochs: int, seed: int) -> Iterator[torch.Tensor]:
    for epoch in range(epochs):
        yield torch.randperm(images, generator=torch.Generator().manual_seed(1000 * seed + epoch))


def pretrain(data: Dict[str, Data], seed: int, path: Path) -> float:
    """Train a ResNet on the digits 0 to 4, write its weights and return its held-out accuracy in percent."""
    torch.manual_seed(seed)
    resnet = timm.create_model('resnet18', num_classes=5, **RESNET)
    train(resnet, of_classes(data['train'], SOURCE), **PRETRAINING, seed=seed)
    save_file(resnet.state_dict(), path)
    return accuracy(resnet, *of_classes(data['val'], SOURCE), 64)


def transfer(data: Dict[str, Data], trunk: Optional[Path], images: int, lr: float, seed: int) -> dict:
    """Train test_vt_resnet on the digits 5 to 9, from a trunk or new, and measure it on the held-out ones."""
    torch.manual_seed(seed)
    start = {'pretrained': True, 'pretrained_cfg_overlay': {'file': str(trunk)}} if trunk else {}
    model = timm.create_model('test_vt_resnet.untrained', num_classes=5, **start)
    few = of_classes(data['train'], TARGET, images, seed)
    begin = time.monotonic()
    loss = train(model, few, STEPS * BATCH // len(few[0]), BATCH, lr, seed)
    return {'start': 'trunk' if trunk else 'new', 'images': images, 'lr': lr, 'seed': seed, 'loss': loss,
            'accuracy': accuracy(model, *of_classes(data['val'], TARGET), 64), 'seconds': time.monotonic() - begin}


def select(runs: List[dict], start: str, images: int, lr: float) -> List[float]:
    """Accuracies, a seed each."""
    return [r['accuracy'] for r in runs if (r['start'], r['images'], r['lr']) == (start, images, lr)]


def report(result: dict) -> str:
    """The result as Markdown."""
    runs = result['runs']
    pretrained = ', '.join(f'{a:.2f}' for a in result['pretrained'])
    lines = [
        '# A pretrained trunk against a new one', '',
        f'Command: `python benchmarks/transfer.py`. {result["environment"]}; '
        f'{sum(r["seconds"] for r in runs) / 60:.0f} minutes of fine-tuning on a shared machine.', '',
        "A ResNet of timm with the trunk of test_vt_resnet was trained on scikit-learn's handwritten digits 0 to 4 at "
        f'{SIZE}x{SIZE} (held-out accuracy {pretrained} % for the three seeds). Its trunk went into test_vt_resnet, '
        f'whose VT stage and classifier were new, and that was trained for {STEPS} steps of {BATCH} images on some '
        'images of each of the digits 5 to 9: SGD with momentum 0.9, a cosine, no augmentation. Beside it the same '
        'model, begun new, on the same images in the same order. Accuracy on the '
        f'{result["held_out"]} held-out images of these digits in percent, mean and standard deviation over {SEEDS} '
        'seeds, each with images, weights and pretraining of its own.', '',
        '| images of a class | learning rate | trunk, new stage | all new | difference | of each seed |',
        '|---' * 6 + '|']
    all_gains = []
    for images in IMAGES:
        for lr in RATES:
            trunk, new = select(runs, 'trunk', images, lr), select(runs, 'new', images, lr)
            gains = [t - n for t, n in zip(trunk, new)]
            all_gains += gains
            lines.append(
                f'| {images} | {lr:g} | {_spread(trunk)} | {_spread(new)} | {statistics.mean(gains):+.1f} | '
                f'{", ".join(f"{g:+.1f}" for g in gains)} |')
    helped = sum(g > 0 for g in all_gains)
    return '\n'.join([
        *lines, '', f'The trunk was better in {helped} of {len(all_gains)} pairs of runs.', '',
        '![Held-out accuracy by the number of training images](transfer.png)', ''])


def _spread(values: List[float]) -> str:
    return f'{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}'


def draw(runs: List[dict], path: Path) -> None:
    """Draw accuracy by the number of images: lines through the means, a dot a seed."""
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    for ax, lr in zip(figure.subplots(1, len(RATES), sharey=True), RATES):
        for start, color, label in (('trunk', '#d55e00', 'pretrained trunk'), ('new', '#0072b2', 'all new')):
            accuracies = [select(runs, start, images, lr) for images in IMAGES]
            ax.plot(IMAGES, [statistics.mean(a) for a in accuracies], color=color, label=label)
            ax.plot(IMAGES, accuracies, 'o', color=color, alpha=0.5, markersize=4)
        ax.set(title=f'learning rate {lr:g}', xlabel='training images of a class', xscale='log')
        ax.set_xticks(IMAGES, IMAGES)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel('held-out accuracy, %')
    figure.axes[0].legend(loc='lower right')
    with whole(path) as new:
        figure.savefig(new, dpi=110)


def main() -> None:
    log = RESULTS / 'transfer.json'
    result = json.loads(log.read_text()) if log.exists() else {'pretrained': [], 'runs': []}
    data = load_digits()
    result['environment'] = f'{platform.machine()}, {torch.get_num_threads()} CPU threads, {versions()}'
    result['held_out'] = len(of_classes(data['val'], TARGET)[0])
    done = {(r['start'], r['images'], r['lr'], r['seed']) for r in result['runs']}
    with TemporaryDirectory() as folder:
        for seed in range(SEEDS):
            jobs = [(start, images, lr, seed) for images in IMAGES for lr in RATES for start in ('trunk', 'new')]
            jobs = [job for job in jobs if job not in done]
            if not jobs:
                continue
            path = Path(folder) / f'{seed}.safetensors'
            result['pretrained'][seed:] = [pretrain(data, seed, path)]
            for start, images, lr, _ in tqdm(jobs, desc=f'seed {seed}'):
                result['runs'].append(transfer(data, path if start == 'trunk' else None, images, lr, seed))
                with whole(log) as new:
                    new.write_text(json.dumps(result, indent=1) + '\n')
    text = report(result)
    with whole(RESULTS / 'transfer.md') as new:
        new.write_text(text)
    draw(result['runs'], RESULTS / 'transfer.png')
    print(text)


if __name__ == '__main__':
    main()
