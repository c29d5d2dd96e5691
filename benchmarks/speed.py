"""Speed and memory of VT modules beside what they replace.

    OMP_NUM_THREADS=2 python benchmarks/speed.py

measures parts and writes each to a page of benchmarks/results, beside the parts that are there already:

    stage, training, growth   last stages and training steps, VT against layer4    speed
    photographs               training steps of cifar10.py                         speed
    models                    whole models, beside ResNets and others              speed
    gpu                       whole models and training steps on a GPU             speed
    predict                   `vt-zoo predict` and timm's inference.py             speed
    necks                     the VT neck against the FPN module                   segmentation_speed
    segmenters                training steps, VT-FPN against the panoptic FPN      segmentation_speed

`gpu` and `predict` are measured only where `--parts` names them, and `predict` needs `--scripts`. What is compared
takes turns in one process. Memory is that of one pass, on the CPU in a process of its own, as Linux tells it, on a GPU
as torch does.
"""
import argparse
import copy
import ctypes
import multiprocessing
import os
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Callable, List, Optional, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from ablations import RESNET
from cifar import BATCH
from cifar10 import BASE
from cifar10 import create as create_for_photographs
from harness import (
    at_least,
    machine,
    peak_bytes,
    read_runs,
    reset_peak,
    speed_up,
    table,
    time_in_turns,
    versions,
    write_runs,
)
from matplotlib.figure import Figure
from PIL import Image
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from tqdm import tqdm

import vt_zoo
from vt_zoo.analysis.cost import count_multiply_adds
from vt_zoo.data.digits import write_digits
from vt_zoo.files import whole
from vt_zoo.inference import fold_norms
from vt_zoo.models.vt_fpn import FPNNeck, VTNeck
from vt_zoo.segmentation import SegmentSettings, create_segmenter
from vt_zoo.segmentation.settings import ARCHITECTURES
from vt_zoo.training.loop import to_channels_last

RESULTS = Path(__file__).parent / 'results'
RESNETS, TRAINED, REFERENCE = ('resnet18', 'resnet34', 'resnet50', 'resnet101'), ('resnet18', 'resnet50'), 'resnet50'
RIVALS = (
    'seresnet50', 'gcresnet50t', 'botnet26t_256', 'lambda_resnet26t', 'convnext_tiny', 'fastvit_sa12',
    'vit_small_patch16_224', 'deit_base_patch16_224')
COMPILED = ('vt_resnet18', 'resnet18', 'vt_resnet50', 'resnet50', 'convnext_tiny')  # compiling takes minutes
COMPILE = 'float32 compile'
MODES, BATCHES, TRAINING_BATCHES = ('float32', 'bfloat16', COMPILE), (1, 16), (16, 32)
GPU_MODES, GPU_BATCH = ('float32', 'bfloat16'), 128
SIZE, SIZES, TOKENS = 224, (224, 384, 512, 768, 1024), (16, 32, 64, 128, 256)
CHANNELS, NECK_SIZE = (256, 512, 1024, 2048), 512  # of a ResNet-50's maps, at strides 4, 8, 16 and 32
CLASSES = 11  # of CamVid
FORMATS = {'NCHW': torch.contiguous_format, 'channels last': torch.channels_last}
PICTURES, PREDICTOR = 3000, 'test_vt_resnet'
MIB = 2 ** 20
BLUE, ORANGE, GREY = '#0072b2', '#d55e00', '#595959'


@dataclass(frozen=True)
class Job:
    """A pass of a model, its last stage or a neck, or a step of training one; `PREPARE` lists what there is."""
    what: str
    name: str
    mode: str = 'float32'
    batch: int = 1
    size: int = SIZE
    num_tokens: int = 0  # 0 for the model's own
    device: str = 'cpu'


def twin(name: str) -> str:
    """The VT-ResNet with a ResNet's trunk."""
    return name.replace('resnet', 'vt_resnet')


def image_size(name: str) -> int:
    """224, or the one size that a model can take."""
    cfg = timm.get_pretrained_cfg(name)
    return cfg.input_size[-1] if cfg.fixed_input_size else SIZE


def create(name: str, num_tokens: int = 0) -> nn.Module:
    """A model in eval mode whose batch norms are as different from the identity as trained ones."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{'num_tokens': num_tokens} if num_tokens else {}).eval()
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.2, 0.4)
    return model


@cache
def best_form(name: str, num_tokens: int = 0) -> nn.Module:
    """The form of a model that a user would run, in float32."""
    model = reparameterize_model(create(name, num_tokens))
    fold_norms(model)
    return model


def trunk_of(model: nn.Module) -> nn.Module:
    """Stem and stages 1 to 3."""
    return nn.Sequential(
        model.conv1, model.bn1, model.act1, model.maxpool, model.layer1, model.layer2, model.layer3)


class LastStage(nn.Module):
    """From the map of stage 3 to the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        model = self.model
        return model.forward_head(model.vt_stage(x)[1] if hasattr(model, 'vt_stage') else model.layer4(x))


def prepare_inference(job: Job) -> Callable[[], None]:
    """A pass of a model or its last stage, channels last."""
    dtype = getattr(torch, job.mode.split()[0])
    net = to_channels_last(copy.deepcopy(best_form(job.name, job.num_tokens)).to(job.device, dtype))
    x = torch.randn(job.batch, 3, job.size, job.size, dtype=dtype).to(memory_format=torch.channels_last)
    if job.what == 'stage':
        with torch.no_grad():
            x = trunk_of(net)(x)
        net = LastStage(net)
    context = torch.inference_mode
    if job.mode == COMPILE:
        torch._inductor.config.freezing = True
        net, context = torch.compile(net, dynamic=False), torch.no_grad  # which freezing is for

    def run() -> None:
        with context():
            net(x)
    return run


def training_step(
        model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, bfloat16: bool,
) -> Callable[[], None]:
    """A step of training on images and classes."""

    def run() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return run


def prepare_training(job: Job) -> Callable[[], None]:
    """A step of SGD on random images."""
    photographs = job.what == 'photographs'
    model = create_for_photographs(job.name) if photographs else timm.create_model(job.name)
    model = model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(job.batch, 3, job.size, job.size).to(memory_format=torch.channels_last)
    y = torch.randint(model.num_classes, (job.batch,))
    return training_step(model, optimizer, x, y, job.mode == 'bfloat16')


def prepare_neck(job: Job) -> Callable[[], None]:
    """A pass of a neck on random maps; in training also backward, to the maps too, as the encoder learns."""
    training, memory_format = job.what == 'neck training', FORMATS[job.mode]
    neck = nn.Sequential(FPNNeck(CHANNELS) if job.name == 'FPN module' else VTNeck(CHANNELS)).eval()
    if job.name.endswith('reduced'):
        neck = reparameterize_model(neck, inplace=True)
    neck = neck.to(memory_format=memory_format).train(training)
    maps = [
        torch.empty(job.batch, chs, job.size // stride, job.size // stride, memory_format=memory_format).normal_()
        .requires_grad_(training) for chs, stride in zip(CHANNELS, (4, 8, 16, 32))]

    def run() -> None:
        with torch.inference_mode(not training):
            levels = neck(maps)
        if training:
            sum(level.sum() for level in levels).backward()
    return run


def prepare_segmenter(job: Job) -> Callable[[], None]:
    """A step of the recipe `camvid` on random images and masks."""
    settings = SegmentSettings.read('camvid', {'arch': job.name, 'batch_size': job.batch})
    model = to_channels_last(create_segmenter(settings, CLASSES).train())
    optimizer = create_optimizer_v2(model, settings.opt, settings.lr, settings.weight_decay)
    x = torch.randn(job.batch, 3, *settings.crop_size)
    y = torch.randint(CLASSES, (job.batch, *settings.crop_size))
    return training_step(model, optimizer, x, y, True)


PREPARE = {
    'model': prepare_inference, 'stage': prepare_inference, 'training': prepare_training,
    'photographs': prepare_training, 'neck': prepare_neck, 'neck training': prepare_neck,
    'segmenter': prepare_segmenter}


def prepare(job: Job) -> Callable[[], None]:
    """All that a job needs, ready to run once and again."""
    torch.manual_seed(0)
    with torch.device(job.device):
        return PREPARE[job.what](job)


def gpu_clock() -> float:
    """Seconds, after all that a GPU was given to do is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


def time_jobs(jobs: List[Job], rounds: int) -> List[dict]:
    """Jobs with the seconds of each run.

    For one image the weights' way from memory counts, so there a turn begins with a run that is not timed: then they
    are where they would be had the model run alone.
    """
    torch._dynamo.reset()
    works = {job: prepare(job) for job in tqdm(jobs, 'prepare', leave=False)}
    first = jobs[0]
    desc = f'{first.what}, {first.mode}, batch {first.batch}, {first.size}'
    clock = time.perf_counter if first.device == 'cpu' else gpu_clock
    seconds = time_in_turns(works, rounds, warm_up=2, desc=desc, untimed=int(first.batch == 1), clock=clock)
    return [{**asdict(job), 'seconds': seconds[job]} for job in jobs]


def measure_peak(job: Job) -> int:
    """Bytes that one run needs at its peak beyond what it starts from, in a process that has run no other."""
    ctypes.CDLL(None).mallopt(-3, 2 ** 16)  # M_MMAP_THRESHOLD: freed blocks from 64 KiB up leave the process
    small = 'test_vt_resnet' if job.what in ('stage', 'training') else job.name
    prepare(replace(job, name=small, size=64, num_tokens=0))()  # loads the libraries' code
    run = prepare(job)
    reset_peak()
    before = peak_bytes()
    run()
    return peak_bytes() - before


def measure_gpu_peak(job: Job) -> int:
    """The same on a GPU, where torch counts."""
    prepare(job)()  # loads the libraries' code
    run = prepare(job)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def measure_peaks(jobs: List[Job]) -> List[int]:
    """Peaks of the jobs, on the CPU each in a new process."""
    if jobs[0].device == 'cuda':
        return [measure_gpu_peak(job) for job in jobs]
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['timm', 'vt_zoo', 'torch._dynamo'])
    with context.Pool(1, maxtasksperchild=1) as pool:
        return list(tqdm(pool.imap(measure_peak, jobs), 'memory', len(jobs), leave=False))


def stage_pairs() -> List[Tuple[Job, Job]]:
    """Last stages; ResNet-101's is ResNet-50's again and is not compiled."""
    return [
        (Job('stage', twin(name), mode, batch), Job('stage', name, mode, batch))
        for name, mode, batch in product(RESNETS, MODES, BATCHES) if (name, mode) != ('resnet101', COMPILE)]


def training_pairs() -> List[Tuple[Job, Job]]:
    """Training steps."""
    return [
        (Job('training', twin(name), batch=batch), Job('training', name, batch=batch))
        for name, batch in product(TRAINED, TRAINING_BATCHES)]


def photograph_pairs() -> List[Tuple[Job, Job]]:
    """Training steps of `cifar10.py`."""
    return [tuple(Job('photographs', name, 'bfloat16', BATCH, 32) for name in (BASE, RESNET))]


def gpu_pairs() -> List[Tuple[Job, Job]]:
    """Whole models, then training steps, of classifiers and of segmenters, on a GPU."""
    models = [('model', name, mode) for mode, name in product(GPU_MODES, RESNETS)]
    steps = [('training', name, 'bfloat16') for name in TRAINED]
    pairs = [tuple(Job(what, n, mode, GPU_BATCH) for n in (twin(name), name)) for what, name, mode in models + steps]
    return [tuple(replace(job, device='cuda') for job in pair) for pair in [*pairs, *segmenter_pairs()]]


def growth_pairs() -> List[Tuple[Job, Job]]:
    """Last stages by size of one image, then by number of tokens."""
    cases = [(size, TOKENS[0]) for size in SIZES] + [(SIZE, num_tokens) for num_tokens in TOKENS[1:]]
    return [
        (Job('stage', twin(REFERENCE), size=size, num_tokens=num_tokens), Job('stage', REFERENCE, size=size))
        for size, num_tokens in cases]


def neck_pairs() -> List[Tuple[Job, Job]]:
    """Necks in inference and, but for the reduced form, in training."""
    forms = (('neck', 'VT neck'), ('neck', 'VT neck, reduced'), ('neck training', 'VT neck'))
    return [
        (Job(what, name, mode, size=NECK_SIZE), Job(what, 'FPN module', mode, size=NECK_SIZE))
        for (what, name), mode in product(forms, FORMATS)]


def segmenter_pairs() -> List[Tuple[Job, Job]]:
    """Training steps of CamVid's recipe."""
    settings = SegmentSettings.read('camvid')
    return [tuple(
        Job('segmenter', arch, settings.precision, settings.batch_size, settings.crop_size[0])
        for arch in ARCHITECTURES)]


def measure_pairs(pairs: Callable[[], List[Tuple[Job, Job]]], memory: bool, args: argparse.Namespace) -> List[dict]:
    """A VT and what it replaces, one after the other."""
    records = []
    for jobs in pairs():
        peaks = [{'bytes': peak} for peak in measure_peaks(jobs)] if memory else [{}, {}]
        records += [{**record, **peak} for record, peak in zip(time_jobs(jobs, args.rounds), peaks)]
    return records


def measure_models(args: argparse.Namespace) -> List[dict]:
    """Whole models; those that are compared with each other are prepared together."""
    costs = {}
    for name in tqdm([*map(twin, RESNETS), *RESNETS, *RIVALS], 'forms'):
        form, size = copy.deepcopy(best_form(name)).to('meta'), image_size(name)
        costs[name] = {
            'parameters': sum(p.numel() for p in form.parameters()),
            'multiply_adds': count_multiply_adds(form, (3, size, size))}
    records = []
    for mode, batch in product(MODES, BATCHES):
        names = [name for name in costs if mode != COMPILE or name in COMPILED]
        records += time_jobs([Job('model', name, mode, batch, image_size(name)) for name in names], args.rounds)
    return [{**record, **costs[record['name']]} for record in records]


def measure_predict(args: argparse.Namespace) -> List[dict]:
    """Whole processes on handwritten digits, with the time of all CPUs."""
    shared = ['pictures', '--model', PREDICTOR, '--device', 'cpu', '--batch-size', '32', '--workers', '2']
    programs = {
        'vt-zoo predict': ['vt_zoo', 'predict', *shared, '--top', '1', '--csv'],
        'inference.py': [
            'vt_zoo.run', str(args.scripts.resolve() / 'inference.py'), *shared, '--pretrained', '--topk', '1',
            '--include-index', '--results-dir', '.', '--no-console-results']}
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(vt_zoo.__file__).parents[1])}
    records = {name: {'name': name, 'seconds': [], 'cpu_seconds': []} for name in programs}
    with TemporaryDirectory() as folder:
        write_digits(Path(folder, 'digits'))
        digits = sorted(Path(folder, 'digits').rglob('*.png'))
        Path(folder, 'pictures', 'all').mkdir(parents=True)
        for i in range(PICTURES):
            with Image.open(digits[i % len(digits)]) as image:
                image.resize((32, 32)).save(Path(folder, 'pictures', 'all', f'{i:06d}.png'))
        for _, (name, words) in tqdm([*product(range(args.rounds), programs.items())], 'runs'):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(
                [sys.executable, '-m', *words], cwd=folder, env=environment, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, check=True)
            records[name]['seconds'].append(time.perf_counter() - start)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            records[name]['cpu_seconds'].append(sum(after[:2]) - sum(before[:2]))
    return list(records.values())


def tabulate_pairs(records: List[dict]) -> List[str]:
    """Times and, where they were measured, peaks."""
    rows = []
    for own, base in zip(records[::2], records[1::2]):
        rows.append([
            own['what'], own['name'], base['name'], own['mode'], own['batch'], own['size'], own['num_tokens'] or '',
            *(f'{1000 * median(r["seconds"]):.2f}' for r in (own, base)),
            speed_up(base['seconds'], own['seconds'])])
        if 'bytes' in own:
            rows[-1] += [*(f'{r["bytes"] / MIB:.1f}' for r in (own, base)), f'{own["bytes"] / base["bytes"]:.2f}']
    columns = ('of', 'VT', 'beside', 'mode', 'batch', 'image', 'tokens', 'VT, ms', 'beside, ms', 'speed-up')
    memory = ('VT, MiB', 'beside, MiB', 'ratio') if 'bytes' in records[0] else ()
    return table((*columns, *memory), rows)


def tabulate_models(records: List[dict]) -> List[str]:
    """A table for each mode and batch, models by cost."""
    lines = ['']
    for mode, batch in dict.fromkeys((r['mode'], r['batch']) for r in records):
        of = {r['name']: r for r in records if (r['mode'], r['batch']) == (mode, batch)}
        rows = [
            (name, r['size'], f'{r["multiply_adds"] / 1e6:.0f}', f'{r["parameters"] / 1e6:.1f}',
             f'{batch / median(r["seconds"]):.1f}', speed_up(of[REFERENCE]['seconds'], r['seconds']))
            for name, r in sorted(of.items(), key=lambda item: item[1]['multiply_adds'])]
        lines += [f'{mode}, batch {batch}:', *table((
            'model', 'image', 'multiply-adds, M', 'parameters, M', 'images/s', f'times {REFERENCE}'), rows)]
    return lines


def tabulate_predict(records: List[dict]) -> List[str]:
    """Medians, and their ratio."""
    rows = [(r['name'], median(r['seconds']), median(r['cpu_seconds'])) for r in records]
    rows.append(('ratio', *(theirs / ours for ours, theirs in zip(rows[0][1:], rows[1][1:]))))
    return table(('program', 'seconds', 'CPU seconds'), ((n, f'{s:.2f}', f'{cpu:.2f}') for n, s, cpu in rows))


def draw_models(records: List[dict]) -> Figure:
    """Images a second of each model in float32, models by cost."""
    figure = Figure(figsize=(10, 5), dpi=90, layout='constrained')
    for ax, batch in zip(figure.subplots(1, len(BATCHES), sharey=True), BATCHES):
        of = sorted(
            (r for r in records if (r['mode'], r['batch']) == ('float32', batch)), key=lambda r: -r['multiply_adds'])
        colors = {r['name']: ORANGE if 'vt_' in r['name'] else BLUE if r['name'] in RESNETS else GREY for r in of}
        bars = ax.barh(
            [f'{r["name"]}, {r["multiply_adds"] / 1e9:.1f} G' for r in of],
            [batch / median(r['seconds']) for r in of], color=colors.values())
        ax.bar_label(bars, fmt='%.1f', padding=3)
        ax.set(title=f'float32, batch {batch}', xlabel='images a second')
        ax.margins(x=0.12)
    figure.supylabel('model and its multiply-adds')
    return figure


def draw_growth(records: List[dict]) -> Figure:
    """Time and memory of the last stage against size and tokens."""
    pairs = list(zip(records[::2], records[1::2]))
    figure = Figure(figsize=(8, 6), dpi=90, layout='constrained')
    axes = figure.subplots(2, 2)
    panels = {'time, ms': lambda r: 1000 * median(r['seconds']), 'peak memory, MiB': lambda r: r['bytes'] / MIB}
    for row, key, fixed, label in zip(
            axes, ('size', 'num_tokens'), ('num_tokens', 'size'), ('image, pixels a side', 'tokens')):
        of = [pair for pair in pairs if pair[0][fixed] == pairs[0][0][fixed]]
        x = [vt[key] for vt, _ in of]
        for ax, (title, value) in zip(row, panels.items()):
            ax.plot(x, [value(vt) for vt, _ in of], 'D-', color=ORANGE, label=f'last stage of {twin(REFERENCE)}')
            ax.plot(x, [value(base) for _, base in of], 'o--', color=BLUE, label=f'layer4 of {REFERENCE}')
            ax.set_xscale('log')
            ax.set_xticks(x, x)
            ax.minorticks_off()
            ax.set_ylim(bottom=0)
            ax.set(xlabel=label, title=title)
            ax.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=2)
    return figure


@dataclass(frozen=True)
class Part:
    """What is measured, and how its page shows it."""
    page: str
    heading: str
    text: str
    measure: Callable[[argparse.Namespace], List[dict]]
    tabulate: Callable[[List[dict]], List[str]] = tabulate_pairs
    rounds: int = 15
    picture: str = ''
    draw: Optional[Callable[[List[dict]], Figure]] = None


PARTS = {
    'stage': Part(
        'speed', 'The last stage',
        'From the map of stride 16 to the logits: VT modules and classifier against layer4, pooling and classifier of '
        'the same ResNet.',
        partial(measure_pairs, stage_pairs, False), rounds=30),
    'models': Part(
        'speed', 'Whole models',
        'Multiply-adds and parameters are those of the form that ran. Accuracy is not compared.',
        measure_models, tabulate_models, picture='speed.png', draw=draw_models),
    'training': Part(
        'speed', 'Training',
        'A step: forward, backward and SGD with momentum, on random images. Memory is what it needs at its peak beyond '
        'weights and images: activations, gradients and momentum.',
        partial(measure_pairs, training_pairs, True)),
    'photographs': Part(
        'speed', 'Training on photographs',
        'A step of `benchmarks/cifar10.py`, of which an epoch has 390. Memory as above.',
        partial(measure_pairs, photograph_pairs, True)),
    'growth': Part(
        'speed', 'Growth',
        'The last stage by size of the image, and by number of tokens. Memory is beyond weights and the incoming map.',
        partial(measure_pairs, growth_pairs, True), picture='speed_growth.png', draw=draw_growth),
    'gpu': Part(
        'speed', 'On a GPU',
        "Whole models in the form for inference, and training steps, the latter with autocast in bfloat16. In float32, "
        "convolutions may run in TF32, which is torch's default. Memory is beyond weights and images.",
        partial(measure_pairs, gpu_pairs, True)),
    'predict': Part(
        'speed', 'Many pictures',
        f'Whole processes on {PICTURES} pictures of 32x32, `{PREDICTOR}`, batches of 32, 2 workers, one thread for the '
        'model.',
        measure_predict, tabulate_predict, rounds=5),
    'necks': Part(
        'segmentation_speed', 'The VT neck and the FPN module',
        "The VT neck of the paper's configuration beside the FPN module, in float32, on maps of a ResNet-50 of one "
        "image. *Reduced* is what timm's `reparameterize_model` makes of it: the same outputs, for inference only. "
        'Memory is beyond weights and incoming maps; in training, gradients of the maps and of the weights are among '
        'it.',
        partial(measure_pairs, neck_pairs, True), rounds=30),
    'segmenters': Part(
        'segmentation_speed', 'Training steps of VT-FPN and the panoptic FPN',
        'Forward, backward and AdamW by the recipe `camvid`: ResNet-18 encoder, crops of 240x320. Memory is beyond '
        'weights and images: activations, gradients and the state of AdamW.',
        partial(measure_pairs, segmenter_pairs, True))}


def report(runs: List[dict]) -> str:
    """The parts of a page as Markdown."""
    lines = [
        '# Speed', '',
        'Times are medians of rounds in which what is compared takes turns; the speed-up is the median of the '
        "ratios in each round, in brackets their quartiles. For inference models are in timm's `reparameterize_model` "
        'form with batch norms folded into convolutions, channels last; *compile* is torch.compile with freezing, the '
        'rest is eager.', '']
    for run in runs:
        part = PARTS[run['part']]
        lines += [f'## {part.heading}', '', f'Command: `{run["command"]}`. {run["environment"]}.', '', part.text]
        lines += ['', f'![{part.heading}]({part.picture})'] if part.picture else []
        lines += part.tabulate(run['records'])
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [name for name in PARTS if name not in ('gpu', 'predict')]
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=default, help='what to measure')
    parser.add_argument('--rounds', type=at_least(2), help='timed runs of each; default: by part')
    parser.add_argument('--scripts', type=Path, help="folder with timm's inference.py, for the part predict")
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write')
    args = parser.parse_args()
    if 'predict' in args.parts and not (args.scripts and (args.scripts / 'inference.py').exists()):
        parser.error(f"predict needs --scripts, a folder with timm's inference.py, got {args.scripts}")
    if 'gpu' in args.parts and not torch.cuda.is_available():
        parser.error('gpu needs a GPU that torch finds')
    args.out.mkdir(parents=True, exist_ok=True)
    words = shlex.join(['benchmarks/speed.py', *sys.argv[1:]])
    environment = f'{machine()}, {versions()}'
    for name in args.parts:
        part = PARTS[name]
        records = part.measure(argparse.Namespace(rounds=args.rounds or part.rounds, scripts=args.scripts))
        gpu = [torch.cuda.get_device_name()] if name == 'gpu' else []
        log = args.out / f'{part.page}.json'
        kept = [run for run in read_runs(log) if run['part'] != name]
        command = f'OMP_NUM_THREADS={torch.get_num_threads()} python {words}'
        where = ', '.join([*gpu, environment])
        runs = [*kept, {'part': name, 'command': command, 'environment': where, 'records': records}]
        write_runs(log, sorted(runs, key=lambda run: list(PARTS).index(run['part'])), report)
        if part.draw:
            with whole(args.out / part.picture) as new:
                part.draw(records).savefig(new)


if __name__ == '__main__':
    main()
