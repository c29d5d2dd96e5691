"""Trains the weights that ship with the package, `test_vt_resnet.digits` and `test_vt_resnet.cifar10`.

    python benchmarks/weights.py digits --work-dir runs
    python benchmarks/weights.py cifar10 --data-dir CIFAR10 --work-dir runs

start from random weights: with seed 0 for the file in vt_zoo/weights and with seed 1 to show how much hangs on the
seed. Seed and last epoch were decided beforehand. The held-out digits decided nothing; of CIFAR-10, a first recipe
(three runs of `vt-zoo finetune` in a row) was given up after it had 86.88 % on the test pictures. The digits are
trained by `vt-zoo finetune`; their recipe is the best of four on the training images alone, a quarter of them held out,
three times. CIFAR-10 are JPEG files of 32x32 pixels (see benchmarks/cifar.py), which are cropped and flipped as they
are and then enlarged: the first third of the epochs to 64x64, the second to 96x96 and the last to 128x128.

The results are benchmarks/results/digits_weights and cifar10_weights, .md and .json; what was interrupted goes on where
it was. All of the digits take about 40 minutes on one CPU core, a seed of CIFAR-10 about two hours.
"""
import argparse
import json
import shutil
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import List, Optional, Tuple

import timm
import torch
import torch.nn.functional as F
from cifar import AUTOCAST, BATCH, PLAIN, crop_and_flip, find_pictures, fit, load_cifar, normalise, prepare_cifar
from harness import add_runs, cross_entropy, environment, environments, run_all, table
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader

from vt_zoo.classification.settings import FinetuneSettings
from vt_zoo.classification.train import evaluate, finetune
from vt_zoo.data.digits import write_digits
from vt_zoo.data.images import ImageFolder, find_split
from vt_zoo.files import whole
from vt_zoo.weights.files import write_tensors

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
EPOCHS, SIZES, PRECISION, SMOOTHING, DECAY = 90, (64, 96, 128), 'bfloat16', 0.1, 0.998  # of CIFAR-10
DATA = {
    'digits':
        "scikit-learn's digits, 1,347 training and 450 held-out scans of 8x8. `vt-zoo finetune` from random weights at "
        '64x64; all settings are in the script.',
    'cifar10':
        'CIFAR-10 as JPEG files, which is not the official data, 50,000 training and 10,000 held-out pictures. From '
        f'random weights for {EPOCHS} epochs: crops and flips of the pictures of 32x32, enlarged to '
        f'{", ".join(f"{size}x{size}" for size in SIZES)} for a third of the epochs each; SGD with momentum 0.9, '
        f'weight decay {PLAIN["weight_decay"]}, batch {BATCH}, a learning rate of {PLAIN["lr"]} after one epoch of '
        f'warm-up, then a cosine; label smoothing {SMOOTHING}; {PRECISION}. Measured is a moving average of the '
        f'weights with a decay of {DECAY}, on pictures of the size of the last third. An earlier recipe '
        '(three runs of `vt-zoo finetune` in a row, of 56 epochs) was given up for it after 86.88 % on these pictures.',
}


def train_digits(words: dict, settings: FinetuneSettings, data: Path, work_dir: Path, weights: Optional[Path]) -> dict:
    """Train on one thread, and count the held-out images that are right.

    Args:
        words: What the record says of the run, `seed` among it.
        settings: Settings without the seed.
        data: Folder of images.
        work_dir: Folder for runs; one that it holds is not trained again.
        weights: File to write, if any.
    """
    torch.set_num_threads(1)
    out = work_dir / f'seed_{words["seed"]}'
    if not (out / 'model').exists():
        finetune(data, out, replace(settings, seed=words['seed']), resume=True, device='cpu')
    if weights is not None:
        with whole(weights) as new:
            shutil.copy(out / 'model' / 'model.safetensors', new)
    training = json.loads((out / 'model' / 'config.json').read_text())['training']
    return {'correct': training['val_correct'], 'total': training['val_images']}


def train_cifar10(words: dict, data_dir: Path, work_dir: Path, weights: Optional[Path]) -> dict:
    """Train on one thread, and count the test pictures that the moving average finds right, as files.

    Args:
        words: What the record says of the run, `seed` among it.
        data_dir: Folder of CIFAR-10.
        work_dir: Folder for unfinished runs, logs and the trained weights.
        weights: Another file to write, if any.
    """
    torch.set_num_threads(1)
    seed = words['seed']
    x, y = load_cifar(data_dir)['train']
    torch.manual_seed(seed)
    model = timm.create_model('test_vt_resnet.untrained', num_classes=10).to(memory_format=torch.channels_last)
    mean, std = (model.pretrained_cfg[name] for name in ('mean', 'std'))
    average = ModelEmaV3(model, decay=DECAY)

    def pick(indices: torch.Tensor, generator: torch.Generator, epoch: int) -> torch.Tensor:
        size = SIZES[epoch * len(SIZES) // EPOCHS]
        crops = crop_and_flip(x[indices], generator)
        return normalise(F.interpolate(crops, (size, size), mode='bilinear', antialias=True), mean, std)

    trained = work_dir / f'cifar10_{seed}_{EPOCHS}.safetensors'
    state = trained.with_name(f'{trained.stem}_unfinished.safetensors')
    loss_of = partial(cross_entropy, autocast=AUTOCAST[PRECISION], smoothing=SMOOTHING)
    fit(model, pick, y, create_optimizer_v2(model, **PLAIN), EPOCHS, BATCH, seed, state, loss_of, average)
    for file in filter(None, (trained, weights)):
        write_tensors(file, average.module.state_dict(), {})
    pictures = find_pictures(data_dir)['test']
    result = {'correct': count('cifar10', trained, pictures), 'total': len(pictures)}
    state.unlink()
    return result


def best_recipe(runs: List[dict]) -> str:
    """The recipe of the digits with most right images over the splits of the training images."""
    return max(DIGITS, key=lambda recipe: sum(r['correct'] for r in validations(runs, recipe)))


def validations(runs: List[dict], recipe: str) -> List[dict]:
    """Runs of a recipe on parts of the training images."""
    return [r for r in runs if r.get('of') == 'training images' and r['recipe'] == recipe]


def count(name: str, weights: Path, images: List[Tuple[Path, int]]) -> int:
    """How many images a file finds right, prepared as the tag of that name says."""
    model = timm.create_model(
        f'test_vt_resnet.{name}', pretrained=True, pretrained_cfg_overlay={'file': str(weights)})
    prepared = ImageFolder(images, create_transform(**resolve_data_config({}, model=model)))
    _, predictions = evaluate(model, DataLoader(prepared, 50), torch.device('cpu'))
    return sum(int(p == target) for p, (_, target) in zip(predictions, images))


def report(name: str, runs: List[dict]) -> str:
    """The result as Markdown."""
    data_dir = ' --data-dir DIR' if name == 'cifar10' else ''
    lines = [
        f'# The weights test_vt_resnet.{name}', '',
        f'Command: `python benchmarks/weights.py {name}{data_dir}`. {environments(runs)}', '', DATA[name],
        "Accuracy after the last epoch. The file is seed 0's, as was decided beforehand.",
        *table(('seed', 'right', 'of held-out images', 'accuracy'), (
            (r['seed'], r['correct'], r['total'], f'{100 * r["correct"] / r["total"]:.2f} %')
            for r in sorted(runs, key=lambda r: r['seed']) if r.get('of') != 'training images'))]
    if name == 'digits':
        of_splits = {
            recipe: [100 * r['correct'] / r['total'] for r in validations(runs, recipe)] for recipe in DIGITS}
        best = best_recipe(runs)
        lines += [
            'Recipes on the training images alone: trained on three quarters, measured on the fourth, for '
            f'{SPLITS} random splits. Accuracy in percent.',
            *table(('recipe', 'mean', 'each split', 'chosen'), (
                (recipe, f'{statistics.mean(each):.2f}', ', '.join(f'{a:.2f}' for a in each),
                 'x' if recipe == best else '')
                for recipe, each in of_splits.items()))]
    return '\n'.join([*lines, ''])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=[*DATA])
    parser.add_argument('--data-dir', type=Path, help='folder of CIFAR-10 as JPEG files')
    parser.add_argument('--work-dir', type=Path, default=Path('weights_runs'), help='folder for unfinished runs')
    add_runs(parser, [0, 1])
    args = parser.parse_args()
    log, weights = RESULTS / f'{args.name}_weights.json', WEIGHTS / f'test_vt_resnet.{args.name}.safetensors'
    machine = environment()
    files = [None if seed else weights for seed in args.seeds]
    if args.name == 'digits':
        data = args.work_dir / 'digits'
        write_digits(data)
        of = 'training images'
        jobs = [
            ({'of': of, 'recipe': recipe, 'seed': seed}, replace(settings, val_fraction=0.25), data / 'train',
             args.work_dir / of / recipe, None)
            for seed in range(SPLITS) for recipe, settings in DIGITS.items()]
        best = best_recipe(run_all(train_digits, jobs, log, machine, args.jobs))
        words = {'of': 'held-out images', 'recipe': best}
        jobs = [
            ({**words, 'seed': seed}, DIGITS[best], data, args.work_dir.joinpath(*words.values()), file)
            for seed, file in zip(args.seeds, files)]
        runs = run_all(train_digits, jobs, log, machine, args.jobs)
        held_out = find_split(data).val
    else:
        if args.data_dir is None:
            parser.error('cifar10 needs --data-dir')
        prepare_cifar(parser, args.data_dir)
        args.work_dir.mkdir(parents=True, exist_ok=True)
        jobs = [
            ({'seed': seed, 'epochs': EPOCHS}, args.data_dir, args.work_dir, file)
            for seed, file in zip(args.seeds, files)]
        runs = run_all(train_cifar10, jobs, log, machine, args.jobs)
        held_out = find_pictures(args.data_dir)['test']
    text = report(args.name, runs)
    if weights.exists():
        text += f'Counted again from the file as it ships: {count(args.name, weights, held_out)} right.\n'
    with whole(log.with_suffix('.md')) as new:
        new.write_text(text)
    print(text)


if __name__ == '__main__':
    main()
