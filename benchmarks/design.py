"""Where the paper leaves the VT module open: norms, start values, filters. One change at a time from what it is.

    python benchmarks/design.py --data-dir CIFAR10 --work-dir runs

trains each variant on two tasks and writes benchmarks/results/design.md and .json: photographs (CIFAR-10 as JPEG files,
see benchmarks/cifar.py; 32x32 with a stem of stride 1, so that the VT modules see 8x8 pixels) and the sums of two
handwritten digits of benchmarks/ablations.py (96x96 without pooling in the stem, 12x12 pixels). Runs are recorded one
by one and continued after their last epoch; `--variants`, `--tasks`, `--seeds`, `--epochs` and `--pictures` choose. A
run of 6 epochs of 20,000 photographs takes about 13 minutes on one thread, half of that in bfloat16 where the CPU has
instructions for it (`--precision bfloat16`).

A variant is a change of the modules of a created model, so that nothing of it stands in the package unless it wins.
`A+B` makes both changes. Runs of `0.1's module` were made by this script at commit d7dbd5c, before the module changed.
"""
import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import ablations
import timm
import torch
import torch.nn as nn
from cifar import crop_and_flip, fit, give_small_stem, load_cifar, normalise
from harness import accuracy, cross_entropy, environment, read_runs, run_all
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import create_optimizer_v2

from vt_zoo.analysis.metrics import attention_correlation, effective_rank, token_cosine
from vt_zoo.analysis.records import capture_tokens
from vt_zoo.layers import RecurrentTokenizer, VTModule, VTStage

RESULTS = Path(__file__).parent / 'results'
MODULES = 3
RESNET = ablations.BASELINE
OPTIONS = {  # ablations of the paper, by the model's own options
    name: options for name, (_, options, points) in ablations.VARIANTS.items() if points}


class Embedded(nn.Module):
    """Tokens with a learned embedding of each added."""

    def __init__(self, embed: nn.Module, num_tokens: int, token_dim: int) -> None:
        super().__init__()
        self.embed = embed
        self.of_token = nn.Parameter(0.5 * torch.randn(num_tokens, token_dim))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embed(tokens) + self.of_token


class Competition(nn.Module):
    """Softmax over the tokens, then over the pixels by their sum: tokens compete for pixels, as in slot attention."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        shares = logits.softmax(1)
        return shares / shares.sum(-1, keepdim=True)


class TokenLayerNorm(nn.Module):
    """LayerNorm of tokens that come as an image of one row (B, C, 1, L)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(norm.num_features)
        self.norm.weight.data.copy_(norm.weight.data)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.transpose(1, -1)).transpose(1, -1)


def _modules(stage: VTStage) -> List[VTModule]:
    """Those that have a tokenizer."""
    return [module for module in stage if isinstance(module, VTModule)]


def _recurrent(stage: VTStage) -> List[RecurrentTokenizer]:
    return [module.tokenizer for module in _modules(stage) if isinstance(module.tokenizer, RecurrentTokenizer)]


def tokens_alone(stage: VTStage) -> None:
    """Equation (2) as it is written: no learned filter beside those that the tokens make."""
    for tokenizer in _recurrent(stage):
        nn.init.zeros_(tokenizer.filters.weight).requires_grad_(False)
        nn.init.ones_(tokenizer.query.norm.weight)


def recurrence_from_one(stage: VTStage) -> None:
    for tokenizer in _recurrent(stage):
        nn.init.ones_(tokenizer.query.norm.weight)


def embedding(stage: VTStage) -> None:
    for module in _modules(stage):
        module.embed = Embedded(module.embed, 16, module.embed.norm.num_features)


def competition(stage: VTStage) -> None:
    for module in _modules(stage):
        module.tokenizer.softmax = Competition()


def sharp_logits(stage: VTStage) -> None:
    for module in _modules(stage):
        nn.init.constant_(module.tokenizer.logit_norm.weight, 3.)


def no_logit_norm(stage: VTStage) -> None:
    for module in _modules(stage):
        module.tokenizer.logit_norm = nn.Identity()


def orthogonal_filters(stage: VTStage) -> None:
    for module in _modules(stage):
        if isinstance(module.tokenizer, RecurrentTokenizer):
            nn.init.orthogonal_(module.tokenizer.filters.weight, gain=module.tokenizer.filters.weight.shape[1] ** 0.5)
        elif hasattr(module.tokenizer, 'filters'):
            nn.init.orthogonal_(module.tokenizer.filters.weight)


def projector_logit_norm(stage: VTStage) -> None:
    """A batch norm of the projector's logits, as the tokenizer's have."""
    for module in _modules(stage):
        if module.projector is not None:
            module.projector.softmax = nn.Sequential(nn.BatchNorm1d(16), module.projector.softmax)


def layer_norm_of_tokens(stage: VTStage) -> None:
    for module in _modules(stage):
        for part in (module.embed, module.transformer, getattr(module.projector, 'value', None)):
            for layer in part.modules() if part is not None else ():
                if isinstance(getattr(layer, 'norm', None), nn.BatchNorm2d):
                    layer.norm = TokenLayerNorm(layer.norm)


def projection_from_one(stage: VTStage) -> None:
    """The projection starts as large as the map that it is added to, and not at zero."""
    for module in _modules(stage):
        if module.projector is not None:
            nn.init.ones_(module.projector.value.norm.weight)


CHANGES: Dict[str, Callable[[VTStage], None]] = {
    'tokens alone': tokens_alone, 'recurrence from one': recurrence_from_one, 'embedding': embedding,
    'competition': competition, 'sharp logits': sharp_logits, 'no logit norm': no_logit_norm,
    'orthogonal filters': orthogonal_filters, 'projector logit norm': projector_logit_norm,
    'layer norm of tokens': layer_norm_of_tokens, 'projection from one': projection_from_one}
VARIANTS = [RESNET, 'today', *OPTIONS, *CHANGES]


def change(model: nn.Module, variant: str) -> nn.Module:
    """Make the changes of a variant, those that are no options."""
    for name in variant.split('+'):
        if name in CHANGES:
            CHANGES[name](model.vt_stage)
    return model


def options_of(variant: str) -> dict:
    """Options of the model that a variant has."""
    return {k: v for name in variant.split('+') for k, v in OPTIONS.get(name, {}).items()}


def create(task: str, variant: str) -> nn.Module:
    """The model of a task."""
    if task == 'photographs':
        if variant == RESNET:
            return give_small_stem(ResNet(BasicBlock, (1, 1, 1, 1), channels=(32, 48, 96, 128), num_classes=10))
        model = timm.create_model(
            'test_vt_resnet', num_classes=10, layers=(1, 1, 1, MODULES), **options_of(variant))
        return change(give_small_stem(model), variant)
    trunk = {**ablations.TRUNK, 'layers': (1, 1, 1, 1 if variant == RESNET else MODULES)}
    if variant == RESNET:
        model = ResNet(channels=(*ablations.VT['channels'], ablations.VT['feature_dim']), **trunk)
    else:
        model = change(timm.create_model('test_vt_resnet', **trunk, **ablations.VT, **options_of(variant)), variant)
    model.maxpool = nn.Identity()
    return model


def load(task: str, data_dir: Path, pictures: int) -> Tuple[Callable, torch.Tensor, Callable, torch.Tensor]:
    """How to pick training and test pictures by their indices, and their classes."""
    if task == 'photographs':
        data = load_cifar(data_dir)
        (x, y), (x_test, y_test) = data['train'], data['test']
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(123))[:pictures]
        x, y = x[chosen], y[chosen]
        return lambda i, g: normalise(crop_and_flip(x[i], g)), y, lambda i: normalise(x_test[i]), y_test
    data = ablations.load_data()
    (x, y), (x_test, y_test) = data['train'], data['test']
    return lambda i, g: x[i], y, lambda i: x_test[i], y_test


def how_alike(model: nn.Module, x: torch.Tensor) -> List[dict]:
    """How alike the tokens of each module are, on average over pictures."""
    if not hasattr(model, 'vt_stage'):
        return []
    return [{
        'correlation': None if record.attention is None else attention_correlation(record.attention).mean().item(),
        'cosine': token_cosine(record.tokens).mean().item(), 'rank': effective_rank(record.tokens).mean().item(),
    } for record in capture_tokens(model, x)]


def train(
        task: str, variant: str, seed: int, epochs: int, pictures: int, precision: str, data_dir: Path, work_dir: Path,
) -> dict:
    """Train a variant; its test accuracy is that after the last epoch."""
    torch.set_num_threads(1)
    pick, classes, pick_test, test_classes = load(task, data_dir, pictures)
    torch.manual_seed(seed)
    model = create(task, variant).to(memory_format=torch.channels_last)
    if task == 'photographs':
        optimizer = create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=5e-4, momentum=0.9)
        batch_size = 128
    else:
        optimizer = create_optimizer_v2(model, 'adamw', lr=ablations.LR, weight_decay=ablations.WEIGHT_DECAY)
        batch_size = ablations.BATCH
    state = work_dir / f'{task}_{variant}_{seed}_{epochs}_{pictures}_{precision}.safetensors'.replace(' ', '_')
    start = time.process_time()
    at_start = how_alike(model, pick_test(torch.arange(64)))
    loss_of = partial(cross_entropy, autocast=None if precision == 'float32' else getattr(torch, precision))
    history = fit(model, pick, classes, optimizer, epochs, batch_size, seed, state, loss_of)
    result = {
        'task': task, 'variant': variant, 'seed': seed, 'epochs': epochs, 'pictures': len(classes),
        'precision': precision, 'loss': [loss for loss, _ in history],
        'test': accuracy(model, pick_test(torch.arange(len(test_classes))), test_classes, batch_size=500),
        'at_start': at_start, 'tokens': how_alike(model, pick_test(torch.arange(256))),
        'parameters': sum(p.numel() for p in model.parameters()), 'cpu_seconds': round(time.process_time() - start)}
    state.unlink()
    return result


def _schedule(run: dict) -> tuple:
    return run['task'], run['epochs'], run['pictures'], run['precision']


def report(runs: List[dict], environment: str) -> str:
    """The result as Markdown."""
    lines = [
        '# Variants of the VT module', '', f'Command: `python benchmarks/design.py --data-dir DIR`. {environment}', '',
        'Test accuracy after the last epoch in percent, each seed and their mean; loss of the last epoch; rank of the '
        'tokens of each module after training. CIFAR-10 as JPEG files, which is not the official data. Rows of '
        "0.1's module are of the script at commit d7dbd5c, before the module changed."]
    for schedule in sorted({_schedule(r) for r in runs}):
        task, epochs, pictures, precision = schedule
        lines += [
            '', f'## {task}, {epochs} epochs of {pictures}, {precision}', '',
            '| variant | parameters, M | test accuracy | each seed | loss | rank of the tokens |', f'|{"---|" * 6}']
        mine = [r for r in runs if _schedule(r) == schedule]
        for variant in dict.fromkeys([*VARIANTS, *(r['variant'] for r in mine)]):
            same = sorted((r for r in mine if r['variant'] == variant), key=lambda r: r['seed'])
            if same:
                lines.append(_row(variant, same))
    return '\n'.join([*lines, ''])


def _row(variant: str, runs: List[dict]) -> str:
    ranks = [statistics.mean(ranks) for ranks in zip(*([t['rank'] for t in r['tokens']] for r in runs))]
    cells = (
        variant, f'{runs[0]["parameters"] / 1e6:.2f}', f'{statistics.mean(r["test"] for r in runs):.1f}',
        ', '.join(f'{r["test"]:.1f}' for r in runs), f'{statistics.mean(r["loss"][-1] for r in runs):.3f}',
        ', '.join(f'{rank:.1f}' for rank in ranks))
    return f'| {" | ".join(cells)} |'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True, help='folder of CIFAR-10 as JPEG files')
    parser.add_argument('--work-dir', type=Path, default=Path('design_runs'), help='folder for unfinished runs')
    parser.add_argument('--tasks', nargs='+', default=['photographs', 'sums'], choices=['photographs', 'sums'])
    parser.add_argument('--variants', nargs='+', default=VARIANTS, metavar='NAME')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    parser.add_argument('--epochs', type=int, default=6)
    parser.add_argument('--pictures', type=int, default=20000, help='training photographs (default: %(default)s)')
    parser.add_argument('--precision', default='float32', choices=['float32', 'bfloat16'])
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, one thread each (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write')
    args = parser.parse_args()
    unknown = {name for v in args.variants for name in v.split('+')} - {*CHANGES, *OPTIONS, RESNET, 'today'}
    if unknown:
        parser.error(f'--variants must be of {", ".join([RESNET, "today", *OPTIONS, *CHANGES])}, got {min(unknown)!r}')
    args.work_dir.mkdir(parents=True, exist_ok=True)
    log = args.out / 'design.json'
    runs = read_runs(log)
    machine = environment()
    done = {(r['task'], r['variant'], r['seed'], *_schedule(r)[1:]) for r in runs}
    if 'photographs' in args.tasks:
        load_cifar(args.data_dir)  # before processes do so at the same time
    jobs = []
    for task in args.tasks:
        pictures = args.pictures if task == 'photographs' else ablations.TRAIN_IMAGES
        jobs += [
            (task, variant, seed, args.epochs, pictures, args.precision, args.data_dir, args.work_dir)
            for seed in args.seeds for variant in args.variants
            if (task, variant, seed, args.epochs, pictures, args.precision) not in done]
    run_all(train, jobs, runs, log, machine, args.jobs, report)
    print(report(runs, machine))


if __name__ == '__main__':
    main()
