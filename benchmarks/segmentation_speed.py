"""Time and memory of the FPN module and of the VT neck that replaces it, on the CPU.

    OMP_NUM_THREADS=2 python benchmarks/segmentation_speed.py

runs both on maps as a ResNet-50 makes them of an image of 512x512, the VT neck also in the reduced form that timm's
`reparameterize_model` makes of it, and writes benchmarks/results/segmentation_speed.md. Memory is asked of Linux.
"""
import argparse
import multiprocessing
import platform
import statistics
import time
from pathlib import Path
from typing import Dict, List, Tuple

import torch
import torch.nn as nn
from harness import peak_bytes, reset_peak, versions
from timm.utils import reparameterize_model
from tqdm import tqdm

from vt_zoo.files import whole
from vt_zoo.models.vt_fpn import FPNNeck, VTNeck

RESULTS = Path(__file__).parent / 'results'
CHANNELS = (256, 512, 1024, 2048)  # of a ResNet-50's maps, at strides 4, 8, 16 and 32
SIZE = 512
FORMATS = {'NCHW': torch.contiguous_format, 'channels last': torch.channels_last}
NECKS = ('FPN module', 'VT neck', 'VT neck, reduced')
WARM_UP = 3
PROCESSES = 5  # that measure a peak
MIB = 2 ** 20


def create(name: str, memory_format: torch.memory_format) -> nn.Module:
    """A neck in eval mode."""
    neck = nn.Sequential(FPNNeck(CHANNELS) if name == 'FPN module' else VTNeck(CHANNELS)).eval()
    if name.endswith('reduced'):
        neck = reparameterize_model(neck, inplace=True)
    return neck.to(memory_format=memory_format)


def create_maps(memory_format: torch.memory_format, size: int = SIZE) -> List[torch.Tensor]:
    """Random maps of an image of size x size, from fine to coarse."""
    return [
        torch.empty(1, chs, size // stride, size // stride, memory_format=memory_format).normal_()
        for chs, stride in zip(CHANNELS, (4, 8, 16, 32))]


def time_necks(memory_format: torch.memory_format, rounds: int) -> Dict[str, List[float]]:
    """Seconds of each inference of each neck, which take turns."""
    necks, maps = {name: create(name, memory_format) for name in NECKS}, create_maps(memory_format)
    seconds = {name: [] for name in NECKS}
    with torch.inference_mode():
        for _ in range(WARM_UP + rounds):
            for name, neck in necks.items():
                start = time.perf_counter()
                neck(maps)
                seconds[name].append(time.perf_counter() - start)
    return {name: s[WARM_UP:] for name, s in seconds.items()}


def measure_memory(job: Tuple[str, str, bool]) -> int:
    """Bytes that a pass needs at its peak beyond weights and maps, in a process that has done nothing before."""
    name, memory_format, training = job
    neck, maps = create(name, FORMATS[memory_format]), create_maps(FORMATS[memory_format])
    with torch.inference_mode():
        neck(create_maps(FORMATS[memory_format], 32))  # loads the libraries' code and starts their threads
    neck.train(training)
    for x in maps:
        x.requires_grad_(training)  # the encoder learns too
    reset_peak()
    before = peak_bytes()
    with torch.inference_mode(not training):
        levels = neck(maps)
        if training:
            sum(level.sum() for level in levels).backward()
    return peak_bytes() - before


def measure_all_memory() -> Dict[Tuple[str, str, bool], List[int]]:
    """Peaks of every neck, memory format and pass; the reduced form does not train. Forks, so it comes first."""
    jobs = [
        (name, memory_format, training) for training in (False, True) for memory_format in FORMATS for name in NECKS
        if not (training and name.endswith('reduced'))]
    with multiprocessing.get_context('fork').Pool(1, maxtasksperchild=1) as pool:
        peaks = list(tqdm(pool.imap(measure_memory, PROCESSES * jobs), 'memory', PROCESSES * len(jobs)))
    return {job: sorted(peaks[i::len(jobs)]) for i, job in enumerate(jobs)}


def _ratio(a: List[float], b: List[float]) -> str:
    low, median, high = statistics.quantiles([x / y for x, y in zip(a, b)], n=4)
    return f'{median:.2f} ({low:.2f} to {high:.2f})'


def _weight_mib(name: str) -> float:
    with torch.device('meta'):
        return sum(p.nbytes for p in create(name, torch.contiguous_format).parameters()) / MIB


def report(seconds: Dict[str, Dict[str, List[float]]], memory: Dict[Tuple[str, str, bool], List[int]]) -> str:
    """The result as Markdown."""
    rounds = len(seconds['NCHW'][NECKS[0]])
    lines = [
        '# Speed and memory of the VT neck', '',
        f'Command: `OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/segmentation_speed.py`. '
        f'{platform.machine()}, {torch.get_num_threads()} CPU threads, {versions()}.', '',
        "The FPN module and the VT neck of the paper's configuration in float32, on maps of a ResNet-50 of one image "
        f"of {SIZE}x{SIZE}. *Reduced* is what timm's `reparameterize_model` makes of the VT neck: the same outputs, "
        'for inference only.', '',
        '## Time of an inference', '',
        f'Medians of {rounds} rounds in which the necks take turns; how many times faster than the FPN module is the '
        'median of the ratios in each round (and their quartiles).', '',
        '| memory format | neck | ms | times faster than the FPN module |', '|---|---|---|---|']
    for memory_format, of_necks in seconds.items():
        for name, s in of_necks.items():
            ratio = '' if name == NECKS[0] else _ratio(of_necks[NECKS[0]], s)
            lines.append(f'| {memory_format} | {name} | {1000 * statistics.median(s):.1f} | {ratio} |')
    lines += [
        '', '## Peak memory', '',
        f'Memory at its peak beyond weights and incoming maps, median of {PROCESSES} processes (and the least and the '
        'most): of an inference, and of forward and backward in training. Among the latter are gradients of the maps '
        f'and of the weights, of these {_weight_mib(NECKS[0]):.0f} MiB in the FPN module and '
        f'{_weight_mib(NECKS[1]):.0f} MiB in the VT neck, whatever the size of image and batch.', '',
        '| pass | memory format | neck | MiB | of the FPN module |', '|---|---|---|---|---|']
    for (name, memory_format, training), peaks in memory.items():
        median, base = statistics.median(peaks), statistics.median(memory[NECKS[0], memory_format, training])
        share = '' if name == NECKS[0] else f'{100 * median / base:.0f} %'
        lines.append(
            f'| {"training" if training else "inference"} | {memory_format} | {name} | '
            f'{median / MIB:.0f} ({peaks[0] / MIB:.0f} to {peaks[-1] / MIB:.0f}) | {share} |')
    return '\n'.join([*lines, ''])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=30, help='timed inferences of each neck')
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write')
    args = parser.parse_args()
    memory = measure_all_memory()
    seconds = {
        name: time_necks(memory_format, args.rounds) for name, memory_format in tqdm(FORMATS.items(), desc='time')}
    text = report(seconds, memory)
    args.out.mkdir(parents=True, exist_ok=True)
    with whole(args.out / 'segmentation_speed.md') as new:
        new.write_text(text)
    print(text)


if __name__ == '__main__':
    main()
