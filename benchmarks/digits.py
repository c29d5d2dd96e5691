"""vt_resnet18 against timm's resnet18 on the handwritten digits: same data, recipe, budget and order of images.

    python benchmarks/digits.py

trains both models for three seeds with both optimizers of the paper and writes benchmarks/results/digits.md, .json and
.png. Images are 64x64, the split is that of `vt_zoo.data.digits`. A run that was interrupted goes on where it was.
"""
import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import timm
import torch
from harness import accuracy, train_epochs, versions
from matplotlib.figure import Figure
from PIL import Image
from timm.optim import create_optimizer_v2
from tqdm import tqdm

from vt_zoo.data.digits import write_digits
from vt_zoo.data.images import find_split, load_image
from vt_zoo.files import whole

RESULTS = Path(__file__).parent / 'results'
MODELS = ('resnet18', 'vt_resnet18')
# Section 5.1's SGD at its learning rate; section 5.2's RMSProp at its peak, 0.16 for 2048 images, scaled to this batch.
RECIPES = {
    'momentum': {'opt': 'momentum', 'lr': 0.1, 'weight_decay': 4e-5, 'momentum': 0.9},
    'rmsproptf': {'opt': 'rmsproptf', 'lr': 0.16 * 64 / 2048, 'weight_decay': 1e-5, 'momentum': 0.9, 'eps': 1e-3},
}
BATCH, SIZE = 64, 64


def load_digits() -> dict:
    """The digits as normalised tensors (N, 3, 64, 64) and classes (N,), by split."""
    tensors = {}
    with TemporaryDirectory() as folder:
        write_digits(folder)
        split = find_split(folder)
        for name, samples in (('train', split.train), ('val', split.val)):
            images = [load_image(path).convert('L').resize((SIZE, SIZE), Image.BILINEAR) for path, _ in samples]
            x = torch.from_numpy(np.stack([np.asarray(image) for image in images])[:, None]).float() / 255
            tensors[name] = (x, torch.tensor([target for _, target in samples]))
    mean, std = tensors['train'][0].mean(), tensors['train'][0].std()
    return {k: (((x - mean) / std).expand(-1, 3, -1, -1).contiguous(), y) for k, (x, y) in tensors.items()}


def train(name: str, recipe: str, seed: int, epochs: int, data: dict) -> dict:
    """Train one model and return its training losses and held-out accuracies, an entry an epoch."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=10)
    optimizer = create_optimizer_v2(model, **RECIPES[recipe])
    orders = (
        torch.randperm(len(data['train'][0]), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for epoch in tqdm(range(epochs), desc=f'{name} {recipe} seed {seed}', leave=False))
    losses, accuracies, start = [], [], time.monotonic()
    for loss in train_epochs(
            model, data['train'], optimizer, orders, epochs, BATCH, warmup_lr=RECIPES[recipe]['lr'] / 16):
        losses.append(loss)
        accuracies.append(accuracy(model, *data['val'], 64))
    return {'model': name, 'recipe': recipe, 'seed': seed, 'epochs': epochs, 'loss': losses, 'accuracy': accuracies,
            'seconds': time.monotonic() - start}


def report(runs: list, environment: str) -> str:
    """The result as Markdown."""
    epochs = runs[0]['epochs']
    lines = [
        '# vt_resnet18 and resnet18 on the handwritten digits', '',
        f'Command: `python benchmarks/digits.py`. {environment}.', '',
        f"scikit-learn's digits (1,347 training, 450 held-out scans) at {SIZE}x{SIZE}, batch {BATCH}, {epochs} epochs, "
        'one epoch of warm-up and a cosine, no augmentation, no clipping of gradients, same order of images for both '
        'models. Held-out accuracy of the last epoch in percent, mean and standard deviation over seeds; one image is '
        '0.22 points.', '',
        '| optimizer | model | accuracy | each seed | training loss, epochs 1, 2, last |', '|---|---|---|---|---|']
    for recipe, arguments in RECIPES.items():
        for name in MODELS:
            mine = [r for r in runs if r['recipe'] == recipe and r['model'] == name]
            last = [r['accuracy'][-1] for r in mine]
            loss = [statistics.mean(r['loss'][i] for r in mine) for i in (0, 1, -1)]
            cells = (
                f'{recipe}, lr {arguments["lr"]:g}', name,
                f'{statistics.mean(last):.2f} ± {statistics.stdev(last):.2f}',
                ', '.join(f'{a:.2f}' for a in last), f'{loss[0]:.2f}, {loss[1]:.2f}, {loss[2]:.4f}')
            lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join([*lines, '', '![Training loss and held-out accuracy by epoch](digits.png)', ''])


def draw(runs: list, path: Path) -> None:
    """Draw loss and accuracy by epoch, a line a run."""
    figure = Figure(figsize=(9, 6), layout='constrained')
    axes = figure.subplots(2, 2, sharex=True)
    for column, recipe in zip(axes.T, RECIPES):
        for run in (r for r in runs if r['recipe'] == recipe):
            style = {'color': {'resnet18': '#0072b2', 'vt_resnet18': '#d55e00'}[run['model']],
                     'linestyle': {'resnet18': '--', 'vt_resnet18': '-'}[run['model']],
                     'label': run['model'] if run['seed'] == 0 else None}
            epochs = range(1, run['epochs'] + 1)
            column[0].semilogy(epochs, run['loss'], **style)
            column[1].plot(epochs, run['accuracy'], **style)
        column[0].set(title=recipe, ylabel='training loss')
        column[1].set(xlabel='epoch', ylabel='held-out accuracy, %')
        column[0].legend()
    with whole(path) as new:
        figure.savefig(new, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--out', type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / 'digits.json'
    runs = json.loads(log.read_text())['runs'] if log.exists() else []
    runs = [r for r in runs if r['epochs'] == args.epochs and r['seed'] < args.seeds]
    environment = f'{platform.machine()}, {torch.get_num_threads()} CPU threads, {versions()}'
    data = load_digits()
    for seed in range(args.seeds):
        for recipe in RECIPES:
            for name in MODELS:
                if not any((r['model'], r['recipe'], r['seed']) == (name, recipe, seed) for r in runs):
                    runs.append(train(name, recipe, seed, args.epochs, data))
                    with whole(log) as new:
                        new.write_text(json.dumps({'environment': environment, 'runs': runs}, indent=1) + '\n')
    text = report(runs, environment)
    (args.out / 'digits.md').write_text(text)
    draw(runs, args.out / 'digits.png')
    print(text)


if __name__ == '__main__':
    main()
