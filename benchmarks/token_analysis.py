"""What the tokens of trained models see on photographs, beside random weights (section 6 of the paper, Figure 6).

    python benchmarks/token_analysis.py camvid --data-dir CAMVID --models camvid_runs
    python benchmarks/token_analysis.py cifar10 --data-dir CIFAR10 --models cifar10_runs

look at the VT-FPNs that `benchmarks/camvid.py` trained, on the test pictures of CamVid, and at the VTs that
`benchmarks/cifar10.py` trained, on those of CIFAR-10, and write token_analysis.md, .json and pictures in
benchmarks/results. The control are models with the random weights of the same seeds, the statistics of whose batch
norms were taken over training pictures.

Measures of each module (of VT-FPN: level), the median over the pictures where nothing else is said:

* entropy of A and of A-hat, as a share of that of uniform attention;
* foreground: attention of a pixel of a car, a person or a sign over that of another pixel, of the mean map of all
  tokens (1 for uniform attention; the paper's "28.3 % higher" is 1.283), the same with the masks of other pictures,
  which says what places alone give, and that of the token with the least and the most of it;
* information: bits that a token and the class of the pixel it looks at have in common, of the shares of the tokens'
  attention by class over all pictures; the same with the masks of other pictures. Pixels without a label do not count;
* used: number of tokens that the pixels of all pictures read in the projector, as the exponential of the entropy of
  their shares;
* rank: `effective_rank` of the tokens.
"""
import argparse
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from camvid import run_folder
from cifar import load_cifar, normalise
from cifar10 import BASE, EPOCHS, PRECISION, create, trained_weights
from harness import (
    add_device,
    at_least,
    complaints,
    environment,
    environments,
    mean_and_spread,
    read_runs,
    table,
    write_runs,
)
from matplotlib.figure import Figure
from tqdm import tqdm

from vt_zoo import load
from vt_zoo.analysis import (
    attention_entropy,
    capture_tokens,
    draw_token_attention,
    effective_rank,
    overlay_tokens,
    record_interaction,
    resize_attention,
)
from vt_zoo.files import whole
from vt_zoo.segmentation import SegmentSettings, create_segmenter, load_dataset
from vt_zoo.segmentation.predict import draw_overlay, predict_classes
from vt_zoo.segmentation.train import encoder_statistics
from vt_zoo.segmentation.transforms import eval_transform
from vt_zoo.weights.files import read_tensors

RESULTS = Path(__file__).parent / 'results'
FOREGROUND = 'sign_symbol', 'car', 'pedestrian', 'bicyclist'
PREPARED = 64  # training pictures for the statistics of random weights
SCENE = 155  # test picture that is drawn


class Pictures(NamedTuple):
    """Batches of prepared pictures (B, 3, H, W), with the class of each pixel (B, H, W) where they have masks."""
    train: torch.Tensor
    test: List[Tuple[torch.Tensor, Optional[torch.Tensor]]]
    classes: List[str]


class CamVid:
    """VT-FPN on road scenes."""
    name, part = 'VT-FPN on CamVid', 'level'

    def __init__(self, data_dir: Path, models: Path) -> None:
        self.data_dir, self.models, self.settings = data_dir, models, SegmentSettings.read('camvid')

    def folder(self, seed: int) -> Path:
        """Of a trained model."""
        return run_folder(self.models, 'vt_fpn', seed, trunk=False) / 'last'

    def file(self, seed: int) -> Path:
        """Of trained weights."""
        return self.folder(seed) / 'model.safetensors'

    def trained(self, seed: int) -> nn.Module:
        return load(self.folder(seed), 'segmentation').model

    def random(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return create_segmenter(self.settings, len(load_dataset('folder', self.data_dir, 'test').classes))

    def pictures(self) -> Pictures:
        transform = eval_transform(*encoder_statistics(self.settings))
        train, test = (load_dataset('folder', self.data_dir, part, transform) for part in ('train', 'test'))
        every = max(len(train) // PREPARED, 1)
        return Pictures(
            torch.stack([train[i][0] for i in range(0, len(train), every)]),
            [(image[None], mask[None]) for image, mask in test], test.classes)


class Cifar10:
    """The VT of `test_vt_resnet`'s sizes on CIFAR-10."""
    name, part = 'VT on CIFAR-10', 'module'

    def __init__(self, data_dir: Path, models: Path) -> None:
        self.data_dir, self.models = data_dir, models

    def file(self, seed: int) -> Path:
        """Of trained weights."""
        return trained_weights(self.models, {
            'variant': BASE, 'recipe': 'plain', 'seed': seed, 'epochs': EPOCHS, 'precision': PRECISION})

    def trained(self, seed: int) -> nn.Module:
        model = self.random(seed)
        model.load_state_dict(read_tensors(self.file(seed))[0])
        return model.eval()

    def random(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return create(BASE)

    def pictures(self) -> Pictures:
        data = load_cifar(self.data_dir)
        train, test = (normalise(data[part][0]) for part in ('train', 'test'))
        return Pictures(train[::max(len(train) // 1000, 1)], [(batch, None) for batch in test.split(100)], [])


TASKS = {'camvid': CamVid, 'cifar10': Cifar10}


@torch.no_grad()
def take_statistics(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Let batch norms take their statistics over images, as the mean over batches; then eval mode."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = None
    model.train()
    device = next(model.parameters()).device
    for batch in images.split(8):
        model(batch.to(device))
    return model.eval()


def cover(mask: torch.Tensor, number: int, size: Tuple[int, int]) -> torch.Tensor:
    """Share of each class (B, C, H, W) in the pixels of a map; pixels without a label are of none."""
    classes = F.one_hot(mask.where(mask < number, number), number + 1)[..., :number].permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(classes.float(), size)


def shares(attention: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
    """Share of each class in each token's attention (B, L, C), of what lies on pixels with a label."""
    found = torch.einsum('blhw,bchw->blc', attention, cover)
    return found / found.sum(-1, keepdim=True)


def ratio(share: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """Attention of a foreground pixel over that of another, of shares (..., ) and the area's share."""
    return (share / area) / ((1 - share) / (1 - area))


def information(share: torch.Tensor) -> float:
    """Bits that token and class have in common, of shares (L, C) and tokens that are equally likely."""
    joint = share / len(share)
    expected = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    return max((torch.xlogy(joint, joint / expected).nansum() / np.log(2)).item(), 0.)  # rounding may fall below


class Sums:
    """Measures of one module or level, added up over batches."""

    def __init__(self) -> None:
        self.values: Dict[str, List[torch.Tensor]] = {}
        self.shares: Dict[str, torch.Tensor] = {}
        self.area, self.reads, self.size = 0., 0., (0, 0)

    def add(self, name: str, values: torch.Tensor) -> None:
        self.values.setdefault(name, []).append(values.flatten())

    def add_masks(self, attention: Dict[str, torch.Tensor], areas: Dict[str, torch.Tensor], front: List[int]) -> None:
        """Maps A and A-hat, and the cover of the classes by the pictures' own masks and by those of others."""
        for name, maps in attention.items():
            for whose, covered in areas.items():
                share = shares(maps, covered)
                area = covered.sum((-2, -1)) / covered.sum((-3, -2, -1))[:, None]
                key = name if whose == 'own' else f'{name}, other masks'
                self.shares[key] = self.shares.get(key, 0.) + share.sum(0)
                within = share[..., front].sum(-1), area[:, front].sum(-1)
                self.add(f'foreground of {key}', ratio(within[0].mean(1), within[1]))
                if key == 'A':
                    each = ratio(within[0], within[1][:, None])
                    self.add('least token', each.amin(1))
                    self.add('most token', each.amax(1))
                    self.area = self.area + area.sum(0)

    def result(self) -> Dict[str, Any]:
        """Medians over the pictures; those without foreground have no ratio."""
        found: Dict[str, Any] = {name: torch.cat(v).nanmedian().item() for name, v in self.values.items()}
        for name, share in self.shares.items():
            found[f'information of {name}'] = information(share / share.sum(-1, keepdim=True))
        if self.shares:
            found['times its share of the pixels'] = (self.shares['A'] / self.area).tolist()
        if isinstance(self.reads, torch.Tensor):
            read = self.reads / self.reads.sum()
            found['used'] = torch.exp(-torch.xlogy(read, read).sum()).item()
        return {'height': self.size[0], 'width': self.size[1], **found}


def measure(model: nn.Module, pictures: Pictures, progress: str) -> List[Dict[str, Any]]:
    """The measures of each module or level."""
    device = next(model.parameters()).device
    front = [i for i, name in enumerate(pictures.classes) if name in FOREGROUND]
    sums: List[Sums] = []
    for i, (images, mask) in enumerate(tqdm(pictures.test, progress, leave=False)):
        records = capture_tokens(model, images.to(device))
        sums = sums or [Sums() for _ in records]
        other = pictures.test[(i + len(pictures.test) // 2) % len(pictures.test)][1]
        for index, (record, total) in enumerate(zip(records, sums)):
            total.size = tuple(record.attention.shape[-2:])
            maps = {'A': record.attention, 'A-hat': record_interaction(records, index)}
            for name, attention in maps.items():
                total.add(f'entropy of {name}', attention_entropy(attention, normalize=True).mean(1))
            total.add('rank', effective_rank(record.tokens))
            if record.projection is not None:
                total.reads = total.reads + record.projection.mean((-2, -1)).sum(0)
            if mask is not None:
                number = len(pictures.classes)
                masks = {'own': mask, 'other': other}
                areas = {whose: cover(m.to(device), number, total.size) for whose, m in masks.items()}
                total.add_masks(maps, areas, front)
    return [total.result() for total in sums]


def tabulate(runs: List[Dict[str, Any]], keys: Dict[str, str]) -> List[str]:
    """A table: a line a module or level, trained and random side by side."""
    heads, rows = ['of', 'map'], []
    for title in keys.values():
        heads += [title, 'random']
    for name in dict.fromkeys(run['models'] for run in runs):
        mine = [run for run in runs if run['models'] == name]
        for i, part in enumerate(mine[0]['parts']):
            cells = [f'{name}, {mine[0]["part"]} {i + 1}', f'{part["height"]}x{part["width"]}']
            for key in keys:
                for weights in ('trained', 'random'):
                    found = [run['parts'][i].get(key) for run in mine if run['weights'] == weights]
                    found = [value for value in found if value is not None]
                    cells.append(mean_and_spread(found) if found else '')
            rows.append(cells)
    return table(heads, rows)


def report(runs: List[Dict[str, Any]]) -> str:
    """The result as Markdown."""
    masks = [run for run in runs if run['models'] == CamVid.name]
    seeds = '; '.join(
        f'{name}: {", ".join(map(str, sorted({run["seed"] for run in runs if run["models"] == name})))}'
        for name in dict.fromkeys(run['models'] for run in runs))
    lines = [
        '# What the tokens of trained models see on photographs', '',
        'Commands: `python benchmarks/token_analysis.py camvid --data-dir DIR --models DIR`, and `cifar10` in its '
        f'place. {environments(runs)} Mean and standard deviation over the seeds ({seeds}), on the test pictures; the '
        'docstring of the benchmark defines each measure.', '', '## Entropy, use and rank',
        *tabulate(runs, {
            'entropy of A': 'entropy of A', 'entropy of A-hat': 'entropy of Â', 'used': 'used', 'rank': 'rank'})]
    if masks:
        lines += [
            '## Cars, people and signs', *tabulate(masks, {
                'foreground of A': 'A', 'foreground of A, other masks': 'A, other masks', 'foreground of A-hat': 'Â',
                'foreground of A-hat, other masks': 'Â, other masks', 'least token': 'least token',
                'most token': 'most token'}),
            '## Which token sees which class', *tabulate(masks, {
                'information of A': 'bits of A', 'information of A, other masks': 'other masks',
                'information of A-hat': 'bits of Â', 'information of A-hat, other masks': 'other masks'}),
            '![Attention of each token by class](token_analysis_classes.png)', '',
            'Seed 0: tokens of the coarsest level and the classes that VT-FPN finds, then tokens of all levels.', '',
            '![Where the tokens of the coarsest level look in a road scene](token_analysis_scene.png)', '',
            '![Where the tokens of each level look](token_analysis_levels.png)']
    return '\n'.join([*lines, ''])


def draw_classes(runs: List[Dict[str, Any]], path: Path) -> None:
    """Draw a heat map of tokens against classes, of the first seed: trained above, random below."""
    mine = [run for run in runs if run['models'] == CamVid.name and run['seed'] == 0]
    figure = Figure(figsize=(12, 6.4), layout='constrained')
    axes = figure.subplots(2, len(mine[0]['parts']), sharex=True, sharey=True)
    for run, row in zip(sorted(mine, key=lambda run: run['weights'] == 'random'), axes):
        for i, (part, ax) in enumerate(zip(run['parts'], row), 1):
            lift = np.log2(np.maximum(part['times its share of the pixels'], 1e-3))
            image = ax.imshow(lift, cmap='RdBu_r', vmin=-3, vmax=3, aspect='auto')
            ax.set_title(f'{run["weights"]}, level {i}', fontsize=10)
            ax.set_xticks(range(len(run['classes'])), run['classes'], rotation=90, fontsize=8)
            ax.set_yticks(range(len(lift)), range(1, len(lift) + 1))
    for ax in axes[:, 0]:
        ax.set_ylabel('token')
    bar = figure.colorbar(image, ax=axes, ticks=range(-3, 4), shrink=0.8)
    bar.ax.set_yticklabels([f'{2. ** k:g}' for k in range(-3, 4)])
    bar.set_label("attention, times the class's share of the pixels")
    with whole(path) as new:
        figure.savefig(new, dpi=100)


def draw_scene(models: CamVid, path: Path, levels_path: Path) -> None:
    """Draw where the tokens of the coarsest level look in a test picture, and, in another figure, those of all levels.

    The first also shows the classes that the model finds.
    """
    loaded = load(models.folder(0), 'segmentation')
    test = load_dataset('folder', models.data_dir, 'test')
    image, _ = test[min(SCENE, len(test) - 1)]
    x = loaded.prepare(image)
    records = capture_tokens(loaded.model, x[None])
    found = draw_overlay(image, predict_classes(loaded, image), loaded.classes).crop((0, 0, *image.size))
    tokens = overlay_tokens(loaded.shown(x), records[-1].attention[0])
    half = len(tokens) // 2
    pictures = [image, *tokens[:half], found, *tokens[half:]]
    names = [f'token {i}' for i in range(1, len(tokens) + 1)]
    figure = Figure(figsize=(11, 3.6), layout='constrained')
    for ax, picture, title in zip(
            figure.subplots(2, half + 1).flat, pictures, ['picture', *names[:half], 'classes', *names[half:]]):
        ax.imshow(picture)
        ax.set_title(title, fontsize=9)
        ax.axis('off')
    with whole(path) as new:
        figure.savefig(new, dpi=90)
    maps = torch.cat([resize_attention(record.attention, x.shape[-2:]) for record in records])
    with whole(levels_path) as new:
        draw_token_attention(
            [loaded.shown(x)] * len(maps), maps, [f'level {i}' for i in range(1, len(maps) + 1)], new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=[*TASKS])
    parser.add_argument('--data-dir', type=Path, required=True, help='folder of the pictures')
    parser.add_argument('--models', type=Path, required=True, help='folder of the trained models')
    parser.add_argument(
        '--seeds', type=at_least(0), nargs='+', default=[0, 1, 2],
        help='of the models; those of 0 are drawn (default: 0 1 2)')
    add_device(parser)
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write results to')
    args = parser.parse_args()
    models = TASKS[args.task](args.data_dir, args.models)
    missing = [str(models.file(seed)) for seed in args.seeds if not models.file(seed).exists()]
    if missing:
        parser.error(f'--models must hold the models of --seeds, got no {missing[0]}')
    with complaints(parser):
        pictures = models.pictures()
    log = args.out / 'token_analysis.json'
    runs = [run for run in read_runs(log) if run['models'] != models.name or run['seed'] not in args.seeds]
    for seed in args.seeds:
        for weights in ('trained', 'random'):
            if weights == 'trained':
                model = models.trained(seed).to(args.device)
            else:
                model = take_statistics(models.random(seed).to(args.device), pictures.train)
            runs.append({
                'models': models.name, 'part': models.part, 'weights': weights, 'seed': seed,
                'environment': environment(device=args.device),
                'classes': pictures.classes, 'parts': measure(model, pictures, f'{weights}, seed {seed}')})
    write_runs(log, runs, report)
    if args.task == 'camvid' and 0 in args.seeds:
        draw_classes(runs, args.out / 'token_analysis_classes.png')
        draw_scene(models, args.out / 'token_analysis_scene.png', args.out / 'token_analysis_levels.png')
    print(report(runs))


if __name__ == '__main__':
    main()
