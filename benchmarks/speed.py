"""Speed and memory of VT-ResNets beside ResNets and what a user would pick at like cost.

    OMP_NUM_THREADS=2 python benchmarks/speed.py

measures four parts, and writes benchmarks/results/speed.json after each and speed.md and the plots from it at the end:
the last stage against layer4 (`stage`), whole models (`models`), a training step (`training`), and how the last stage
grows with the image and the tokens (`growth`). `--parts` measures some of them again and keeps the rest.

Each model is in its best public form: after timm's `reparameterize_model`, and with batch norms folded into
convolutions. What is compared takes turns in one process, so that drift of the machine hits all alike. Memory is that
of one pass in a process of its own, asked of Linux. Where there is a CUDA device it is measured instead of the CPU,
into speed_cuda.*; that path was written without such a device at hand and is untested.
"""
import argparse
import copy
import ctypes
import json
import multiprocessing
import os
import re
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from harness import peak_bytes, reset_peak, versions
from speed_report import REFERENCE, twin, write_report
from timm.utils import reparameterize_model
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from vt_zoo.analysis.cost import count_multiply_adds
from vt_zoo.files import whole
from vt_zoo.inference import fold_norms

RESULTS = Path(__file__).parent / 'results'
RESNETS = ('resnet18', 'resnet34', 'resnet50', 'resnet101')
RIVALS = (
    'seresnet50', 'gcresnet50t', 'botnet26t_256', 'lambda_resnet26t', 'convnext_tiny', 'fastvit_sa12',
    'vit_small_patch16_224', 'deit_base_patch16_224')
COMPILED = ('resnet18', 'resnet50', 'convnext_tiny')  # compiling takes minutes
TRAINED = ('resnet18', 'resnet50')
CUDA = torch.cuda.is_available()
DEVICE = torch.device('cuda' if CUDA else 'cpu')
BATCHES = (1, 16, 64, 256) if CUDA else (1, 16)
MODES = ('float32', 'bfloat16', 'float32 contiguous', 'bfloat16 compile' if CUDA else 'float32 compile')
SIZE, SIZES = 224, (224, 384, 512, 768, 1024)
TOKENS = (16, 32, 64, 128, 256)
CPU_FLAGS = ('avx2', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'avx512_fp16', 'amx_bf16', 'amx_int8')


@dataclass(frozen=True)
class Job:
    """What is run: a whole model, its trunk alone, its last stage, that stage's matrix products, a training step."""
    what: str
    name: str
    mode: str
    batch: int
    size: int = SIZE
    num_tokens: int = 0  # 0 for the model's own


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
    """The form of a model that a user would run, in float32 on the CPU."""
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
        if hasattr(model, 'vt_stage'):
            return model.forward_head(model.vt_stage(x)[1])
        return model.forward_head(model.layer4(x))


class _ProductRecorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operands: List[Tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ('mm', 'bmm', 'addmm', 'baddbmm'):
            self.operands.append(args[-2:])
        elif name == 'convolution':  # 1x1, the only ones in a VT stage
            x, weight = args[:2]
            self.operands.append((x.flatten(2).transpose(1, 2).flatten(0, 1), weight.flatten(1).t()))
        return func(*args, **(kwargs or {}))


def bare_products(net: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """The matrix products of a pass, on the operands that they had in it, into memory that is there already."""
    with _ProductRecorder() as recorder, torch.no_grad():
        net(x)
    products = [(torch.mm if a.ndim == 2 else torch.bmm, a.detach(), b.detach()) for a, b in recorder.operands]
    products = [(product, a, b, product(a, b)) for product, a, b in products]

    def run() -> None:
        for product, a, b, out in products:
            product(a, b, out=out)
    return run


def prepare_training(job: Job) -> Callable[[], None]:
    """A step of SGD on random images."""
    model = timm.create_model(job.name).train().to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(job.batch, 3, job.size, job.size, device=DEVICE).to(memory_format=torch.channels_last)
    y = torch.randint(model.num_classes, (job.batch,), device=DEVICE)

    def run() -> None:
        with torch.autocast('cuda', torch.bfloat16) if CUDA else nullcontext():
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return run


def prepare(job: Job) -> Callable[[], None]:
    """All that a job needs, ready to run once and again."""
    if job.what == 'training':
        return prepare_training(job)
    torch.manual_seed(0)
    dtype = getattr(torch, job.mode.split()[0])
    memory_format = torch.contiguous_format if 'contiguous' in job.mode else torch.channels_last
    net = copy.deepcopy(best_form(job.name, job.num_tokens)).to(DEVICE, dtype)
    for parameter in net.parameters():
        if parameter.ndim == 4:  # Module.to would refuse the 3D convolutions of lambda_resnet26t
            parameter.data = parameter.data.to(memory_format=memory_format)
    x = torch.randn(job.batch, 3, job.size, job.size, device=DEVICE, dtype=dtype).to(memory_format=memory_format)
    if job.what in ('stage', 'products'):
        with torch.no_grad():
            x = trunk_of(net)(x)
        net = LastStage(net)
    elif job.what == 'trunk':
        net = trunk_of(net)
    if job.what == 'products':
        return bare_products(net, x)
    compiled = 'compile' in job.mode
    if compiled:
        torch._inductor.config.freezing = True
        net = torch.compile(net, dynamic=False, mode='reduce-overhead' if CUDA and job.batch == 1 else None)
    context = torch.no_grad if compiled else torch.inference_mode  # freezing is for no_grad

    def run() -> None:
        if compiled and CUDA:
            torch.compiler.cudagraph_mark_step_begin()
        with context():
            net(x)
    return run


def _synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def time_jobs(jobs: List[Job], rounds: int) -> List[dict]:
    """Seconds of each run of each job; the jobs take turns.

    For one image the weights' way from memory counts, so there a turn begins with a run that is not timed: then they
    are where they would be had the model run alone.
    """
    torch._dynamo.reset()
    runs, seconds = [prepare(job) for job in tqdm(jobs, 'prepare', leave=False)], [[] for _ in jobs]
    of = ', '.join(sorted({f'{job.what}, {job.mode}, batch {job.batch}, {job.size}' for job in jobs}))
    warm_up = 2 if jobs[0].batch == 1 else 1
    for i in tqdm(range(warm_up + rounds), of[:60]):
        for job, run, mine in zip(jobs, runs, seconds):
            if job.batch == 1:
                run()
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            if i >= warm_up:
                mine.append(round(time.perf_counter() - start, 7))
    return [{**asdict(job), 'seconds': mine} for job, mine in zip(jobs, seconds)]


def _peak_bytes() -> int:
    if CUDA:
        return torch.cuda.max_memory_allocated()
    return peak_bytes()


def measure_memory(job: Job) -> dict:
    """Bytes that one run needs at its peak beyond what it starts from, in a process that has run no other."""
    if not CUDA:
        ctypes.CDLL(None).mallopt(-3, 2 ** 16)  # M_MMAP_THRESHOLD: freed blocks from 64 KiB up leave the process
    prepare(replace(job, name=twin('test_resnet'), size=64, num_tokens=0))()  # loads the libraries' code
    run = prepare(job)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()
    before = _peak_bytes()
    run()
    _synchronize()
    return {**asdict(job), 'bytes': _peak_bytes() - before}


def measure_all_memory(jobs: List[Job]) -> List[dict]:
    """Peaks of the jobs, each in a new process."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['timm', 'vt_zoo', 'torch._dynamo'])
    with context.Pool(1, maxtasksperchild=1) as pool:
        return list(tqdm(pool.imap(measure_memory, jobs), 'memory', len(jobs)))


def about(name: str) -> dict:
    """What a model is, and that its best form is still the same model.

    Raises:
        RuntimeError: The form's outputs differ.
    """
    size, model, form = image_size(name), create(name), best_form(name)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(x)
        difference = float((form(x) - expected).abs().max() / expected.abs().max())
    if not difference < 1e-4:
        raise RuntimeError(f'the inference form of {name} differs from it by {difference:.1e} of the largest output')
    return {
        'what': 'about', 'name': name, 'size': size, 'difference': difference,
        'parameters': sum(p.numel() for p in form.parameters()),
        'multiply_adds': count_multiply_adds(copy.deepcopy(form).to('meta'), (3, size, size)),
        'norms_left': sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in form.modules())}


def measure_stage(args: argparse.Namespace) -> List[dict]:
    """Last stages; ResNet-101's is ResNet-50's again and is not compiled."""
    records = []
    for name in args.resnets:
        for mode in args.modes:
            if 'contiguous' in mode or (name == 'resnet101' and 'compile' in mode):
                continue
            for batch in BATCHES:
                jobs = [Job('stage', twin(name), mode, batch), Job('stage', name, mode, batch)]
                if 'compile' not in mode:
                    jobs.append(Job('products', twin(name), mode, batch))
                records += time_jobs(jobs, args.rounds or (60 if batch == 1 else 15))
    return records


def measure_models(args: argparse.Namespace) -> List[dict]:
    """Whole models, and the trunks of the ResNets with no last stage at all."""
    absent = [{'what': 'absent', 'name': name} for name in args.models if not timm.is_model(name)]
    names = [name for name in args.models if timm.is_model(name)]
    names = [n for name in names for n in ((twin(name), name) if name in args.resnets else (name,))]
    records = absent + [about(name) for name in tqdm(names, 'forms')]
    for mode in args.modes:
        chosen = [n for n in names if n in COMPILED or n in map(twin, COMPILED)] if 'compile' in mode else names
        for batch in BATCHES:
            jobs = [Job('model', name, mode, batch, image_size(name)) for name in chosen]
            if 'compile' not in mode:
                jobs += [Job('trunk', name, mode, batch) for name in args.resnets]
            records += time_jobs(jobs, args.rounds or (20 if batch == 1 else 8))
    return records + measure_all_memory([
        Job('model', name, args.modes[0], batch, image_size(name)) for name in names for batch in BATCHES])


def measure_training(args: argparse.Namespace) -> List[dict]:
    """Training steps, on a CUDA device in mixed precision."""
    records, mode = [], 'bfloat16 mixed' if CUDA else 'float32'
    for name in [name for name in args.resnets if name in TRAINED] or args.resnets[:1]:
        for batch in (256,) if CUDA else (16, 32):
            jobs = [Job('training', n, mode, batch) for n in (twin(name), name)]
            records += measure_all_memory(jobs) + time_jobs(jobs, args.rounds or 9)
    return records


def measure_growth(args: argparse.Namespace) -> List[dict]:
    """Last stages and the trunk, by size of one image and by number of tokens."""
    name = REFERENCE if REFERENCE in args.resnets else args.resnets[0]
    cases = [(size, TOKENS[0]) for size in SIZES] + [(SIZE, num_tokens) for num_tokens in TOKENS[1:]]
    records = []
    for size, num_tokens in cases:
        jobs = [Job('stage', twin(name), 'float32', 1, size, num_tokens), Job('stage', name, 'float32', 1, size)]
        records += time_jobs([*jobs, Job('trunk', name, 'float32', 1, size)], args.rounds or 15)
        records += measure_all_memory(jobs)
    return records


PARTS: Dict[str, Callable[[argparse.Namespace], List[dict]]] = {
    'stage': measure_stage, 'models': measure_models, 'training': measure_training, 'growth': measure_growth}


def machine() -> str:
    """The device and what decides its speed."""
    cpu = Path('/proc/cpuinfo').read_text()
    flags = set(re.search(r'^flags\s*:(.*)', cpu, re.M)[1].split())
    text = (
        f'{re.search(r"^model name.*: (.*)", cpu, re.M)[1]} ({" ".join(f for f in CPU_FLAGS if f in flags)}), '
        f'{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads')
    return f'{torch.cuda.get_device_name()}, {text}' if CUDA else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS), help='what to measure')
    parser.add_argument('--models', nargs='+', default=[*RESNETS, *RIVALS], help='beside the VT-ResNets of the ResNets')
    parser.add_argument('--modes', nargs='+', choices=MODES, default=list(MODES), help='memory is that in the first')
    parser.add_argument('--rounds', type=int, help='timed runs of each; default: by part and batch')
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write')
    args = parser.parse_args()
    args.resnets = [name for name in args.models if timm.is_model(twin(name)) and twin(name) != name]
    stem = 'speed_cuda' if CUDA else 'speed'
    path = args.out / f'{stem}.json'
    args.out.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in args.parts:
        start = time.time()
        records = PARTS[part](args)
        command = shlex.join(['python', 'benchmarks/speed.py', *sys.argv[1:]])
        results[part] = {
            'device': DEVICE.type, 'command': f'OMP_NUM_THREADS={torch.get_num_threads()} {command}',
            'machine': machine(), 'versions': versions(), 'minutes': (time.time() - start) / 60,
            'records': records}
        with whole(path) as new:
            new.write_text(json.dumps(results).replace('{"what"', '\n{"what"') + '\n')
        write_report(results, args.out / stem)
    print((args.out / f'{stem}.md').read_text())


if __name__ == '__main__':
    main()
