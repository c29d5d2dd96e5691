"""Trains the weights that ship with the package, `test_vt_resnet.digits` and `test_vt_resnet.cifar10`.

    python benchmarks/weights.py digits --work-dir runs
    python benchmarks/weights.py cifar10 --data-dir CIFAR10 --work-dir runs --device cuda

trains from random weights: with seed 0 for the file in vt_zoo/weights and with seed 1 to show how much hangs on the
seed. Seed and last epoch were decided beforehand, the held-out images decide nothing. The recipe of the digits is the
best of four on the training images alone, a quarter of them held out, three times; they are trained by `vt-zoo
finetune`. CIFAR-10 are JPEG files (see benchmarks/cifar.py), which are enlarged on the device. For a larger model,

    python benchmarks/weights.py cifar10 --data-dir CIFAR10 --work-dir runs --device cuda --seeds 0 \\
        --model vt_resnet18 --epochs 30
    vt-zoo publish runs/vt_resnet18_0 --repo-id ORG/vt_resnet18.cifar10 --dataset CIFAR-10 --out files

trains it alike and makes its files ready for the hub.

The results are benchmarks/results/digits_weights and cifar10_weights, .md and .json; what was interrupted goes on where
it was. All of the digits take about 40 minutes on one CPU core.
"""
import argparse
import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Callable, List, Optional, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from cifar import BATCH, CLASSES, PLAIN, crop_and_flip, fit, load_cifar
from harness import environment, read_runs, run_all, table
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader

from vt_zoo.classification.settings import FinetuneSettings
from vt_zoo.classification.train import evaluate, finetune
from vt_zoo.data.digits import write_digits
from vt_zoo.data.images import ImageFolder, find_split
from vt_zoo.files import whole
from vt_zoo.weights.files import write_model

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
SMALL = 'test_vt_resnet'
SIZE, SMOOTHING, DECAY = 144, 0.1, 0.998  # of CIFAR-10, whose optimizer is `cifar.PLAIN`
TEXTS = {
    'digits': "scikit-learn's digits, 1,347 training and 450 held-out scans of 8x8. `vt-zoo finetune` from random "
    'weights; all settings are in the script.',
    'cifar10': 'CIFAR-10 as JPEG files, which is not the official data, 50,000 training and 10,000 held-out pictures. '
    f'From random weights at {SIZE}x{SIZE} in bfloat16; all settings are in the script.'}


def link_cifar(data_dir: Path, folder: Path) -> Path:
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


def train_on_digits(
        words: dict, settings: FinetuneSettings, data: Path, work_dir: Path, weights: Optional[Path]) -> dict:
    """Train on one thread.

    Args:
        words: What the record says of the run, `seed` among it.
        settings: All but the seed.
        data: Folder of images.
        work_dir: Folder for runs; one that it holds is not trained again.
        weights: File to write, if any.

    Returns:
        The words, and how many of the held-out images are right.
    """
    torch.set_num_threads(1)
    out = work_dir / f'seed_{words["seed"]}'
    if not (out / 'model').exists():
        finetune(data, out, replace(settings, seed=words['seed']), resume=True, device='cpu')
    if weights is not None:
        ship(out / 'model', weights)
    training = json.loads((out / 'model' / 'config.json').read_text())['training']
    return {**words, 'correct': training['val_correct'], 'total': training['val_images']}


def train_on_cifar10(words: dict, data_dir: Path, work_dir: Path, weights: Optional[Path], device: str) -> dict:
    """Train on one thread; the weights are a moving average.

    Args:
        words: What the record says of the run: `model`, `epochs` and `seed`.
        data_dir: Folder of CIFAR-10.
        work_dir: Folder for the state and the model.
        weights: File to write, if any.
        device: 'cpu' or 'cuda'.

    Returns:
        The words, and how many of the test pictures are right.
    """
    torch.set_num_threads(1)
    x, y = (tensor.to(device) for tensor in load_cifar(data_dir)['train'])
    torch.manual_seed(words['seed'])
    model = timm.create_model(f'{words["model"]}.untrained', num_classes=len(CLASSES))
    model = model.to(device, memory_format=torch.channels_last)
    config = {**resolve_data_config({'img_size': SIZE}, model=model), 'crop_pct': 1.}
    mean, std = (255 * torch.tensor(config[name], device=device).view(3, 1, 1) for name in ('mean', 'std'))
    optimizer = create_optimizer_v2(model, **PLAIN)
    average = ModelEmaV3(model, decay=DECAY, use_warmup=True)
    optimizer.register_step_post_hook(lambda *_: average.update(model))

    def pick(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        pictures = crop_and_flip(x[indices], generator)
        pictures = F.interpolate(pictures, size=(SIZE, SIZE), mode=config['interpolation'], antialias=True)
        return ((pictures - mean) / std).contiguous(memory_format=torch.channels_last)

    def loss_of(model: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = model(images)
        return F.cross_entropy(logits.float(), classes, label_smoothing=SMOOTHING)

    folder = work_dir / '{model}_{seed}'.format(**words)
    state = folder.with_name(f'{folder.name}.safetensors')
    fit(model, pick, y, optimizer, words['epochs'], BATCH, words['seed'], state, loss_of, average)
    kept = average.module.to(memory_format=torch.contiguous_format)
    training = {
        'program': 'benchmarks/weights.py', 'epochs': words['epochs'], 'weights': 'moving average', 'pretrained': False,
        'train_images': len(y)}
    write_model(folder, kept, list(CLASSES), config, training)
    data = link_cifar(data_dir, work_dir / 'data')
    correct, total = count(folder / 'model.safetensors', data, SIZE, words['model'], device)
    write_model(folder, kept, list(CLASSES), config, {**training, 'val_correct': correct, 'val_images': total})
    if weights is not None:
        ship(folder, weights)
    state.unlink()
    return {**words, 'correct': correct, 'total': total}


def ship(folder: Path, weights: Path) -> None:
    """Copy the weights of a model's folder."""
    with whole(weights) as new:
        shutil.copy(folder / 'model.safetensors', new)


def best_recipe(runs: List[dict]) -> str:
    """The recipe of the digits with most right images over the splits of the training images."""
    return max(DIGITS, key=lambda recipe: sum(r['correct'] for r in validations(runs, recipe)))


def validations(runs: List[dict], recipe: str) -> List[dict]:
    """Runs of a recipe on parts of the training images."""
    return [r for r in runs if r.get('of') == 'training images' and r['recipe'] == recipe]


def count(weights: Path, data: Path, size: int, name: str = SMALL, device: str = 'cpu') -> Tuple[int, int]:
    """How many of the held-out images a file finds right, and how many there are."""
    split = find_split(data)
    model = timm.create_model(
        f'{name}.untrained', pretrained=True, num_classes=len(split.classes), pretrained_cfg_overlay={
            'file': str(weights), 'num_classes': len(split.classes), 'input_size': (3, size, size), 'crop_pct': 1.})
    images = ImageFolder(split.val, create_transform(**resolve_data_config({}, model=model)))
    _, predictions = evaluate(model.to(device), DataLoader(images, 50), torch.device(device))
    return sum(int(p == target) for p, (_, target) in zip(predictions, split.val)), len(split.val)


def report(name: str, runs: List[dict], environment: str) -> str:
    """The result as Markdown."""
    held_out = [r for r in runs if r.get('of') != 'training images']
    lines = [
        f'# The weights {SMALL}.{name}', '', f'Command: `python benchmarks/weights.py {name}`. {environment}', '',
        f"{TEXTS[name]} Accuracy after the last epoch. The file is seed 0's, as was decided beforehand.",
        *table(('model', 'epochs', 'seed', 'right', 'of held-out images', 'accuracy'), (
            (r.get('model', SMALL), r.get('epochs') or DIGITS[r['recipe']].epochs, r['seed'], r['correct'], r['total'],
             f'{100 * r["correct"] / r["total"]:.2f} %')
            for r in sorted(held_out, key=lambda r: (r.get('model', SMALL), r['seed']))))]
    if name == 'digits':
        lines += [
            f'The recipe is "{best_recipe(runs)}", the best of these on the training images alone: trained on '
            f'three quarters, measured on the fourth, for {SPLITS} random splits. Accuracy in percent.', '',
            '| recipe | mean | each split |', '|---|---|---|']
        for recipe in DIGITS:
            each = [100 * r['correct'] / r['total'] for r in validations(runs, recipe)]
            lines.append(f'| {recipe} | {statistics.mean(each):.2f} | {", ".join(f"{a:.2f}" for a in each)} |')
    return '\n'.join([*lines, ''])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=[*TEXTS])
    parser.add_argument('--data-dir', type=Path, help='folder of CIFAR-10 as JPEG files')
    parser.add_argument('--work-dir', type=Path, default=Path('weights_runs'), help='folder for unfinished runs')
    parser.add_argument('--model', default=SMALL, help='of cifar10: a model that has weights `untrained`')
    parser.add_argument('--epochs', type=int, default=50, help='of cifar10 (default: %(default)s)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'], help='of cifar10')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, one thread each (default: %(default)s)')
    args = parser.parse_args()
    if args.name == 'cifar10' and args.data_dir is None:
        parser.error('cifar10 needs --data-dir')
    log, weights = RESULTS / f'{args.name}_weights.json', WEIGHTS / f'{SMALL}.{args.name}.safetensors'
    runs, machine = read_runs(log), environment(device=args.device)

    def run(train: Callable[..., dict], jobs: List[tuple]) -> None:
        missing = [job for job in jobs if not any(job[0].items() <= r.items() for r in runs)]
        run_all(train, missing, runs, log, machine, args.jobs)

    if args.name == 'digits':
        data = args.work_dir / 'digits'
        write_digits(data)
        of = 'training images'
        run(train_on_digits, [
            ({'of': of, 'recipe': recipe, 'seed': seed}, replace(settings, val_fraction=0.25), data / 'train',
             args.work_dir / of / recipe, None)
            for seed in range(SPLITS) for recipe, settings in DIGITS.items()])
        size, words = QUICKSTART.img_size, {'of': 'held-out images', 'recipe': best_recipe(runs)}
        run(train_on_digits, [
            ({**words, 'seed': seed}, DIGITS[words['recipe']], data, args.work_dir.joinpath(*words.values()),
             None if seed else weights)
            for seed in args.seeds])
    else:
        load_cifar(args.data_dir)  # before processes do so at the same time
        data, size = link_cifar(args.data_dir, args.work_dir / 'data'), SIZE
        run(train_on_cifar10, [
            ({'model': args.model, 'epochs': args.epochs, 'seed': seed}, args.data_dir, args.work_dir,
             weights if (args.model, seed) == (SMALL, 0) else None, args.device)
            for seed in args.seeds])
    text = report(args.name, runs, machine)
    if weights.exists():
        text += f'\nCounted again from the file as it ships: {count(weights, data, size)[0]} right.\n'
    with whole(log.with_suffix('.md')) as new:
        new.write_text(text)
    print(text)


if __name__ == '__main__':
    main()
