"""Trains the weights `test_vt_resnet.cifar10` that ship with the package.

    python benchmarks/cifar10_weights.py --data-dir CIFAR10 --work-dir runs

is `vt-zoo finetune` twice, from random weights on pictures enlarged to 96x96 and from there on 128x128: with seed 0 for
the file vt_zoo/weights/test_vt_resnet.cifar10.safetensors and with seed 1 to show how much hangs on the seed. Recipe,
seed and last epoch were decided beforehand, the test pictures decide nothing. CIFAR-10 are JPEG files (see
benchmarks/cifar.py). It writes benchmarks/results/cifar10_weights.md and .json, where the accuracy of the file is
counted anew each time, and goes on where it was interrupted. A seed takes about 90 minutes on one CPU core.
"""
import argparse
import json
import shutil
from pathlib import Path
from typing import List

import timm
import torch
from cifar import CLASSES
from harness import environment, read_runs, run_all
from timm.data import create_loader, resolve_data_config

from vt_zoo.classification.settings import FinetuneSettings
from vt_zoo.classification.train import evaluate, finetune
from vt_zoo.data.images import ImageFolder, find_split
from vt_zoo.files import whole

RESULTS = Path(__file__).parent / 'results'
WEIGHTS = Path(__file__).parents[1] / 'vt_zoo' / 'weights' / 'test_vt_resnet.cifar10.safetensors'
COMMON = dict(
    batch_size=128, weight_decay=5e-4, warmup_epochs=1, smoothing=0., scale=(0.6, 1.0), color_jitter=0.,
    precision='bfloat16')
STEPS = {
    96: FinetuneSettings(model='test_vt_resnet.untrained', img_size=96, epochs=20, lr=0.1, **COMMON),
    128: FinetuneSettings(img_size=128, epochs=8, lr=0.03, **COMMON),  # from the model of the step before
}


def link_parts(data_dir: Path, folder: Path) -> Path:
    """A folder with the test pictures as `val`, on which a run is measured.

    Raises:
        SystemExit: `data_dir` does not hold CIFAR-10.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (('train', 'train'), ('val', 'test')):
        if not (data_dir / part / CLASSES[0]).is_dir():
            raise SystemExit(f'--data-dir must hold {part}/{CLASSES[0]}, ..., got {data_dir}')
        if not (folder / name).exists():
            (folder / name).symlink_to((data_dir / part).absolute())
    return folder


def train(seed: int, data: Path, work_dir: Path) -> dict:
    """Train through all steps on one thread, and keep the file where the seed is 0."""
    torch.set_num_threads(1)
    start = None
    for size, settings in STEPS.items():
        out = work_dir / f'seed_{seed}_{size}'
        changed = {**vars(settings), 'seed': seed, **({'model': str(start)} if start else {})}
        start = out / 'model'
        if not start.exists():
            finetune(data, out, FinetuneSettings(**changed), resume=True, device='cpu')
    if seed == 0:
        with whole(WEIGHTS) as new:
            shutil.copy(start / 'model.safetensors', new)
    training = json.loads((start / 'config.json').read_text())['training']
    return {'seed': seed, 'correct': training['val_correct'], 'total': training['val_images']}


def count(data: Path) -> int:
    """How many of the test pictures the shipped file finds right."""
    size = (3, *2 * [max(STEPS)])
    model = timm.create_model(
        'test_vt_resnet.untrained', pretrained=True, num_classes=len(CLASSES),
        pretrained_cfg_overlay={'file': str(WEIGHTS), 'num_classes': len(CLASSES), 'input_size': size})
    config = resolve_data_config({}, model=model)
    loader = create_loader(
        ImageFolder(find_split(data).val), config['input_size'], 100, interpolation=config['interpolation'],
        mean=config['mean'], std=config['std'], crop_pct=config['crop_pct'], num_workers=0, device=torch.device('cpu'),
        persistent_workers=False)
    metrics, predictions = evaluate(model, loader, torch.device('cpu'))
    return round(metrics['top1'] * len(predictions) / 100)


def report(data: Path, runs: List[dict], environment: str) -> str:
    """The result as Markdown."""
    first, second = STEPS.values()
    lines = [
        '# The weights test_vt_resnet.cifar10', '',
        f'Command: `python benchmarks/cifar10_weights.py --data-dir DIR`. {environment}', '',
        'CIFAR-10 as JPEG files, which is not the official data: 50,000 training and 10,000 test pictures of 32x32. '
        f'`vt-zoo finetune` from random weights for {first.epochs} epochs at {first.img_size}x{first.img_size} with a '
        f'peak learning rate of {first.lr}, then for {second.epochs} at {second.img_size}x{second.img_size} with '
        f'{second.lr}; all settings are in the script. Accuracy after the last epoch; the file is seed 0\'s.', '',
        '| seed | right of the 10,000 test pictures | accuracy |', '|---|---|---|']
    for r in sorted(runs, key=lambda r: r['seed']):
        lines.append(f'| {r["seed"]} | {r["correct"]} | {100 * r["correct"] / r["total"]:.2f} % |')
    if WEIGHTS.exists():
        lines += ['', f'Counted again from the file as it ships: {count(data)} right.']
    return '\n'.join([*lines, ''])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True, help='folder of CIFAR-10 as JPEG files')
    parser.add_argument('--work-dir', type=Path, default=Path('cifar10_weights'), help='folder for unfinished runs')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, one thread each (default: %(default)s)')
    args = parser.parse_args()
    data = link_parts(args.data_dir, args.work_dir / 'data')
    log = RESULTS / 'cifar10_weights.json'
    runs = read_runs(log)
    done = {r['seed'] for r in runs}
    machine = environment()
    jobs = [(seed, data, args.work_dir) for seed in args.seeds if seed not in done]
    run_all(train, jobs, runs, log, machine, args.jobs)
    text = report(data, runs, machine)
    with whole(log.with_suffix('.md')) as new:
        new.write_text(text)
    print(text)


if __name__ == '__main__':
    main()
