"""VT-FPN against the panoptic FPN on a segmentation set of real handwriting: same encoder, recipe, data and order.

    python benchmarks/segmentation_digits.py

composes images of scikit-learn's digits on textured backgrounds (`vt_zoo.segmentation.composed_digits`), trains both by
the shipped recipe `digits` for three seeds, and writes benchmarks/results/segmentation_digits.md, .json and .png. The
measure is the mean IoU over held-out images, composed of scans that no training image shows, after the last iteration.
Two runs at a time, one thread each. A benchmark that was interrupted goes on after the last complete run.
"""
import argparse
import json
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Dict, List

import numpy as np
import segmentation_models_pytorch
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from tqdm import tqdm
from versions import versions

from vt_zoo.checkpoint import whole
from vt_zoo.segmentation.composed_digits import CLASSES, write_composed_digits
from vt_zoo.segmentation.datasets import load_dataset
from vt_zoo.segmentation.model_files import load_segmentation_model
from vt_zoo.segmentation.predict import palette, predict_classes
from vt_zoo.segmentation.settings import ARCHITECTURES, read_settings
from vt_zoo.segmentation.train import train

RESULTS = Path(__file__).parent / 'results'
TRAIN_IMAGES, VAL_IMAGES, SIZE = 1200, 300, 64
NAMES = {'vt_fpn': 'VT-FPN', 'panoptic_fpn': 'panoptic FPN'}
JOBS = 2


def run(arch: str, seed: int, iterations: int, work: str) -> Dict:
    """Train one model and return its measures; in a process of its own."""
    torch.set_num_threads(1)
    settings = read_settings('digits', {
        'arch': arch, 'seed': seed, 'iterations': iterations, 'eval_every': max(iterations // 4, 1)})
    out = Path(work) / f'{arch}_{seed}'
    start = time.process_time()
    unfinished = (out / 'checkpoint.safetensors').exists()
    result = train(
        Path(work) / 'data', out, settings, resume=unfinished, overwrite=not unfinished, device='cpu', progress=False)
    lines = (out / 'history.csv').read_text().splitlines()[1:]
    return {
        'arch': arch, 'seed': seed, 'miou': 100 * result.last.miou, 'iou': [100 * v for v in result.last.iou],
        'pixel_accuracy': 100 * result.last.pixel_accuracy,
        'history': [[float(v) for v in line.split(',')] for line in lines],
        'cpu_seconds': round(time.process_time() - start)}


def summary(runs: List[Dict], arch: str, key: str) -> List[float]:
    """Mean and standard deviation over the seeds."""
    values = [r[key] for r in runs if r['arch'] == arch]
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.]


def report(runs: List[Dict], iterations: int, command: str) -> str:
    """The result as Markdown."""
    seeds = sorted({r['seed'] for r in runs})
    vt, fpn = (summary(runs, arch, 'miou') for arch in ARCHITECTURES)
    lines = [
        '# VT-FPN against the panoptic FPN on composed digits', '',
        f'Command: `{command}`. {versions()}, segmentation_models_pytorch {segmentation_models_pytorch.__version__}; '
        f'{os.cpu_count()} CPU cores ({platform.machine()}), two runs at a time, one thread each.', '',
        f"{TRAIN_IMAGES} training and {VAL_IMAGES} held-out images of {SIZE}x{SIZE}: scikit-learn's handwritten digits "
        'on textured backgrounds, 10 digits and background. Recipe `digits` (ResNet-18 from random weights, '
        f'{iterations} iterations of 16 images). Percent, mean ± standard deviation over seeds '
        f'{", ".join(map(str, seeds))}, after the last iteration.', '',
        '| model | mean IoU | of the seeds | pixel accuracy | CPU seconds a run |', '|---|---|---|---|---|']
    for arch in ARCHITECTURES:
        (miou, spread), (accuracy, accuracy_spread) = (summary(runs, arch, k) for k in ('miou', 'pixel_accuracy'))
        of_seeds = ', '.join(f'{r["miou"]:.2f}' for r in runs if r['arch'] == arch)
        seconds = statistics.median(r['cpu_seconds'] for r in runs if r['arch'] == arch)
        lines.append(
            f'| {NAMES[arch]} | {miou:.2f} ± {spread:.2f} | {of_seeds} | {accuracy:.2f} ± {accuracy_spread:.2f} | '
            f'{seconds:.0f} |')
    verdict = 'at or above' if vt[0] >= fpn[0] else 'below'
    lines += [
        '', f'On these images VT-FPN is {verdict} the panoptic FPN: {vt[0] - fpn[0]:+.2f} points of mean IoU. The '
        'paper reports +0.22 and -0.01 points on COCO-stuff, +0.35 and +0.23 on LIP (Tables 9 and 10), unverified. The '
        'runs are short: both models still gain when they end, so this says which learns more in them, not more.', '',
        '| class | ' + ' | '.join(CLASSES) + ' |', '|---' * (len(CLASSES) + 1) + '|']
    for arch in ARCHITECTURES:
        iou = np.mean([r['iou'] for r in runs if r['arch'] == arch], axis=0)
        lines.append(f'| IoU, {NAMES[arch]} | ' + ' | '.join(f'{v:.1f}' for v in iou) + ' |')
    lines += ['', '![Held-out images, their masks and the predictions of both](segmentation_digits.png)', '']
    return '\n'.join(lines)


def draw(work: Path, path: Path, number: int = 8) -> None:
    """Draw held-out images, their masks, and what the models of the first seed make of them."""
    data = load_dataset('folder', work / 'data', 'val')
    models = {NAMES[arch]: load_segmentation_model(work / f'{arch}_0' / 'last') for arch in ARCHITECTURES}
    colors = np.array(palette(len(CLASSES)), dtype=np.uint8)
    colors[0] = 235
    figure = Figure(figsize=(1.25 * number + 0.7, 5.9), layout='constrained')
    axes = figure.subplots(2 + len(models), number)
    for column in range(number):
        image, mask = data[column]
        rows = {'image': np.asarray(image), 'mask': colors[mask]}
        rows.update({name: colors[predict_classes(loaded, image)] for name, loaded in models.items()})
        for ax, (name, pixels) in zip(axes[:, column], rows.items()):
            ax.imshow(Image.fromarray(pixels))
            ax.set(xticks=[], yticks=[])
            if column == 0:
                ax.set_ylabel(name)
    handles = [Patch(facecolor=colors[i] / 255, edgecolor='black', label=name) for i, name in enumerate(CLASSES)]
    figure.legend(handles=handles, loc='outside lower center', ncols=len(CLASSES), fontsize=8, handlelength=1)
    with whole(path) as new:
        figure.savefig(new, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--iterations', type=int, default=read_settings('digits').iterations)
    parser.add_argument('--work', type=Path, default=Path('segmentation_digits'), help='folder of data and models')
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write results to')
    args = parser.parse_args()
    if not (args.work / 'data').exists():
        args.work.mkdir(parents=True, exist_ok=True)
        write_composed_digits(args.work / 'data', TRAIN_IMAGES, VAL_IMAGES, SIZE)
    done = args.work / f'runs_{args.iterations}.json'
    runs = json.loads(done.read_text()) if done.exists() else []
    known = {(r['arch'], r['seed']) for r in runs}
    with ProcessPoolExecutor(JOBS, mp_context=get_context('spawn')) as pool:
        waiting = [
            pool.submit(run, arch, seed, args.iterations, str(args.work))
            for seed in args.seeds for arch in ARCHITECTURES if (arch, seed) not in known]
        for future in tqdm(as_completed(waiting), desc='runs', total=len(waiting)):
            runs.append(future.result())
            with whole(done) as new:
                new.write_text(json.dumps(runs))
            tqdm.write(f'{runs[-1]["arch"]}, seed {runs[-1]["seed"]}: {runs[-1]["miou"]:.2f}')
    runs = [r for r in runs if r['seed'] in args.seeds]
    runs.sort(key=lambda r: (ARCHITECTURES.index(r['arch']), r['seed']))
    args.out.mkdir(parents=True, exist_ok=True)
    text = report(runs, args.iterations, 'python benchmarks/segmentation_digits.py')
    print(text)
    with whole(args.out / 'segmentation_digits.md') as new:
        new.write_text(text)
    with whole(args.out / 'segmentation_digits.json') as new:
        new.write_text(json.dumps(runs, indent=1) + '\n')
    draw(args.work, args.out / 'segmentation_digits.png')


if __name__ == '__main__':
    main()
