"""Tables 1 to 10 of the paper beside counts of the real modules, cell by cell.

    python benchmarks/paper_tables.py

builds each model that the tables (paper_cells.py) name and that timm or vt_zoo has, counts multiply-adds (torch's flop
counter, training form; 224x224 but in Tables 9 and 10) in the paper's order of computation (paper_order.py) and as the
model runs, and weights (without norms and biases), and writes
benchmarks/results/paper_tables.md, .csv and paper_figure9.png. Nothing is trained: accuracies are the paper's,
unverified. The exit status is 1 when a cell that the committed .csv calls reproduced no longer is, or when a difference
has no reason in paper_cells.py; nothing is written then.
"""
import argparse
import csv
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import timm
import torch
from paper_cells import ERRATA, UNVERIFIED, Row, Segmenter, Spec, paper_rows
from paper_order import in_paper_order
from timm.models.resnet import Bottleneck
from torch.utils.flop_counter import FlopCounterMode

import vt_zoo
from vt_zoo.analysis.cost import count_weights
from vt_zoo.files import whole
from vt_zoo.layers.kmeans import KMeans
from vt_zoo.layers.tokenizer import LearnedFilters
from vt_zoo.models import vt_fpn

RESULTS = Path(__file__).parent / 'results'
TOLERANCE = 0.001


@dataclass(frozen=True)
class Counts:
    """Multiply-adds and weights of a model, and of its last stage (layer4 or vt_stage, without pooling and fc)."""
    total: int
    weights: int
    stage_total: int
    stage_weights: int
    lloyd: int  # multiply-adds of the k-means iterations, not in the totals


@dataclass(frozen=True)
class SegmenterCounts:
    """Multiply-adds of a segmentation model, of its neck and of what that consists of."""
    total: int
    neck: int
    laterals: int
    transformer: int


def multiply_adds_by_module(model: torch.nn.Module, size: Tuple[int, int]) -> Dict[str, int]:
    """Count a model on the meta device: by the names of its modules, '' for all of it."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, *size, device='meta'))
    by_module = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    counts = {name: by_module.get(f'{root}.{name}', 0) for name, _ in model.named_modules()}
    return {**counts, '': by_module['Global']}


@cache
def count(spec: Spec, paper_order: bool = True) -> Counts:
    """Count a classifier at 224x224, in the paper's order of computation and without learned filters, or as it is."""
    model = timm.create_model(spec.name, device='meta', **dict(spec.options))
    if paper_order:
        in_paper_order(model)
    by_module = multiply_adds_by_module(model, (224, 224))
    stage_name = 'vt_stage' if hasattr(model, 'vt_stage') else 'layer4'
    stage = getattr(model, stage_name, torch.nn.Sequential())
    lloyd = sum(by_module[name] for name, m in model.named_modules() if isinstance(m, KMeans))
    learned = sum(m.weight.numel() for m in stage.modules() if paper_order and isinstance(m, LearnedFilters))
    return Counts(
        total=by_module[''] - lloyd,
        weights=count_weights(model) - learned,
        stage_total=sum(by_module[f'{stage_name}.{i}'] for i in range(len(stage))) - lloyd,
        stage_weights=count_weights(stage) - learned,
        lloyd=lloyd,
    )


@cache
def count_segmenter(spec: Segmenter, paper_order: bool = True) -> SegmenterCounts:
    """Count a segmentation model at the size of its data, in the paper's order of computation or as it runs."""
    with torch.device('meta'):
        model = getattr(vt_fpn, spec.name)(f'tu-{spec.encoder}', classes=spec.classes)
    if paper_order:
        in_paper_order(model)
    for block in model.modules():
        if spec.stride_first and isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    by_module = multiply_adds_by_module(model, spec.size)
    neck = 'decoder.neck'
    return SegmenterCounts(
        total=by_module[''],
        neck=by_module[neck],
        laterals=sum(by_module[f'{neck}.laterals.{i}'] for i in range(model.num_levels)),
        transformer=by_module.get(f'{neck}.transformer', 0),
    )


def _ours_of_segmenter(spec: Segmenter, column: str, paper_order: bool) -> float:
    counts, base = (count_segmenter(s, paper_order) for s in (spec, replace(spec, name='PanopticFPN')))
    return {
        'multiply-adds, G': counts.total / 1e9,
        'times less than FPN': base.total / counts.total,
        'times less than the FPN module': base.neck / counts.neck,
    }[column]


def ours(row: Row, column: str, paper_order: bool = True) -> Optional[float]:
    """Our number for a cell, in the unit of its column; None where there is nothing to count."""
    if row.model is None or column in UNVERIFIED:
        return None
    if isinstance(row.model, Segmenter):
        return _ours_of_segmenter(row.model, column, paper_order)
    counts = count(row.model, paper_order)
    if row.table == 1:
        base = count(Spec(row.model.name.removeprefix('vt_')))
        return {
            'multiply-adds, total': base.total / counts.total,
            'multiply-adds, stage 5': base.stage_total / counts.stage_total,
            'parameters, total': base.weights / counts.weights,
            'parameters, stage 5': base.stage_weights / counts.stage_weights,
        }[column]
    return {
        'multiply-adds, M': counts.total / 1e6, 'multiply-adds, G': counts.total / 1e9,
        'parameters, M': counts.weights / 1e6}[column]


def compare(row: Row, column: str) -> Dict[str, str]:
    """The record of a cell: paper, ours, difference, what runs, status and note."""
    printed, value = row.cells[column], ours(row, column)
    record = {
        'table': str(row.table), 'row': row.label, 'column': column, 'paper': printed, 'ours': '', 'difference': '',
        'as it runs': '', 'status': 'unverified', 'note': ''}
    if column in UNVERIFIED:
        record['note'] = "the paper's"
    elif value is None:
        record['note'] = 'no such model in timm'
    else:
        paper, digits = float(printed), len(printed.partition('.')[2])
        difference = value / paper - 1
        close = abs(value - paper) <= 0.5 * 10 ** -digits or abs(difference) <= TOLERANCE
        record.update(
            ours=f'{value:.{max(digits, 2)}f}', difference=f'{100 * difference:+.2f} %',
            **{'as it runs': f'{ours(row, column, paper_order=False):.{max(digits, 2)}f}'},
            status='reproduced' if close else 'differing', note='' if close else row.reasons.get(column, ''))
        if isinstance(row.model, Spec) and count(row.model).lloyd and column.startswith('multiply-adds'):
            record['note'] += f'{"; " if record["note"] else ""}without {count(row.model).lloyd / 1e6:.1f} M of k-means'
    return record


def report(records: List[Dict[str, str]], environment: str) -> str:
    """The tables as Markdown."""
    tally = {s: sum(r['status'] == s for r in records) for s in ('reproduced', 'differing', 'unverified')}
    lines = [
        "# The paper's Tables 1 to 10", '', f'Command: `python benchmarks/paper_tables.py`. {environment}', '',
        'Multiply-adds and weights (no norms, no biases) of the real modules, training form, by the flop counter of '
        "torch. *Ours* is counted in the paper's order of computation, with value, key and query maps on all pixels, "
        'and without learned filters beside those that tokens make; *as it runs* is what the model does, with these '
        'maps on the tokens, and has. At 224x224, in '
        'Table 9 at 800x1216 with 54 classes, in Table 10 at 473x473 with 20. A cell is *reproduced* within its '
        "rounding or 0.1 %. Accuracies and mIoUs are the paper's, unverified: nobody here has ImageNet, COCO-stuff or "
        f'LIP. {tally["reproduced"]} cells are reproduced, {tally["differing"]} differ, '
        f'{tally["unverified"]} are unverified.', '']
    for table in sorted({r['table'] for r in records}, key=int):
        lines += [
            f'## Table {table}', '', '| row | column | paper | ours | difference | as it runs | |', f'|{"---|" * 7}']
        for r in records:
            if r['table'] == table:
                status = f'{r["status"]}{": " if r["note"] else ""}{r["note"]}'
                cells = (r['row'], r['column'], r['paper'], r['ours'], r['difference'], r['as it runs'], status)
                lines.append(f'| {" | ".join(cells)} |')
        lines.append('')
    lines += _report_fpn_modules()
    lines += ['## Errata: where the paper contradicts itself', '', '| where | what |', '|---|---|']
    lines += [f'| {where} | {what} |' for where, what in ERRATA]
    lines += ['', "## The paper's Figure 9", '',
              "![The paper's accuracies against its multiply-adds and parameters](paper_figure9.png)", '',
              "All numbers in this figure are the paper's (Table 8), accuracies unverified; none is from here.", '']
    return '\n'.join(lines)


def _report_fpn_modules() -> List[str]:
    """What the FPN module and the VT neck of Tables 9 and 10 need."""
    lines = [
        '## The FPN module of Tables 9 and 10', '',
        'Multiply-adds, G, on the maps of a ResNet-50 or ResNet-101. The text says 6.4 and 6.5 times less; the cells '
        'of the column "FPN FLOPs" are missing in the version of the paper that these tables are compared with.', '',
        '| input | FPN: laterals | 3x3 | all | VT neck: laterals | transformer | all | times less | '
        'without transformer |',
        f'|{"---|" * 9}']
    for spec in dict.fromkeys(
            replace(row.model, name='VTFPN') for row in paper_rows()
            if isinstance(row.model, Segmenter) and row.model.encoder == 'resnet50' and row.model.stride_first):
        vt, fpn = count_segmenter(spec), count_segmenter(replace(spec, name='PanopticFPN'))
        numbers = (fpn.laterals, fpn.neck - fpn.laterals, fpn.neck, vt.laterals, vt.transformer, vt.neck)
        cells = [f'{n / 1e9:.3f}' for n in numbers]
        cells += [f'{fpn.neck / vt.neck:.2f}', f'{fpn.neck / (vt.neck - vt.transformer):.2f}']
        lines.append(f'| {spec.size[0]}x{spec.size[1]} | {" | ".join(cells)} |')
    return [*lines, '']


def _label_points(ax, points: List[Tuple[float, float, str]]) -> None:
    """Write a label beside each point, each where it covers no point and no label before it."""
    from matplotlib.transforms import Bbox

    centres = [ax.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox([centre - 5, centre + 5]) for centre in centres]
    for x, y, text in points:
        for offset in ((5, -3), (5, 5), (5, -11), (-5, -3), (-5, 5), (-5, -11), (5, 13), (5, -19), (-5, 13), (-5, -19)):
            label = ax.annotate(
                text, (x, y), xytext=offset, textcoords='offset points', fontsize=7.5,
                ha='left' if offset[0] > 0 else 'right')
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            if offset != (-5, -19):
                label.remove()
        taken.append(box)


def draw_figure9(rows: List[Row], path: Path) -> None:
    """Draw the paper's accuracy against its multiply-adds and parameters, Table 8."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout='constrained')
    axes = figure.subplots(1, 2, sharey=True)
    rows = [r for r in rows if r.table == 8 and '-' not in r.cells.values()]
    for ax, column, limits, ticks in (
            (axes[0], 'multiply-adds, G', (1.3, 27), (1.5, 2, 3, 4, 6, 8, 12, 18)),
            (axes[1], 'parameters, M', (9.5, 130), (10, 15, 20, 30, 40, 60, 80))):
        ax.set(xlabel=f'{column} (log scale)', xscale='log', xlim=limits)
        ax.set_xticks(ticks, [f'{t:g}' for t in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        for style, colour, name, of_vt in (('o', '#0072b2', 'baselines', False), ('D-', '#d55e00', 'VT-ResNets', True)):
            members = [r for r in rows if r.label.startswith('VT-') == of_vt]
            x = [float(r.cells[column]) for r in members]
            y = [float(r.cells['accuracy, %']) for r in members]
            ax.plot(x, y, style, color=colour, label=name)
    axes[0].set_ylabel('ImageNet top-1, %')
    axes[0].legend(loc='lower right')
    figure.suptitle("All numbers are the paper's own (Table 8), accuracies unverified here", fontsize=10)
    figure.draw_without_rendering()
    for ax, column in zip(axes, ('multiply-adds, G', 'parameters, M')):
        _label_points(ax, [(float(r.cells[column]), float(r.cells['accuracy, %']), r.label) for r in rows])
    with whole(path) as new:
        figure.savefig(new, dpi=110)


def regressions(records: List[Dict[str, str]], committed: Path) -> List[str]:
    """What is wrong: cells that were reproduced and are not, and differences without a reason."""
    problems = [
        f'Table {r["table"]}, {r["row"]}, {r["column"]}: paper {r["paper"]}, ours {r["ours"]}, no reason is given'
        for r in records if r['status'] == 'differing' and not r['note']]
    if committed.exists():
        status = {(r['table'], r['row'], r['column']): r['status'] for r in records}
        with committed.open(newline='') as f:
            problems += [
                f'Table {r["table"]}, {r["row"]}, {r["column"]} was reproduced and no longer is'
                for r in csv.DictReader(f)
                if r['status'] == 'reproduced' and status.get((r['table'], r['row'], r['column'])) != 'reproduced']
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write')
    args = parser.parse_args()
    rows = paper_rows()
    records = [compare(row, column) for row in rows for column in row.cells]
    problems = regressions(records, RESULTS / 'paper_tables.csv')
    environment = f'torch {torch.__version__}, timm {timm.__version__}, vt_zoo {vt_zoo.__version__}.'
    text = report(records, environment)
    print(text)
    if problems:
        print(*problems, sep='\n', file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    with whole(args.out / 'paper_tables.md') as new:
        new.write_text(text)
    with whole(args.out / 'paper_tables.csv') as new, new.open('w', newline='') as f:
        writer = csv.DictWriter(f, list(records[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(records)
    draw_figure9(rows, args.out / 'paper_figure9.png')
    return 0


if __name__ == '__main__':
    sys.exit(main())
