"""Tables 1 to 10 of the paper beside counts of the real modules, cell by cell.

    python benchmarks/paper_tables.py

counts each model that paper_tables.yaml names, as the paper counts and as the model runs, and writes
benchmarks/results/paper_tables.md. Nothing is trained: accuracies are the paper's, unverified. If the cells that differ
are not those with a star in paper_tables.yaml, the exit status is 1 and nothing is written.
"""
import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Iterator, List, Tuple

import timm
import torch
import yaml
from harness import versions
from paper_order import in_paper_order
from timm.models.resnet import Bottleneck
from torch.utils.flop_counter import FlopCounterMode

from vt_zoo.analysis.cost import count_weights
from vt_zoo.files import whole
from vt_zoo.layers.kmeans import KMeans
from vt_zoo.layers.tokenizer import LearnedFilters
from vt_zoo.models import vt_fpn

PAPER = yaml.safe_load(Path(__file__).with_suffix('.yaml').read_text())
PAGE = Path(__file__).parent / 'results' / 'paper_tables.md'
TOLERANCE = 0.001
AMOUNTS = {
    'multiply-adds, M': ('multiply_adds', 1e6), 'multiply-adds, G': ('multiply_adds', 1e9),
    'parameters, M': ('parameters', 1e6)}
RATIOS = {  # how many times less than the base
    'multiply-adds, total': 'multiply_adds', 'multiply-adds, stage 5': 'part_multiply_adds',
    'parameters, total': 'parameters', 'parameters, stage 5': 'part_parameters',
    'times less than FPN': 'multiply_adds', 'times less than the FPN module': 'part_multiply_adds'}
METHOD = '''
Multiply-adds by torch's flop counter and weights (no norms, no biases) of the real modules, training form, without the
iterations of k-means. *Ours* is counted as the paper counts: with value, key and query maps on all pixels, without
learned filters beside those that tokens make, and in Tables 9 and 10 with the stride of a bottleneck in its first
convolution, as in Detectron2. *As it runs* is what the model does, with these maps on the tokens and the stride in the
3x3 convolution, and has. At 224x224, in Table 9 at 800x1216 with 54 classes, in Table 10 at 473x473 with 20. A cell is
*reproduced* within its rounding or 0.1 %. Accuracies and mIoUs are the paper's, unverified: nobody here has ImageNet,
COCO-stuff or LIP.
'''


@dataclass(frozen=True)
class Counts:
    """Multiply-adds and weights of a model and of the part that is compared: the last stage, or the neck."""
    multiply_adds: int
    parameters: int
    part_multiply_adds: int
    part_parameters: int
    transformer: int  # multiply-adds of that of the neck


@dataclass(frozen=True)
class Cell:
    """A cell of the paper, as printed, and our number for it, as formatted; '' where nothing is counted."""
    table: int
    row: str
    column: str
    paper: str
    ours: str = ''
    difference: str = ''
    runs: str = ''
    status: str = 'unverified'
    why: str = ''


def create(name: str, as_printed: bool, options: dict) -> torch.nn.Module:
    """Create a model on the meta device, in the form that the paper counts or as it is."""
    with torch.device('meta'):
        if not hasattr(vt_fpn, name):
            model = timm.create_model(name, **options)
            return in_paper_order(model) if as_printed else model
        model = getattr(vt_fpn, name)(**options)
    if as_printed:
        in_paper_order(model)
        for block in model.encoder.modules():
            if isinstance(block, Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return model


@cache
def count(name: str, size: Tuple[int, int], as_printed: bool, **options) -> Counts:
    """Count a model at a size (H, W), as the paper counts or as it is and runs."""
    model = create(name, as_printed, options).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, *size, device='meta'))
    by_module = {key.partition('.')[2]: sum(ops.values()) // 2 for key, ops in counter.get_flop_counts().items()}
    modules = dict(model.named_modules())
    part = next((name for name in ('vt_stage', 'layer4', 'decoder.neck') if name in modules), '')
    lloyd = sum(by_module[name] for name, module in modules.items() if isinstance(module, KMeans))
    learned = sum(
        module.weight.numel() for module in modules.values() if as_printed and isinstance(module, LearnedFilters))
    return Counts(
        multiply_adds=counter.get_total_flops() // 2 - lloyd,
        parameters=count_weights(model) - learned,
        part_multiply_adds=by_module[part] - lloyd,
        part_parameters=count_weights(modules[part]) - learned,
        transformer=by_module.get(f'{part}.transformer', 0),
    )


def ours(row: dict, column: str, size: Tuple[int, int], as_printed: bool) -> float:
    """Our number for a cell, in the unit of its column."""
    def counts(name):
        return count(name, size, as_printed, **row.get('options', {}))

    if column in AMOUNTS:
        quantity, unit = AMOUNTS[column]
        return getattr(counts(row['model']), quantity) / unit
    return getattr(counts(row['base']), RATIOS[column]) / getattr(counts(row['model']), RATIOS[column])


def compare(table: int, row: dict, column: str, paper: str, size: Tuple[int, int]) -> Cell:
    """A cell beside our count."""
    if 'model' not in row or column not in {*AMOUNTS, *RATIOS}:
        return Cell(table, row['row'], column, paper)
    value, runs = (ours(row, column, size, as_printed) for as_printed in (True, False))
    decimals = len(paper.partition('.')[2])
    difference = value / float(paper) - 1
    close = abs(value - float(paper)) <= 0.5 * 10 ** -decimals or abs(difference) <= TOLERANCE
    shown = max(decimals, 2)
    return Cell(
        table, row['row'], column, paper, f'{value:.{shown}f}', f'{100 * difference:+.2f} %', f'{runs:.{shown}f}',
        'reproduced' if close else 'differing', '' if close else row.get('why', ''))


def read_cells() -> Iterator[Tuple[Cell, bool]]:
    """Compare all cells; whether the paper's number has a star is beside each."""
    for table, content in PAPER['tables'].items():
        size = tuple(content.get('size', (224, 224)))
        for row in content['rows']:
            for column, printed in zip(content['columns'], row['cells'].split()):
                if printed != '-':
                    yield compare(table, row, column, printed.rstrip('*'), size), printed.endswith('*')


def report_necks() -> List[str]:
    """What the FPN module and the VT neck of Tables 9 and 10 need."""
    lines = [
        '## The FPN module of Tables 9 and 10', '',
        'Multiply-adds, G, on the maps of a ResNet-50 or ResNet-101. The text says 6.4 and 6.5 times less; the cells '
        'of the column "FPN FLOPs" are missing in the version of the paper that these tables are compared with.', '',
        '| input | FPN module | VT neck | of it the transformer | times less | without transformer |',
        f'|{"---|" * 6}']
    for height, width in (PAPER['tables'][table]['size'] for table in (9, 10)):
        fpn, vt = (count(name, (height, width), True) for name in ('PanopticFPN', 'VTFPN'))
        neck, replaced, transformer = vt.part_multiply_adds, fpn.part_multiply_adds, vt.transformer
        cells = [f'{n / 1e9:.3f}' for n in (replaced, neck, transformer)]
        cells += [f'{replaced / neck:.2f}', f'{replaced / (neck - transformer):.2f}']
        lines.append(f'| {height}x{width} | {" | ".join(cells)} |')
    return [*lines, '']


def report(cells: List[Cell]) -> str:
    """The page, in Markdown."""
    tally = ', '.join(f'{number} {status}' for status, number in sorted(Counter(c.status for c in cells).items()))
    lines = [
        "# The paper's Tables 1 to 10", '', f'Command: `python benchmarks/paper_tables.py`. {versions()}.', METHOD,
        f'Cells: {tally}.', '']
    for table in PAPER['tables']:
        lines += [
            f'## Table {table}', '', '| row | column | paper | ours | difference | as it runs | |', f'|{"---|" * 7}']
        for c in (c for c in cells if c.table == table):
            status = f'{c.status}: {c.why}' if c.why else c.status
            lines.append(f'| {" | ".join((c.row, c.column, c.paper, c.ours, c.difference, c.runs, status))} |')
        lines.append('')
    lines += report_necks()
    lines += ['## Errata: where the paper contradicts itself', '', '| where | what |', '|---|---|']
    lines += [f'| {where} | {what} |' for where, what in PAPER['errata']]
    return '\n'.join([*lines, ''])


def main() -> int:
    pairs = list(read_cells())
    changed = [cell for cell, star in pairs if star != (cell.status == 'differing')]
    if changed:
        print('Not as in paper_tables.yaml:', *changed, sep='\n', file=sys.stderr)
        return 1
    with whole(PAGE) as new:
        new.write_text(report([cell for cell, _ in pairs]))
    return 0


if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
