"""What training by the recipes costs: operations, memory, and the time of a step on the machine at hand.

    python benchmarks/training_cost.py

measures vt_resnet18 and vt_resnet50 (on a CUDA device where there is one, in mixed precision) and writes
benchmarks/results/training_cost.md. Operations are counted, and so is the memory of activations, by what autograd
keeps; only the step's time depends on the machine.
"""
import argparse
import platform
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import List

import timm
import torch
import yaml
from harness import versions
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, LogitDistillationTask
from tqdm import tqdm

from vt_zoo.analysis.cost import count_multiply_adds
from vt_zoo.files import whole
from vt_zoo.recipes import recipe_path

RESULTS = Path(__file__).parent / 'results'
MODELS = ('vt_resnet18', 'vt_resnet34', 'vt_resnet50', 'vt_resnet101')
MEASURED = ('vt_resnet18', 'vt_resnet50')
IMAGES = 1_281_167  # of ImageNet's training split
PLAIN, ADVANCED = (yaml.safe_load(recipe_path(name).read_text()) for name in ('plain', 'advanced'))
EPOCHS = {'plain': PLAIN['epochs'], 'advanced': ADVANCED['epochs'] + ADVANCED['warmup_epochs']}
TEACHER = ADVANCED['kd_model_name'].split('.')[0]
RATES = (10, 30, 100)  # sustained TFLOP/s for which hours are worked out
SIZE, STEPS = 224, 7


@dataclass
class Step:
    """A measured training step: median seconds, and operations an image."""
    model: str
    recipe: str
    batch: int
    seconds: float
    flops: float

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.flops * self.batch / self.seconds


@cache
def flops_of_an_image(model: str, recipe: str) -> float:
    """Operations (two a multiply-add) of an image: forward and twice that backward, and the teacher's forward."""
    own = 6 * count_multiply_adds(timm.create_model(model, device='meta'))
    if recipe == 'plain':
        return own
    return own + 2 * count_multiply_adds(timm.create_model(TEACHER, device='meta'))


def _kept_bytes(net: torch.nn.Module, batch: int) -> int:
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(torch.randn(batch, 3, SIZE, SIZE)).sum()  # noqa: F841  keeps what lies at the addresses
    return sum(kept.values())


def kept_bytes(model: str) -> int:
    """Bytes that a forward pass in float32 keeps for the backward pass, for each further image."""
    net = timm.create_model(model).train()
    return (_kept_bytes(net, 4) - _kept_bytes(net, 2)) // 2


def time_step(model: str, recipe: str, batch: int, device: torch.device) -> Step:
    """Median time of a training step on random images that are on the device already."""
    settings = PLAIN if recipe == 'plain' else ADVANCED
    common = {'criterion': LabelSmoothingCrossEntropy(settings['smoothing']), 'device': device, 'verbose': False}
    net = timm.create_model(model).to(device)
    if recipe == 'plain':
        task = ClassificationTask(net, **common)
    else:
        task = LogitDistillationTask(
            net, timm.create_model(TEACHER), task_loss_weight=settings['task_loss_weight'],
            temperature=settings['kd_temperature'], **common)
        task.setup_ema(decay=settings['model_ema_decay'])
    optimizer = create_optimizer_v2(net, settings['opt'], lr=1e-4, weight_decay=settings['weight_decay'])
    x = torch.randn(batch, 3, SIZE, SIZE, device=device)
    y = torch.randint(1000, (batch,), device=device)
    precision = torch.autocast('cuda', torch.bfloat16) if device.type == 'cuda' else nullcontext()
    seconds = []
    net.train()
    for step in range(STEPS + 2):
        start = time.perf_counter()
        with precision:
            loss = task(x, y)['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.update_ema(step=step)
        if device.type == 'cuda':
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return Step(model, recipe, batch, statistics.median(seconds[2:]), flops_of_an_image(model, recipe))


def report(steps: List[Step], device: torch.device) -> str:
    """The result as Markdown."""
    where = torch.cuda.get_device_name() if device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'
    lines = [
        '# What training costs', '',
        f'Command: `python benchmarks/training_cost.py`. {platform.machine()}, {where}, {versions()}.', '',
        '## Operations', '',
        f'Of all epochs over {IMAGES:,} images at {SIZE}x{SIZE}, two operations a multiply-add: forward, twice that '
        f'backward, and for the advanced recipe the forward pass of the teacher ({TEACHER}). Hours are those of one '
        'device that sustains the rate, which is far below the peak of its data sheet.', '',
        '| model | recipe | epochs | operations | ' + ' | '.join(f'{r} TFLOP/s' for r in RATES) + ' |',
        '|---' * (4 + len(RATES)) + '|']
    for model in MODELS:
        for recipe, epochs in EPOCHS.items():
            flops = flops_of_an_image(model, recipe) * IMAGES * epochs
            hours = ' | '.join(f'{flops / (r * 1e12) / 3600:,.0f} h' for r in RATES)
            lines.append(f'| {model} | {recipe} | {epochs} | {flops:.2e} | {hours} |')
    lines += [
        '', '## Memory', '',
        'What the forward pass keeps for the backward pass in float32, counted; mixed precision keeps half of most of '
        'it. Weights, gradients, the two averages of RMSProp and the moving average of the weights add 20 bytes a '
        "parameter; the teacher's weights and the libraries' workspaces come on top.", '',
        '| model | MiB an image | GiB for 256 images | GiB for weights and optimizer |', '|---|---|---|---|']
    for model in tqdm(MODELS, desc='memory'):
        kept = kept_bytes(model)
        state = 20 * sum(p.numel() for p in timm.create_model(model, device='meta').parameters())
        lines.append(f'| {model} | {kept / 2 ** 20:.1f} | {256 * kept / 2 ** 30:.1f} | {state / 2 ** 30:.2f} |')
    lines += [
        '', '## A step, measured here', '',
        f'Median of {STEPS} steps on random images; no data loading. The last columns are what the whole recipe would '
        'take at this rate.', '',
        '| model | recipe | batch | seconds a step | images a second | GFLOP/s | all epochs |', '|---' * 7 + '|']
    for s in steps:
        hours = s.seconds / s.batch * IMAGES * EPOCHS[s.recipe] / 3600
        lines.append(
            f'| {s.model} | {s.recipe} | {s.batch} | {s.seconds:.2f} | {s.batch / s.seconds:.1f} | '
            f'{s.rate / 1e9:,.0f} | {hours:,.0f} h |')
    return '\n'.join([*lines, ''])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()
    device = torch.device(args.device)
    jobs = [(model, recipe) for model in MEASURED for recipe in EPOCHS]
    steps = [time_step(*job, args.batch, device) for job in tqdm(jobs, desc='steps')]
    text = report(steps, device)
    with whole(RESULTS / 'training_cost.md') as new:
        new.write_text(text)
    print(text)


if __name__ == '__main__':
    main()
