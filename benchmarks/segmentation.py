"""VT-FPN against the panoptic FPN: same encoder, recipe, data and order of images.

    python benchmarks/segmentation.py digits
    python benchmarks/segmentation.py camvid --data-dir CAMVID

trains both by the shipped recipe of that name for three seeds, and writes segmentation_digits or camvid (.md, .json and
.png) in benchmarks/results. The measure is the mean IoU after the last iteration on images that decided nothing.

`digits` composes images of scikit-learn's digits on textured backgrounds (`vt_zoo.data.composed_digits`); its
held-out images show scans that no training image shows. `camvid` reads CamVid in the layout `folder`, with 11 classes,
as the SegNet tutorial divides it: 367 road scenes of 480x360 to train on, 233 to test on.

Two runs at a time, one thread each. A run that was killed goes on where it was.
"""
import argparse
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np
import segmentation_models_pytorch
import torch
from harness import mean_and_spread, peak_bytes, read_runs, reset_peak, run_all, versions
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch.utils.data import DataLoader

from vt_zoo.data.composed_digits import write_composed_digits
from vt_zoo.files import whole
from vt_zoo.segmentation.datasets import load_dataset
from vt_zoo.segmentation.metrics import evaluate
from vt_zoo.segmentation.predict import palette, predict_classes
from vt_zoo.segmentation.settings import ARCHITECTURES, SegmentSettings
from vt_zoo.segmentation.train import train_segmenter
from vt_zoo.segmentation.transforms import eval_transform
from vt_zoo.weights import load

RESULTS = Path(__file__).parent / 'results'
NAMES = {'vt_fpn': 'VT-FPN', 'panoptic_fpn': 'panoptic FPN'}
JOBS = 2


@dataclass
class Task:
    """A recipe and the data that it is for."""
    file: str  # of the results
    title: str
    about: str
    split: str  # that is measured
    pictures: int
    width: float  # of one in inches


TASKS = {
    'digits': Task(
        'segmentation_digits', 'composed digits',
        "1200 training and 300 held-out images of 64x64: scikit-learn's handwritten digits on textured backgrounds, 10 "
        'digits and background', 'val', 8, 1.25),
    'camvid': Task(
        'camvid', 'CamVid',
        'Road scenes of 480x360 (G. Brostow, J. Fauqueur, R. Cipolla, 2009), 11 classes, 367 to train on and 233 to '
        'test on, as in the SegNet tutorial; images as JPEG. Whole pictures at test, pixels without a label left out',
        'test', 4, 3),
}


def run(name: str, arch: str, seed: int, iterations: int, data_dir: Path, work_dir: Path) -> Dict:
    """Train one model and return its measures; in a process of its own."""
    torch.set_num_threads(1)
    settings = SegmentSettings.read(name, {'arch': arch, 'seed': seed, 'iterations': iterations})
    out = work_dir / f'{arch}_{seed}_{iterations}'
    start = time.process_time()
    unfinished = (out / 'checkpoint.safetensors').exists()
    reset_peak()
    result = train_segmenter(
        data_dir, out, settings, resume=unfinished, overwrite=not unfinished, device='cpu', progress=False)
    peak, seconds = peak_bytes(), time.process_time() - start
    loaded = load(result.last_dir)
    mean, std = loaded.preprocessing['mean'], loaded.preprocessing['std']
    data = load_dataset(settings.format, data_dir, TASKS[name].split, eval_transform(mean, std))
    measured = evaluate(loaded.model, DataLoader(data), len(loaded.classes), loaded.eval_size)
    return {
        'arch': arch, 'seed': seed, 'iterations': iterations, 'miou': 100 * measured.miou,
        'iou': dict(zip(loaded.classes, (100 * v for v in measured.iou))),
        'pixel_accuracy': 100 * measured.pixel_accuracy, 'val_miou': 100 * result.last.miou,
        'cpu_seconds': None if unfinished else round(seconds), 'peak_mib': round(peak / 2 ** 20)}


def report(name: str, runs: List[Dict], environment: str) -> str:
    """The result as Markdown."""
    task, settings = TASKS[name], SegmentSettings.read(name)
    words = name if name == 'digits' else f'{name} --data-dir DIR'
    lines = [
        f'# VT-FPN against the panoptic FPN on {task.title}', '',
        f'Command: `python benchmarks/segmentation.py {words}`. {environment}', '',
        f'{task.about}. Recipe `{name}` ({settings.encoder_name} from random weights, batches of {settings.batch_size} '
        f'crops of {"x".join(map(str, settings.crop_size))}, precision {settings.precision}). Percent after the last '
        'iteration, mean ± standard deviation over seeds. CPU seconds and the most memory are those of a whole run, '
        'evaluation included.', '',
        '| model | iterations | mean IoU | of each seed | pixel accuracy | CPU seconds | most memory, MiB |',
        f'|{"---|" * 7}']
    groups = {
        (arch, n): sorted((r for r in runs if (r['arch'], r['iterations']) == (arch, n)), key=lambda r: r['seed'])
        for n in sorted({r['iterations'] for r in runs}) for arch in ARCHITECTURES}
    groups = {key: group for key, group in groups.items() if group}
    for (arch, iterations), group in groups.items():
        seconds = [r['cpu_seconds'] for r in group if r['cpu_seconds']]
        cells = (
            NAMES[arch], iterations, mean_and_spread([r['miou'] for r in group]),
            ', '.join(f'{r["miou"]:.2f}' for r in group), mean_and_spread([r['pixel_accuracy'] for r in group]),
            f'{statistics.median(seconds):.0f}' if seconds else '',
            f'{statistics.median(r["peak_mib"] for r in group):.0f}')
        lines.append(f'| {" | ".join(map(str, cells))} |')
    classes = list(runs[0]['iou'])
    lines += ['', f'| IoU of a class, mean over seeds | {" | ".join(classes)} |', '|---' * (len(classes) + 1) + '|']
    for (arch, iterations), group in groups.items():
        means = (statistics.mean(r['iou'][name] for r in group) for name in classes)
        lines.append(f'| {NAMES[arch]}, {iterations} | {" | ".join(f"{v:.1f}" for v in means)} |')
    return '\n'.join([
        *lines, '', 'The paper has +0.22 and -0.01 points for VT-FPN on COCO-stuff, +0.35 and +0.23 on LIP (Tables 9 '
        'and 10), unverified.', '', f'![Images, their masks and the predictions of both]({task.file}.png)', ''])


def draw(name: str, models: Dict[str, Path], data_dir: Path, path: Path) -> None:
    """Draw images spread over the part that is measured, their masks, and what models make of them."""
    task = TASKS[name]
    data = load_dataset('folder', data_dir, task.split)
    loaded = {label: load(folder) for label, folder in models.items()}
    colors = np.array([*palette(len(data.classes)), *[(0, 0, 0)] * (256 - len(data.classes))], dtype=np.uint8)
    if name == 'digits':
        colors[0] = 235
    indices = [len(data) * i // task.pictures for i in range(task.pictures)]
    rows = [_pictures(data[i], loaded, colors) for i in indices]
    height = task.width * rows[0]['image'].height / rows[0]['image'].width
    figure = Figure(figsize=(task.width * task.pictures + 0.7, height * len(rows[0]) + 0.8), layout='constrained')
    axes = figure.subplots(len(rows[0]), task.pictures)
    for column, pictures in zip(axes.T, rows):
        for ax, (label, picture) in zip(column, pictures.items()):
            ax.imshow(picture)
            ax.set(xticks=[], yticks=[])
            if ax in axes[:, 0]:
                ax.set_ylabel(label)
    handles = [
        Patch(facecolor=colors[i] / 255, edgecolor='black', label=label) for i, label in enumerate(data.classes)]
    figure.legend(handles=handles, loc='outside lower center', ncols=len(handles), fontsize=8, handlelength=1)
    with whole(path) as new:
        figure.savefig(new, dpi=90)


def _pictures(sample: Tuple[Image.Image, np.ndarray], models: Dict, colors: np.ndarray) -> Dict[str, Image.Image]:
    image, mask = sample
    made = {label: predict_classes(model, image) for label, model in models.items()}
    return {'image': image, **{k: Image.fromarray(colors[v]) for k, v in {'mask': mask, **made}.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=[*TASKS])
    parser.add_argument('--data-dir', type=Path, help='folder of CamVid, for camvid')
    parser.add_argument('--arch', nargs='+', default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--iterations', type=int, help="(default: the recipe's)")
    parser.add_argument('--work-dir', type=Path, help='folder of models (default: segmentation_TASK)')
    parser.add_argument('--jobs', type=int, default=JOBS, help='runs at a time, one thread each (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write results to')
    args = parser.parse_args()
    task = TASKS[args.task]
    work_dir = args.work_dir or Path(f'segmentation_{args.task}')
    work_dir.mkdir(parents=True, exist_ok=True)
    data_dir = work_dir / 'data' if args.task == 'digits' else args.data_dir
    if data_dir is None:
        parser.error('--data-dir must name a folder for camvid')
    if args.task == 'digits' and not data_dir.exists():
        write_composed_digits(data_dir, 1200, 300, 64)
    iterations = args.iterations or SegmentSettings.read(args.task).iterations
    log = args.out / f'{task.file}.json'
    runs = read_runs(log)
    done = {(r['arch'], r['seed'], r['iterations']) for r in runs}
    jobs = [
        (args.task, arch, seed, iterations, data_dir, work_dir)
        for seed in args.seeds for arch in args.arch if (arch, seed, iterations) not in done]
    environment = (
        f'{platform.machine()}, {os.cpu_count()} CPU cores, one thread a run, {versions()}, '
        f'segmentation_models_pytorch {segmentation_models_pytorch.__version__}.')
    run_all(run, jobs, runs, log, environment, args.jobs, lambda runs, words: report(args.task, runs, words))
    print(report(args.task, runs, environment))
    models = {NAMES[arch]: work_dir / f'{arch}_{args.seeds[0]}_{iterations}' / 'last' for arch in args.arch}
    draw(args.task, models, data_dir, args.out / f'{task.file}.png')


if __name__ == '__main__':
    main()
