"""Trains the weights that ship with the package, `test_vt_resnet.digits` and `test_vt_resnet.cifar10`.

    python benchmarks/weights.py digits --work-dir runs
    python benchmarks/weights.py cifar10 --data-dir CIFAR10 --work-dir runs

is `vt-zoo finetune` from random weights: with seed 0 for the file in vt_zoo/weights and with seed 1 to show how much
hangs on the seed. Seed and last epoch were decided beforehand, the held-out images decide nothing. The recipe of the
digits is the best of four on the training images alone, a quarter of them held out, three times. CIFAR-10 are JPEG
files (see benchmarks/cifar.py), on which the model is trained at 96x96, then at 128x128, then, with milder crops, at
144x144.

The results are benchmarks/results/digits_weights and cifar10_weights, .md and .json; what was interrupted goes on where
it was. All of the digits take about 40 minutes on one CPU core, a seed of CIFAR-10 about 200.
"""
import argparse
import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import List, Optional

import timm
import torch
from cifar import find_pictures
from harness import add_runs, complaints, environment, read_runs, run_all, table
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader

from vt_zoo.classification.settings import FinetuneSettings
from vt_zoo.classification.train import evaluate, finetune
from vt_zoo.data.digits import write_digits
from vt_zoo.data.images import ImageFolder, find_split
from vt_zoo.errors import InputError
from vt_zoo.files import whole

RESULTS = Path(__file__).parent / 'results'
WEIGHTS = Path(__file__).parents[1] / 'vt_zoo' / 'weights'
QUICKSTART = FinetuneSettings(
    model='test_vt_resnet.untrained', epochs=12, img_size=64, scale=(0.7, 1.0), hflip=0., color_jitter=0.)
DIGITS = {  # recipes to choose from; of equal ones the first is taken
    '12 epochs': QUICKSTART,
    '40 epochs': replace(QUICKSTART, epochs=40),
    '40 epochs, stochastic depth': replace(QUICKSTART, epochs=40, drop_path=0.1),
    '40 epochs, RandAugment': replace(QUICKSTART, epochs=40, aa='rand-m5-mstd0.5'),
}
SPLITS = 3
FIRST = FinetuneSettings(
    model='test_vt_resnet.untrained', img_size=96, epochs=20, lr=0.1, batch_size=128, weight_decay=5e-4,
    warmup_epochs=1, smoothing=0., scale=(0.6, 1.0), color_jitter=0., precision='bfloat16')
CIFAR10 = [
    FIRST, replace(FIRST, img_size=128, epochs=24),
    replace(FIRST, img_size=144, epochs=12, lr=0.05, scale=(0.8, 1.0), ratio=(0.9, 1.1))]
DATA = {
    'digits': "scikit-learn's digits, 1,347 training and 450 held-out scans of 8x8.",
    'cifar10': 'CIFAR-10 as JPEG files, which is not the official data, 50,000 training and 10,000 held-out pictures.',
}


def link_cifar(data_dir: Path, folder: Path) -> Path:
    """A folder with the test pictures as `val`, on which a run is measured.

    Raises:
        InputError: `data_dir` does not hold CIFAR-10, or `folder` links to another one.
    """
    find_pictures(data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (('train', 'train'), ('val', 'test')):
        link, target = folder / name, (data_dir / part).resolve()
        if not link.exists():
            link.symlink_to(target)
        if link.resolve() != target:
            raise InputError(f'--work-dir has pictures of {link.resolve().parent}, got --data-dir {data_dir}')
    return folder


def train(words: dict, steps: List[FinetuneSettings], data: Path, work_dir: Path, weights: Optional[Path]) -> dict:
    """Train on one thread, each step from the model of the one before.

    Args:
        words: What the record says of the run, `seed` among it.
        steps: Settings without the seed.
        data: Folder of images.
        work_dir: Folder for the steps; those that it holds are not trained again.
        weights: File to write, if any.

    Returns:
        The words, and how many of the held-out images are right.
    """
    torch.set_num_threads(1)
    seed, start = words['seed'], None
    for settings in steps:
        out = work_dir / f'seed_{seed}_{settings.img_size}'
        settings = replace(settings, seed=seed, model=str(start or settings.model))
        start = out / 'model'
        if not start.exists():
            finetune(data, out, settings, resume=True, device='cpu')
    if weights is not None:
        with whole(weights) as new:
            shutil.copy(start / 'model.safetensors', new)
    training = json.loads((start / 'config.json').read_text())['training']
    return {**words, 'correct': training['val_correct'], 'total': training['val_images']}


def best_recipe(runs: List[dict]) -> str:
    """The recipe of the digits with most right images over the splits of the training images."""
    return max(DIGITS, key=lambda recipe: sum(r['correct'] for r in validations(runs, recipe)))


def validations(runs: List[dict], recipe: str) -> List[dict]:
    """Runs of a recipe on parts of the training images."""
    return [r for r in runs if r.get('of') == 'training images' and r['recipe'] == recipe]


def count(weights: Path, data: Path, size: int) -> int:
    """How many of the held-out images a file finds right."""
    split = find_split(data)
    model = timm.create_model(
        'test_vt_resnet.untrained', pretrained=True, num_classes=len(split.classes), pretrained_cfg_overlay={
            'file': str(weights), 'num_classes': len(split.classes), 'input_size': (3, size, size)})
    images = ImageFolder(split.val, create_transform(**resolve_data_config({}, model=model)))
    _, predictions = evaluate(model, DataLoader(images, 50), torch.device('cpu'))
    return sum(int(p == target) for p, (_, target) in zip(predictions, split.val))


def report(name: str, steps: List[FinetuneSettings], runs: List[dict], environment: str) -> str:
    """The result as Markdown."""
    trainings = ', then '.join(
        f'for {s.epochs} epochs at {s.img_size}x{s.img_size} with a peak learning rate of {s.lr}' for s in steps)
    lines = [
        f'# The weights test_vt_resnet.{name}', '',
        f'Command: `python benchmarks/weights.py {name}`. {environment}', '',
        f'{DATA[name]} `vt-zoo finetune` from random weights {trainings}; all settings are in the script. Accuracy '
        "after the last epoch. The file is seed 0's, as was decided beforehand.",
        *table(('seed', 'right', 'of held-out images', 'accuracy'), (
            (r['seed'], r['correct'], r['total'], f'{100 * r["correct"] / r["total"]:.2f} %')
            for r in sorted(runs, key=lambda r: r['seed']) if r.get('of') != 'training images'))]
    if name == 'digits':
        of_splits = {
            recipe: [100 * r['correct'] / r['total'] for r in validations(runs, recipe)] for recipe in DIGITS}
        lines += [
            f'The recipe is "{best_recipe(runs)}", the best of these on the training images alone: trained on '
            f'three quarters, measured on the fourth, for {SPLITS} random splits. Accuracy in percent.',
            *table(('recipe', 'mean', 'each split'), (
                (recipe, f'{statistics.mean(each):.2f}', ', '.join(f'{a:.2f}' for a in each))
                for recipe, each in of_splits.items()))]
    return '\n'.join([*lines, ''])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=[*DATA])
    parser.add_argument('--data-dir', type=Path, help='folder of CIFAR-10 as JPEG files')
    parser.add_argument('--work-dir', type=Path, default=Path('weights_runs'), help='folder for unfinished runs')
    add_runs(parser, [0, 1])
    args = parser.parse_args()
    if args.name == 'cifar10' and args.data_dir is None:
        parser.error('cifar10 needs --data-dir')
    log, weights = RESULTS / f'{args.name}_weights.json', WEIGHTS / f'test_vt_resnet.{args.name}.safetensors'
    runs, machine = read_runs(log), environment()

    def run(jobs: List[tuple]) -> None:
        missing = [job for job in jobs if not any(job[0].items() <= r.items() for r in runs)]
        run_all(train, missing, runs, log, machine, args.jobs)

    if args.name == 'digits':
        data = args.work_dir / 'digits'
        write_digits(data)
        of = 'training images'
        run([
            ({'of': of, 'recipe': recipe, 'seed': seed}, [replace(settings, val_fraction=0.25)], data / 'train',
             args.work_dir / of / recipe, None)
            for seed in range(SPLITS) for recipe, settings in DIGITS.items()])
        steps, words = [DIGITS[best_recipe(runs)]], {'of': 'held-out images', 'recipe': best_recipe(runs)}
    else:
        with complaints(parser):
            data = link_cifar(args.data_dir, args.work_dir / 'data')
        steps, words = CIFAR10, {}
    run([
        ({**words, 'seed': seed}, steps, data, args.work_dir.joinpath(*words.values()), None if seed else weights)
        for seed in args.seeds])
    text = report(args.name, steps, runs, machine)
    if weights.exists():
        text += f'Counted again from the file as it ships: {count(weights, data, steps[-1].img_size)} right.\n'
    with whole(log.with_suffix('.md')) as new:
        new.write_text(text)
    print(text)


if __name__ == '__main__':
    main()
