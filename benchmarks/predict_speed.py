"""Times `vt-zoo predict` beside timm's inference.py: whole processes, on the same pictures, model and batch.

    git clone https://github.com/huggingface/pytorch-image-models
    python benchmarks/predict_speed.py pytorch-image-models

prints the table of docs/speed.md. The programs take turns, on the CPU, with one thread for the model and as many
threads or processes that open pictures. That both name the same class of each picture is checked.
"""
import argparse
import csv
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Dict, List, Tuple

from harness import versions
from PIL import Image
from tqdm import tqdm

import vt_zoo
from vt_zoo.data.digits import write_digits

MODEL = 'test_vt_resnet'


def write_pictures(folder: Path, count: int, side: int) -> None:
    """Write handwritten digits as square pictures; they repeat where there are more than there are digits."""
    write_digits(folder / 'digits')
    digits = sorted((folder / 'digits').rglob('*.png'))
    (folder / 'pictures' / 'all').mkdir(parents=True)
    for i in range(count):
        with Image.open(digits[i % len(digits)]) as image:
            image.resize((side, side)).save(folder / 'pictures' / 'all' / f'{i:06d}.png')


def run(words: List[str], folder: Path) -> Tuple[float, float]:
    """Seconds on the clock, and of all CPUs, of a process with its children."""
    environment = {
        **os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(vt_zoo.__file__).parents[1])}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with (folder / 'out.csv').open('w') as out:
        subprocess.run(
            [sys.executable, *words], cwd=folder, env=environment, stdout=out, stderr=subprocess.DEVNULL, check=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def read_classes(path: Path, name: str, index: str) -> Dict[str, int]:
    """Index of the class of each picture."""
    with path.open(newline='') as f:
        return {Path(row[name]).name: int(row[index]) for row in csv.DictReader(f)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('scripts', type=Path, help="folder with timm's inference.py")
    add('--pictures', type=int, default=3000)
    add('--side', type=int, default=32, help='of a picture, in pixels')
    add('--batch-size', type=int, default=32)
    add('--workers', type=int, default=2)
    add('--rounds', type=int, default=5)
    args = parser.parse_args()
    batch, workers = str(args.batch_size), str(args.workers)
    programs = {
        'vt-zoo predict': [
            '-m', 'vt_zoo', 'predict', 'pictures', '--model', MODEL, '--device', 'cpu', '--batch-size', batch,
            '--workers', workers, '--top', '1', '--csv'],
        'inference.py': [
            '-m', 'vt_zoo.run', str(args.scripts.resolve() / 'inference.py'), '--data-dir', 'pictures', '--model',
            MODEL, '--pretrained', '--device', 'cpu', '-b', batch, '-j', workers, '--topk', '1', '--include-index',
            '--results-dir', '.', '--results-file', 'timm', '--no-console-results'],
    }
    times: Dict[str, List[Tuple[float, float]]] = {name: [] for name in programs}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pictures(folder, args.pictures, args.side)
        for _ in tqdm(range(args.rounds), desc='rounds'):
            for name, words in programs.items():
                times[name].append(run(words, folder))
                if name == 'vt-zoo predict':
                    ours = read_classes(folder / 'out.csv', 'image', 'index_1')
        if ours != read_classes(folder / 'timm.csv', 'filename', 'index') or len(ours) != args.pictures:
            raise RuntimeError('the programs do not name the same class of each picture')
    print(
        f'{args.pictures} pictures of {args.side}x{args.side}, `{MODEL}`, batches of {batch}, {workers} workers, one '
        f'thread for the model, medians of {args.rounds} runs in turns; {platform.machine()}, {os.cpu_count()} '
        f'cores, {versions()}\n')
    print('| program | seconds | CPU seconds |\n|---|---|---|')
    medians = {name: [median(values) for values in zip(*pairs)] for name, pairs in times.items()}
    for name, values in medians.items():
        print(f'| {name} | {values[0]:.1f} | {values[1]:.1f} |')
    ratios = [theirs / ours for ours, theirs in zip(*medians.values())]
    print(f'| ratio | {ratios[0]:.2f} | {ratios[1]:.2f} |')


if __name__ == '__main__':
    main()
