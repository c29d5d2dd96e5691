"""What the tokens of trained models look at, against the same models with random weights (section 6 of the paper).

    python benchmarks/segmentation.py digits   # trains the segmentation models, in the folder segmentation_digits
    python benchmarks/token_analysis.py

looks at `test_vt_resnet` on the 450 held-out digits (seed 0: the weights that ship; other seeds are trained by the
recipe of benchmarks/digits_weights.py, four minutes each on one CPU core) and at VT-FPN, trained for three seeds by the
other benchmark, on the 300 held-out composed images. It writes benchmarks/results/token_analysis.md, .json and
pictures. The control are models with random weights, the statistics of whose batch norms were taken over training
images.

Measures, each a mean over the images, of each module (of VT-FPN: level):

* Strokes: attention of a stroke's pixel over that of a background pixel, of the mean map of all tokens
  (`foreground_ratio`; 1 for uniform attention; the paper's "28.3 % higher" is 1.283). A digit's pixel is of the stroke
  where its grey level is at least 0.45 of white; composed images have masks. A mask is brought to the grid of A as the
  share of each cell that it covers. Digits stand in the middle of their image, so that a model can favour strokes
  without having seen one: "other masks" is the ratio of the same maps with the masks of other images. "In proportion"
  is the ratio of an attention that is proportional to each cell's share of strokes, which says what a grid allows.
* Entropy of A, divided by ln(H * W); spread (`attention_spread`); twins: share of the tokens that look where another
  token of the module looks (mean cosine of their maps over the images above 0.95).
* Match of two modules: correlation of each token's map in one with the map of that token in the other which is most
  like it. Tokens of different modules have nothing to do with each other by their number.
"""
import argparse
import json
import platform
import shutil
import statistics
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from digits_weights import best_recipe, train
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm
from versions import versions

from vt_zoo.analysis.figures import draw_token_attention
from vt_zoo.analysis.metrics import (
    attention_entropy,
    attention_spread,
    foreground_ratio,
    record_interaction,
    resize_attention,
    token_similarity,
)
from vt_zoo.analysis.records import capture_tokens
from vt_zoo.data.composed_digits import CLASSES, INK
from vt_zoo.data.digits import write_digits
from vt_zoo.data.images import load_image
from vt_zoo.files import whole
from vt_zoo.segmentation.datasets import load_dataset
from vt_zoo.segmentation.settings import read_settings
from vt_zoo.segmentation.train import create_segmenter
from vt_zoo.weights import Loaded, load

RESULTS = Path(__file__).parent / 'results'
SEEDS = (0, 1, 2)
WEIGHTS = {'trained': '#0072b2', 'random': '#d55e00'}  # and their colours
BATCH = 50
TWINS = 0.95  # least cosine
SHOWN_DIGITS = (0, 4)
SHOWN_COMPOSED = 0

Maps = Tuple[torch.Tensor, torch.Tensor]


class Images(NamedTuple):
    """What models look at.

    Attributes:
        train: Prepared training images (M, 3, H, W).
        val: Prepared held-out images (N, 3, H, W).
        target: Their class (N,), or that of each of their pixels (N, H, W).
        foreground: Where they have strokes (N, H, W), 0 and 1.
    """
    train: torch.Tensor
    val: torch.Tensor
    target: torch.Tensor
    foreground: torch.Tensor


class DigitModels:
    """`test_vt_resnet` on single digits.

    Args:
        work: Folder of the digits and of the models of seeds beside 0, which are trained where they are missing.
    """
    name, part = 'test_vt_resnet on digits', 'module'

    def __init__(self, work: Path) -> None:
        self.work, self.data = work, work / 'digits'
        if not self.data.exists():
            with whole(self.data) as new:
                write_digits(new)

    def trained(self, seed: int) -> Loaded:
        """The model that ships, or one trained by its recipe."""
        if seed == 0:
            return load('test_vt_resnet')
        out = self.work / f'test_vt_resnet_{seed}'
        if not (out / 'model').exists():
            shutil.rmtree(out, ignore_errors=True)
            train(self.data, out, best_recipe(json.loads((RESULTS / 'digits_weights.json').read_text())['runs']), seed)
        return load(str(out / 'model'))

    def random(self, seed: int) -> nn.Module:
        """What the training of a seed began with."""
        torch.manual_seed(seed)
        return timm.create_model('test_vt_resnet')

    def images(self) -> Images:
        loaded = self.trained(0)
        files = {split: sorted(self.data.glob(f'{split}/*/*.png')) for split in ('train', 'val')}
        train, val = (torch.stack([loaded.prepare(load_image(path)) for path in files[split]]) for split in files)
        grey = torch.stack([torch.from_numpy(np.array(loaded.shown(x).convert('L'))) for x in val])
        target = torch.tensor([int(path.parent.name) for path in files['val']])
        return Images(train, val, target, (grey >= INK * 255).float())

    def draw(self, images: Images, path: Path) -> None:
        """Draw Figure 6 for a few digits: A and A-hat of both modules of the model of seed 0."""
        loaded = self.trained(0)
        rows, titles = [], []
        for digit in SHOWN_DIGITS:
            x = images.val[images.target == digit][:1]
            for module, maps in enumerate(attention_maps(loaded.model, x), 1):
                for name, attention in zip(('A', 'Â'), maps):
                    rows.append(attention)
                    titles.append(f'{name}, module {module}')
        pictures = [
            loaded.shown(images.val[images.target == digit][0]) for digit in SHOWN_DIGITS for _ in range(4)]
        draw_maps(pictures, rows, titles, path)


class ComposedModels:
    """VT-FPN on composed images.

    Args:
        work: Folder that benchmarks/segmentation.py wrote.
    """
    name, part = 'VT-FPN on composed digits', 'level'

    def __init__(self, work: Path) -> None:
        self.work = work

    def trained(self, seed: int) -> Loaded:
        """The model after the last iteration."""
        return load(str(self.work / f'vt_fpn_{seed}_{read_settings("digits").iterations}' / 'last'))

    def random(self, seed: int) -> nn.Module:
        """What the training of a seed began with."""
        torch.manual_seed(seed)
        return create_segmenter(read_settings('digits'), len(CLASSES))

    def images(self) -> Images:
        loaded = self.trained(0)
        data = {split: load_dataset('folder', self.work / 'data', split) for split in ('train', 'val')}
        train, val = (torch.stack([loaded.prepare(image) for image, _ in data[split]]) for split in data)
        target = torch.stack([torch.from_numpy(mask) for _, mask in data['val']])
        return Images(train, val, target, (target > 0).float())

    def draw(self, images: Images, path: Path) -> None:
        """Draw Figure 6 for one image: A and A-hat of each level of the model of seed 0."""
        loaded, x = self.trained(0), images.val[SHOWN_COMPOSED]
        rows, titles = [], []
        for level, maps in enumerate(attention_maps(loaded.model, x[None]), 1):
            for name, attention in zip(('A', 'Â'), maps):
                rows.append(resize_attention(attention, x.shape[-2:]))
                titles.append(f'{name}, level {level}')
        draw_maps([loaded.shown(x)] * len(rows), rows, titles, path)


def draw_maps(pictures: List[Image.Image], rows: List[torch.Tensor], titles: List[str], path: Path) -> None:
    """Draw a row of maps (1, L, H, W) over each picture; a small file, of 3/4 the usual size and 256 colours."""
    draw_token_attention(pictures, torch.cat(rows), titles, path)
    with Image.open(path) as image, whole(path) as new:
        small = image.convert('RGB').resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS)
        small.quantize(256, kmeans=8).save(new, 'PNG', optimize=True)


@torch.no_grad()
def take_statistics(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Let batch norms take their statistics over images, as the mean over batches; then eval mode."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = None
    model.train()
    for batch in images.split(BATCH):
        model(batch)
    return model.eval()


def attention_maps(model: nn.Module, images: torch.Tensor) -> List[Maps]:
    """A and A-hat (N, L, H, W) of each module or level."""
    batches = [capture_tokens(model, batch) for batch in images.split(BATCH)]
    return [
        tuple(torch.cat(maps) for maps in zip(*(
            (records[i].attention, record_interaction(records, i)) for records in batches)))
        for i in range(len(batches[0]))]


def stroke_ratio(attention: torch.Tensor, foreground: torch.Tensor) -> float:
    """Foreground ratio of the mean map of all tokens, mean over the images."""
    return foreground_ratio(attention.mean(1, keepdim=True), foreground).mean().item()


def best_match(attention: torch.Tensor, other: torch.Tensor, same: bool = False) -> float:
    """Correlation of each map of A (N, L, H, W) with that of the other's which is most like it, mean over all.

    Args:
        attention: A (N, L, H, W).
        other: A (N, L', H, W).
        same: Both are of the same tokens, and no token is compared with itself.
    """
    maps = [F.normalize(a.flatten(2) - a.flatten(2).mean(-1, keepdim=True), dim=-1) for a in (attention, other)]
    correlation = maps[0] @ maps[1].transpose(1, 2)
    if same:
        correlation.diagonal(dim1=1, dim2=2).fill_(-1)
    return correlation.amax(-1).mean().item()


def measure(maps: List[Maps], foreground: torch.Tensor) -> List[Dict[str, float]]:
    """The measures of each module or level, from its A and A-hat over the images and their masks."""
    half = len(foreground) // 2
    first, result = maps[0][0], []
    for attention, interaction in maps:
        tokens = foreground_ratio(attention, foreground).mean(0)
        similarity = token_similarity(attention).fill_diagonal_(0)
        cover = F.adaptive_avg_pool2d(foreground[:, None], attention.shape[-2:])
        measures = {
            'height': attention.shape[-2], 'width': attention.shape[-1],
            'in proportion': stroke_ratio(cover / cover.sum((-2, -1), keepdim=True), foreground),
            'A': stroke_ratio(attention, foreground),
            'A, other masks': stroke_ratio(attention, foreground.roll(half, 0)),
            'A-hat': stroke_ratio(interaction, foreground),
            'A-hat, other masks': stroke_ratio(interaction, foreground.roll(half, 0)),
            'lowest token': tokens.min().item(),
            'highest token': tokens.max().item(),
            'entropy': attention_entropy(attention, normalize=True).mean().item(),
            'entropy of A-hat': attention_entropy(interaction, normalize=True).mean().item(),
            'spread': attention_spread(attention).mean().item(),
            'twins': (similarity.amax(1) > TWINS).float().mean().item(),
            'match within': best_match(attention, attention, same=True),
        }
        if attention.shape == first.shape:
            measures['match with the first'] = best_match(attention, first, same=attention is first)
            measures['match with the first, other image'] = best_match(attention, first.roll(half, 0))
        result.append(measures)
    return result


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Share of the images, or of their pixels, that the model gives the right class, in percent."""
    predictions = torch.cat([model(batch).argmax(1) for batch in images.val.split(BATCH)])
    return 100 * (predictions == images.target).float().mean().item()


def values(runs: List[Dict], name: str, weights: str, part: int, key: str) -> List[float]:
    """A measure of one module or level, of each seed."""
    return [r['parts'][part][key] for r in runs if (r['models'], r['weights']) == (name, weights)]


def text(numbers: List[float], digits: int = 2) -> str:
    """Mean ± standard deviation."""
    return f'{statistics.mean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f}'


def favours(runs: List[Dict], name: str, part: int, key: str) -> List[int]:
    """Number of seeds in which trained maps are above 1, above random ones, above themselves with other masks."""
    trained, random = (values(runs, name, weights, part, key) for weights in WEIGHTS)
    others = values(runs, name, 'trained', part, f'{key}, other masks')
    references = [1.] * len(trained), random, others
    return [sum(v > other for v, other in zip(trained, reference)) for reference in references]


def parts_of(runs: List[Dict]) -> List[Tuple[str, str, int]]:
    """(models, name of the part, its number from 0) of every module and level."""
    kinds = {r['models']: (r['part'], len(r['parts'])) for r in runs}
    return [(name, part, i) for name, (part, number) in kinds.items() for i in range(number)]


def report(runs: List[Dict], command: str) -> str:
    """The result as Markdown."""
    seeds = sorted({r['seed'] for r in runs})
    lines = [
        '# What the tokens of trained models look at', '',
        f'Command: `{command}`, after `python benchmarks/segmentation.py digits`. {versions()}, {platform.machine()}, '
        f'{torch.get_num_threads()} CPU thread. Mean ± standard deviation over seeds {", ".join(map(str, seeds))}; '
        'held-out images: 450 digits, 300 composed images of 64x64. The docstring of the benchmark defines each '
        'measure. "Random" are the weights that the training of a seed began with.', '']
    for name in {r['models']: None for r in runs}:
        right = ', '.join(f'{r["accuracy"]:.2f}' for r in runs if (r['models'], r['weights']) == (name, 'trained'))
        what = 'pixels' if name == ComposedModels.name else 'images'
        lines.append(f'* {name}: {right} % of the {what} are right after training.')
    lines += [
        '', *findings(runs), '', '## Strokes against background', '',
        "Attention of a stroke's pixel over that of a background pixel; 1 is uniform, the paper's figure 1.283. "
        '"Seeds": in how many the trained maps are above 1, above random weights, above other masks.', '']
    for key in 'A', 'A-hat':
        lines += [
            f'| {key} of | grid | trained | with other masks | random | with other masks | seeds | in proportion |',
            '|---|---|---|---|---|---|---|---|']
        for name, part, i in parts_of(runs):
            cells = [
                text(values(runs, name, weights, i, k)) for weights in WEIGHTS for k in (key, f'{key}, other masks')]
            first = next(r for r in runs if r['models'] == name)['parts'][i]
            lines.append(
                f'| {name}, {part} {i + 1} | {first["height"]}x{first["width"]} | {" | ".join(cells)} | '
                f'{", ".join(map(str, favours(runs, name, i, key)))} | {first["in proportion"]:.2f} |')
        lines.append('')
    lines += [
        'The tokens that favour the strokes least and most (ratio of the token alone, mean over the images):', '',
        '| A of | trained: lowest | highest | random: lowest | highest |', '|---|---|---|---|---|']
    for name, part, i in parts_of(runs):
        cells = [text(values(runs, name, w, i, k)) for w in WEIGHTS for k in ('lowest token', 'highest token')]
        lines.append(f'| {name}, {part} {i + 1} | {" | ".join(cells)} |')
    lines += [
        '', '## Entropy, spread, twins', '',
        'Entropy is divided by that of uniform attention, spread is a share of the diagonal, twins a share of the '
        'tokens; each trained, random.', '',
        '| of | entropy of A | random | entropy of A-hat | random | spread of A | random | twins | random |',
        '|---|---|---|---|---|---|---|---|---|']
    for name, part, i in parts_of(runs):
        cells = [
            text(values(runs, name, w, i, k), 3) for k in ('entropy', 'entropy of A-hat', 'spread', 'twins')
            for w in WEIGHTS]
        lines.append(f'| {name}, {part} {i + 1} | {" | ".join(cells)} |')
    lines += [
        '', '## Does the second module look elsewhere than the first?', '',
        'Best correlation of a map with any map of the other set. (VT-FPN has one tokenizer a level, none of them '
        'recurrent.)', '', '| test_vt_resnet on digits | trained | random |', '|---|---|---|']
    for i, key, what in MATCHES:
        cells = [text(values(runs, DigitModels.name, w, i, key), 3) for w in WEIGHTS]
        lines.append(f'| {what} | {" | ".join(cells)} |')
    return '\n'.join([
        *lines, '', '## Pictures', '', '![Stroke ratio and entropy by module](token_analysis.png)', '',
        'Figure 6 for two held-out digits, of the weights that ship:', '',
        '![A and A-hat of the tokens on two digits](token_analysis_digits.png)', '',
        'and for a held-out composed image, of VT-FPN, seed 0:', '',
        '![A and A-hat of the tokens of VT-FPN](token_analysis_composed.png)', ''])


MATCHES = [
    (1, 'match with the first', 'module 2 with module 1, same image'),
    (1, 'match with the first, other image', 'module 2 with module 1, other image'),
    (0, 'match within', 'module 1 with its other tokens, same image'),
    (0, 'match with the first, other image', 'module 1 with itself, other image'),
    (1, 'match within', 'module 2 with its other tokens, same image'),
]


def findings(runs: List[Dict]) -> List[str]:
    """What the numbers say of the paper's claims, as sentences."""
    number = len({r['seed'] for r in runs})
    lines = []
    for key in 'A', 'A-hat':
        shows = [
            f'{name}, {part} {i + 1} ({statistics.mean(values(runs, name, "trained", i, key)):.2f}, in proportion it '
            f'would be {values(runs, name, "trained", i, "in proportion")[0]:.2f})'
            for name, part, i in parts_of(runs) if favours(runs, name, i, key) == [number] * 3]
        lines.append(
            f'* **{key} favours strokes** (in all {number} seeds above 1, above random weights and above other masks): '
            f'in {"; ".join(shows) or "no module and no level"}. The others do not show it.')
    below = [
        f'{name}, {part} {i + 1}: ' + ' against '.join(
            f'{100 * (1 - statistics.mean(values(runs, name, weights, i, "entropy"))):.0f} %' for weights in WEIGHTS)
        for name, part, i in parts_of(runs)]
    lines.append(
        f'* **Entropy of A below uniform**, trained against random: {"; ".join(below)}. (The paper: 0.941 nats, 92 % '
        'below log(473 * 473), on LIP.)')
    same, other, within = (values(runs, DigitModels.name, 'trained', i, key) for i, key, _ in MATCHES[:3])
    verdict = {number: 'does not look', 0: 'looks'}.get(sum(s > o for s, o in zip(same, other)), 'does not always look')
    lines.append(
        f'* **Module 2 {verdict} elsewhere than module 1** on digits: its maps match one of module 1 with '
        f"{text(same)}, one of module 1 on another image with {text(other)}; module 1's own tokens match each other "
        f'with {text(within)}.')
    return lines


def draw_chart(runs: List[Dict], path: Path) -> None:
    """Draw stroke ratios and entropy by module, trained against random."""
    figure = Figure(figsize=(10, 4), layout='constrained')
    axes = figure.subplots(1, 3)
    parts = parts_of(runs)
    places = [i + (0.6 if name == ComposedModels.name else 0) for i, (name, _, _) in enumerate(parts)]
    panels = {
        'A': 'A: stroke / background', 'A-hat': 'Â: stroke / background', 'entropy': 'entropy of A / uniform'}
    for ax, (key, title) in zip(axes, panels.items()):
        ax.axhline(1, color='black', linewidth=0.8, linestyle='--', label='uniform attention')
        series = [(weights, key, weights) for weights in WEIGHTS]
        if key != 'entropy':
            series.append(('trained', f'{key}, other masks', 'trained, other masks'))
        for shift, (weights, k, label) in zip((-0.18, 0, 0.18), series):
            points = [values(runs, name, weights, i, k) for name, _, i in parts]
            ax.errorbar(
                [x + shift for x in places], [statistics.mean(p) for p in points],
                [statistics.stdev(p) for p in points], color=WEIGHTS[weights], linestyle='none', capsize=2,
                marker='o' if weights == 'trained' else 's', markersize=5, label=label,
                markerfacecolor='white' if 'other' in k else WEIGHTS[weights])
        ax.set_title(title, fontsize=11)
        ax.set_xticks(places, [f'{part} {i + 1}' for _, part, i in parts], rotation=40, ha='right')
        ax.grid(axis='y', alpha=0.3)
    axes[0].set_ylabel('ratio')
    axes[1].sharey(axes[0])
    axes[0].autoscale()
    axes[2].set_ylim(0, 1.05)
    figure.supxlabel('modules: test_vt_resnet on digits; levels: VT-FPN on composed digits', fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=4, fontsize=9)
    with whole(path) as new:
        figure.savefig(new, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work', type=Path, default=Path('token_analysis'), help='folder of digits and their models')
    parser.add_argument(
        '--segmenters', type=Path, default=Path('segmentation_digits'),
        help='folder of data and models that benchmarks/segmentation.py wrote')
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write results to')
    args = parser.parse_args()
    runs: List[Dict[str, Any]] = []
    for models, picture in (DigitModels(args.work), 'digits'), (ComposedModels(args.segmenters), 'composed'):
        images = models.images()
        for seed in tqdm(SEEDS, desc=models.name):
            for weights in WEIGHTS:
                if weights == 'trained':
                    model = models.trained(seed).model
                else:
                    model = take_statistics(models.random(seed), images.train)
                parts = measure(attention_maps(model, images.val), images.foreground)
                runs.append({
                    'models': models.name, 'part': models.part, 'weights': weights, 'seed': seed,
                    'accuracy': round(accuracy(model, images), 2),
                    'parts': [{key: round(value, 4) for key, value in part.items()} for part in parts]})
        models.draw(images, args.out / f'token_analysis_{picture}.png')
    result = report(runs, 'python benchmarks/token_analysis.py')
    print(result)
    with whole(args.out / 'token_analysis.md') as new:
        new.write_text(result)
    with whole(args.out / 'token_analysis.json') as new:
        new.write_text(json.dumps(runs, indent=1) + '\n')
    draw_chart(runs, args.out / 'token_analysis.png')


if __name__ == '__main__':
    main()
