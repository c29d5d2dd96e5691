"""The paper's claims on photographs: VT against timm's ResNet of the same trunk on CIFAR-10, and its ablations.

    python benchmarks/cifar10.py --data-dir CIFAR10 --work-dir runs

trains `test_vt_resnet` and the ResNet whose last stage it replaces by one recipe, on the same pictures in the same
order, and writes benchmarks/results/cifar10.md and .json: Table 2 of the paper, and Tables 3 to 7 with `--variants
ablations`. CIFAR-10 are JPEG files (see benchmarks/cifar.py) of 32x32 pixels; the stem is a 3x3 convolution of stride 1
without pooling, so that the VT modules see 8x8 pixels and the ResNet's last stage works on 4x4. That costs less than
enlarging the pictures. For Table 8's claim,

    python benchmarks/cifar10.py --data-dir CIFAR10 --work-dir runs --variants teacher --seeds 0
    python benchmarks/cifar10.py --data-dir CIFAR10 --work-dir runs --recipe advanced

train a larger ResNet and then both models by a recipe after the manner of the paper's section 5.2, distilled from it.

A run is recorded when it ends and goes on after its last epoch when it was killed; `--work-dir` keeps a log with a line
an epoch, and the trained weights. An epoch takes about 75 seconds on one thread of a CPU in bfloat16; with `--device
cuda`, several runs may share a GPU (`--jobs`).
"""
import argparse
import hashlib
import statistics
from functools import partial
from pathlib import Path
from typing import List, Optional, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from ablations import RESNET, VARIANTS, in_paper, tables
from cifar import AUTOCAST, BATCH, crop_and_flip, fit, fit_plain, give_small_stem, load_cifar, normalise, prepare_cifar
from harness import accuracy, add_device, add_runs, at_least, environment, environments, mean_and_spread, run_all
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from vt_zoo.analysis.cost import count_multiply_adds
from vt_zoo.weights.files import read_tensors, write_tensors

RESULTS = Path(__file__).parent / 'results'
EPOCHS, PRECISION = 20, 'bfloat16'
TOGETHER = 4  # pictures that get the same draw of AutoAugment, which is slow for single ones
BASE, TEACHER = 'VT', 'teacher'
ABLATIONS = [name for name, (_, _, paper) in VARIANTS.items() if paper and name != RESNET]  # that the paper has
GROUPS = {'models': [BASE, RESNET], 'ablations': ABLATIONS}


def create(name: str, **rates: float) -> nn.Module:
    """A variant of `test_vt_resnet`, the ResNet of the same trunk, or the teacher, for 32x32 pixels."""
    if name == TEACHER:
        return give_small_stem(ResNet(BasicBlock, (2, 2, 2, 2), channels=(32, 64, 128, 256), num_classes=10, **rates))
    if name == RESNET:
        return give_small_stem(ResNet(BasicBlock, (1, 1, 1, 2), channels=(32, 48, 96, 128), num_classes=10, **rates))
    options = VARIANTS[name][1] if name in ABLATIONS else {}
    return give_small_stem(timm.create_model('test_vt_resnet', num_classes=10, **options, **rates))


def distill(
        teacher: nn.Module,
        autocast: Optional[torch.dtype],
        model: nn.Module,
        images: torch.Tensor,
        classes: torch.Tensor,
) -> torch.Tensor:
    """0.2 of the cross entropy with smooth labels and 0.8 of the divergence from the teacher, as in section 5.2."""
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        logits = model(images).float()
        with torch.no_grad():
            shares = teacher(images).float().softmax(-1)
    divergence = F.kl_div(logits.log_softmax(-1), shares, reduction='batchmean')
    return 0.2 * F.cross_entropy(logits, classes, label_smoothing=0.1) + 0.8 * divergence


def trained_weights(work_dir: Path, run: dict) -> Path:
    """File of the weights of a run."""
    words = '_'.join(
        str(run[key]) for key in ('variant', 'recipe', 'seed', 'epochs', 'precision', 'teacher') if key in run)
    return work_dir / f'{words.replace(" ", "_").replace(",", "")}.safetensors'


def fit_advanced(
        model: nn.Module, x: torch.Tensor, classes: torch.Tensor, epochs: int, seed: int, state: Path, precision: str,
        teacher: Path,
) -> Tuple[nn.Module, List[Tuple[float, float]]]:
    """After the manner of section 5.2 of the paper, with its rate scaled to the batch and a shorter average.

    Returns:
        The moving average of the model, and what `fit` returns.
    """
    optimizer = create_optimizer_v2(
        model, 'rmsproptf', lr=0.16 * BATCH / 2048, weight_decay=2e-5, momentum=0.9, eps=1e-3)
    average = ModelEmaV3(model, decay=0.995)
    device, x = x.device, x.cpu()  # AutoAugment of few pictures is slower on a GPU
    larger = create(TEACHER).to(device, memory_format=torch.channels_last).eval()
    larger.load_state_dict(read_tensors(teacher)[0])
    policy = AutoAugment(AutoAugmentPolicy.CIFAR10)

    def pick(indices: torch.Tensor, generator: torch.Generator, epoch: int) -> torch.Tensor:
        pictures = crop_and_flip(x[indices], generator).to(torch.uint8)
        return normalise(torch.cat([policy(some) for some in pictures.split(TOGETHER)]).to(device))

    loss_of = partial(distill, larger, AUTOCAST[precision])
    return average.module, fit(model, pick, classes, optimizer, epochs, BATCH, seed, state, loss_of, average)


def train(run: dict, data_dir: Path, work_dir: Path, teacher: Path, device: str) -> dict:
    """Train a variant; its accuracies are those after the last epoch, on pictures as they are.

    Args:
        run: `variant`, `recipe`, `seed`, `epochs`, `precision` and, of the advanced recipe, `teacher`, which names the
            content of its file.
        data_dir: Folder of CIFAR-10.
        work_dir: Folder for the unfinished run, its log and the trained weights.
        teacher: File of the teacher's weights, to read or, for the teacher itself, to write.
        device: 'cpu' or 'cuda'.
    """
    torch.set_num_threads(1)
    name, seed, epochs, precision = (run[key] for key in ('variant', 'seed', 'epochs', 'precision'))
    (x, y), test = (tuple(tensor.to(device) for tensor in pair) for pair in load_cifar(data_dir).values())
    trained = trained_weights(work_dir, run)
    state = trained.with_name(f'{trained.stem}_unfinished.safetensors')
    torch.manual_seed(seed)
    advanced = run['recipe'] == 'advanced'
    rates = {'drop_rate': 0.2, 'drop_path_rate': 0.1} if advanced else {}
    model = measured = create(name, **rates).to(device, memory_format=torch.channels_last)
    words = model, x, y, epochs, seed, state, precision
    if advanced:
        measured, history = fit_advanced(*words, teacher)
    else:
        history = fit_plain(*words)
    write_tensors(teacher if name == TEACHER else trained, measured.state_dict(), {})
    result = {
        'loss': [loss for loss, _ in history], 'epoch_cpu_seconds': statistics.median(s for _, s in history),
        'test': accuracy(measured, normalise(test[0]), test[1], batch_size=500),
        'train': accuracy(measured, normalise(x[::5]), y[::5], batch_size=500),
        'parameters': sum(p.numel() for p in model.parameters()),
        'multiply_adds': count_multiply_adds(model, (3, 32, 32))}
    state.unlink()
    return result


def schedule_of(run: dict) -> str:
    teacher = f', teacher {run["teacher"]}' if 'teacher' in run else ''
    return f'Recipe {run["recipe"]}, {run["epochs"]} epochs, {run["precision"]}{teacher}'


def paper_table(run: dict) -> Tuple[str, Tuple[float, ...]]:
    """Table of the paper that has a run's model, and its points against the VT-ResNet."""
    if run['recipe'] == 'advanced':
        return '8', (-3.0, -2.2) if run['variant'] == RESNET else ()
    return ('2', ()) if run['variant'] == BASE else in_paper(run)


def report(runs: List[dict]) -> str:
    """The result as Markdown."""
    columns = {
        'training accuracy': lambda runs: mean_and_spread([r['train'] for r in runs]),
        'multiply-adds, M': lambda runs: f'{runs[0]["multiply_adds"] / 1e6:.1f}',
        'CPU s an epoch': lambda runs: f'{statistics.median(r["epoch_cpu_seconds"] for r in runs):.0f}'}
    return '\n'.join([
        '# VT against ResNet on photographs', '',
        'Commands: `python benchmarks/cifar10.py --data-dir DIR`, and the same with `--variants teacher` and then with '
        f'`--recipe advanced`, each with `--seeds` for the seeds that the tables have. {environments(runs)}', '',
        'CIFAR-10 as JPEG files of 32x32, which is not the official data: 50,000 training and 10,000 test pictures. '
        '*Plain*: crops and flips, SGD with momentum. *Advanced*: RMSProp, AutoAugment, smooth labels, dropout, '
        'stochastic depth, a moving average of the weights and distillation from the teacher. The models have the '
        'trunk of `test_vt_resnet`, with a 3x3 stem of stride 1 and no pooling. Accuracy after the last epoch in '
        'percent, mean and standard deviation over seeds; training accuracy is that on every fifth training picture, '
        'as it is. The time of an epoch is that of one thread, beside another run; speed.md compares the time of a '
        "step. The paper's points are those of ResNet-18 and 34 on ImageNet, not verified here.",
        *tables(runs, schedule_of, BASE, columns, paper_table), ''])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ', '.join([*GROUPS, BASE, RESNET, TEACHER, *ABLATIONS])
    parser.add_argument('--data-dir', type=Path, required=True, help='folder of CIFAR-10 as JPEG files')
    parser.add_argument('--work-dir', type=Path, default=Path('cifar10_runs'), help='folder for unfinished runs, logs')
    parser.add_argument(
        '--variants', nargs='+', default=['models'], metavar='NAME',
        help=f'of {known} (default: models)')
    parser.add_argument(
        '--recipe', default='plain', choices=['plain', 'advanced'], help='of training (default: %(default)s)')
    parser.add_argument('--teacher', type=Path, help='its weights (default: teacher.safetensors in --work-dir)')
    parser.add_argument('--epochs', type=at_least(1), default=EPOCHS, help='(default: %(default)s)')
    parser.add_argument(
        '--precision', default=PRECISION, choices=['float32', 'bfloat16'], help='of training (default: %(default)s)')
    add_device(parser)
    add_runs(parser, [0, 1, 2])
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write')
    args = parser.parse_args()
    variants = [*dict.fromkeys(name for group in args.variants for name in GROUPS.get(group, [group]))]
    unknown = {*variants} - {BASE, RESNET, TEACHER, *ABLATIONS}
    if unknown:
        parser.error(f'--variants must be of {known}, got {min(unknown)!r}')
    if TEACHER in variants and (args.recipe == 'advanced' or len(args.seeds) > 1):
        parser.error('--variants teacher is trained by --recipe plain with one of --seeds')
    teacher = args.teacher or args.work_dir / 'teacher.safetensors'
    if args.recipe == 'advanced' and not teacher.is_file():
        parser.error(f'--teacher must name the weights of a teacher, which --variants teacher makes, got {teacher}')
    prepare_cifar(parser, args.data_dir)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    log = args.out / 'cifar10.json'
    schedule = {'recipe': args.recipe, 'epochs': args.epochs, 'precision': args.precision}
    if args.recipe == 'advanced':
        schedule['teacher'] = hashlib.sha256(teacher.read_bytes()).hexdigest()[:8]
    jobs = [
        ({'variant': name, 'seed': seed, **schedule}, args.data_dir, args.work_dir, teacher, args.device)
        for seed in args.seeds for name in variants]
    print(report(run_all(train, jobs, log, environment(device=args.device), args.jobs, report)))


if __name__ == '__main__':
    main()
