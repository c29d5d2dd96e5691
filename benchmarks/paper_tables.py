"""Tables 1 to 8 of the paper beside counts of the real modules, cell by cell.

    python benchmarks/paper_tables.py

builds each model that the tables name and that timm or vt_zoo has, counts multiply-adds (torch's flop counter, training
form, 224x224) and weights (without norms and biases), and writes benchmarks/results/paper_tables.md, .csv and
paper_figure9.png. Nothing is trained: accuracies are the paper's, unverified. The exit status is 1 when a cell that the
committed .csv calls reproduced no longer is, or when a difference has no reason below; nothing is written then.
"""
import argparse
import csv
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import vt_zoo
from vt_zoo.analysis.count import count_weights
from vt_zoo.checkpoint import whole
from vt_zoo.layers import KMeans

RESULTS = Path(__file__).parent / 'results'
TOLERANCE = 0.001


@dataclass(frozen=True)
class Spec:
    """A model to count: a name and arguments of timm.create_model."""
    name: str
    options: Tuple[Tuple[str, object], ...] = ()


@dataclass
class Row:
    """A row of a table: the paper's cells by column, as printed, and the model to count."""
    table: int
    label: str
    cells: Dict[str, str]
    model: Optional[Spec] = None
    reasons: Dict[str, str] = field(default_factory=dict)


def vt(depth: int, **options) -> Spec:
    return Spec(f'vt_resnet{depth}', tuple(options.items()))


def _classification_rows() -> List[Row]:
    def row(table, label, accuracy, multiply_adds, parameters, model, why_multiply_adds='', why_parameters=''):
        unit = 'G' if table == 8 else 'M'
        return Row(
            table, label,
            {'accuracy, %': accuracy, f'multiply-adds, {unit}': multiply_adds, 'parameters, M': parameters}, model,
            {f'multiply-adds, {unit}': why_multiply_adds, 'parameters, M': why_parameters})

    table_2 = "Table 8 gives another total than Table 2 for the same model; Table 2's rule is used"
    table_8 = 'the totals of Table 8 contradict each other for R50 and R101; the rule of Tables 2 to 7 is used'
    se_base = "the paper's footnote: the baseline cited for this row has fewer multiply-adds than its R50 and R101"
    se_all = 'reproduced with norms and biases: {} M'
    return [
        row(2, 'R18', '69.9', '1814', '11.7', Spec('resnet18')),
        row(2, 'VT-R18', '72.0', '1579', '11.6', vt(18)),
        row(2, 'R34', '73.3', '3664', '21.8', Spec('resnet34')),
        row(2, 'VT-R34', '74.8', '3299', '21.8', vt(34)),
        row(3, 'R18, pooling-based', '70.6', '1550', '11.0', vt(18, tokenizer='pooling')),
        row(3, 'R18, clustering-based', '71.5', '1580', '11.6', vt(18, tokenizer='clustering')),
        row(3, 'R18, filter-based', '72.0', '1579', '11.6', vt(18)),
        row(3, 'R34, pooling-based', '73.5', '3246', '20.6', vt(34, tokenizer='pooling')),
        row(3, 'R34, clustering-based', '75.1', '3230', '21.8', vt(34, tokenizer='clustering'),
            'printed error: 69 M under the filter-based row, where R18 is 1 M over it'),
        row(3, 'R34, filter-based', '74.8', '3299', '21.8', vt(34)),
        row(4, 'R18, w/ RT', '72.0', '1579', '11.6', vt(18)),
        row(4, 'R18, w/o RT', '71.4', '1564', '11.1', vt(18, recurrent=False)),
        row(4, 'R34, w/ RT', '74.8', '3299', '21.8', vt(34)),
        row(4, 'R34, w/o RT', '74.5', '3369', '20.7', vt(34, recurrent=False),
            'printed error: more than with the recurrent tokenizer; one digit from 3269'),
        row(5, 'R18, none', '68.8', '1528', '8.5', vt(18, token_mixer='none')),
        row(5, 'R18, GraphConv', '69.2', '1528', '8.5', vt(18, token_mixer='graph')),
        row(5, 'R18, transformer', '72.0', '1579', '11.6', vt(18)),
        row(5, 'R34, none', '73.4', '3222', '17.1', vt(34, token_mixer='none')),
        row(5, 'R34, GraphConv', '73.6', '3223', '17.1', vt(34, token_mixer='graph')),
        row(5, 'R34, transformer', '74.8', '3299', '21.8', vt(34)),
        row(6, 'R18, 16 tokens', '72.0', '1579', '11.6', vt(18)),
        row(6, 'R18, 32 tokens', '71.7', '1711', '11.6', vt(18, num_tokens=32)),
        row(6, 'R18, 64 tokens', '72.0', '1979', '11.6', vt(18, num_tokens=64),
            why_parameters='11.6502: 0.0002 over what rounds to 11.6'),
        row(6, 'R34, 16 tokens', '74.8', '3299', '21.8', vt(34)),
        row(6, 'R34, 32 tokens', '75.1', '3514', '21.8', vt(34, num_tokens=32)),
        row(6, 'R34, 64 tokens', '75.0', '3951', '21.8', vt(34, num_tokens=64)),
        row(7, 'R18, w/ projector', '72.0', '1579', '11.7', vt(18),
            why_parameters='printed error: the same model has 11.6 in Tables 2 to 6'),
        row(7, 'R18, w/o projector', '70.9', '1497', '9.3', vt(18, projector=False)),
        row(7, 'R34, w/ projector', '74.8', '3299', '21.8', vt(34)),
        row(7, 'R34, w/o projector', '74.1', '3158', '17.3', vt(34, projector=False)),
        row(8, 'R18', '69.8', '1.814', '11.7', Spec('resnet18')),
        row(8, 'R18+SE', '70.6', '1.814', '11.8', Spec('seresnet18')),
        row(8, 'R18+CBAM', '70.7', '1.815', '11.8', None),
        row(8, 'LR-R18', '74.6', '2.5', '14.4', None),
        row(8, 'R18 (ours)', '73.8', '1.814', '11.7', Spec('resnet18')),
        row(8, 'VT-R18', '76.8', '1.569', '11.7', vt(18),
            table_2, table_2),
        row(8, 'R34', '73.3', '3.664', '21.8', Spec('resnet34')),
        row(8, 'R34+SE', '73.9', '3.664', '22.0', Spec('seresnet34'),
            why_parameters=se_all.format('21.96')),
        row(8, 'R34+CBAM', '74.0', '3.664', '22.9', None),
        row(8, 'AA-R34', '74.7', '3.55', '20.7', None),
        row(8, 'R34 (ours)', '77.7', '3.664', '21.8', Spec('resnet34')),
        row(8, 'VT-R34', '79.9', '3.236', '19.2', vt(34),
            table_2, table_2),
        row(8, 'R50', '76.0', '4.089', '25.5', Spec('resnet50')),
        row(8, 'R50+SE', '76.9', '3.860', '28.1', Spec('seresnet50'),
            se_base, se_all.format('28.09')),
        row(8, 'R50+CBAM', '77.3', '3.864', '28.1', None),
        row(8, 'LR-R50', '77.3', '4.3', '23.3', None),
        row(8, 'Stand-Alone', '77.6', '3.6', '18.0', None),
        row(8, 'AA-R50', '77.7', '4.1', '25.6', None),
        row(8, 'A2-R50', '77.0', '-', '-', None),
        row(8, 'SAN19', '78.2', '3.3', '20.5', None),
        row(8, 'GloRe-R50', '78.4', '5.2', '30.5', None),
        row(8, 'VT-R50', '80.6', '3.412', '21.4', vt(50),
            table_8, table_8),
        row(8, 'R101', '77.4', '7.802', '44.4', Spec('resnet101')),
        row(8, 'R101+SE', '77.7', '7.575', '49.3', Spec('seresnet101'),
            se_base, se_all.format('49.33')),
        row(8, 'R101+CBAM', '78.5', '7.581', '49.3', None),
        row(8, 'LR-R101', '78.5', '7.79', '42.0', None),
        row(8, 'AA-R101', '78.7', '8.05', '45.4', None),
        row(8, 'GloRe-R200', '79.9', '16.9', '70.6', None),
        row(8, 'VT-R101', '82.3', '7.129', '41.5', vt(101),
            table_8, table_8),
        row(8, 'ViT-B/16-224', '79.7', '17.6', '86.4', Spec('vit_base_patch16_224')),
        row(8, 'DeiT-B/16-224', '81.8', '17.6', '86', Spec('deit_base_patch16_224')),
        row(8, 'T2T-ViTt-224', '82.2', '13.2', '64.1', None),
        row(8, 'BoTNet-S1-59', '81.7', '7.3', '33.5', None),
    ]


def _reduction_rows() -> List[Row]:
    """Table 1 turned over: a row a depth, how many times less VT-ResNets need."""
    columns = ('multiply-adds, total', 'multiply-adds, stage 5', 'parameters, total', 'parameters, stage 5')
    no_rule = 'does not follow from Table 2; see the errata'
    from_table_8 = 'follows from the total of Table 8, which no rule of 16 tokens reaches'
    paper = {18: '1.14 2.4 0.91 0.9', 34: '1.16 5.0 1.21 1.5', 50: '1.20 6.1 1.19 1.26', 101: '1.09 6.9 1.19 1.26'}
    reasons = {18: no_rule, 34: no_rule, 50: from_table_8, 101: no_rule}
    return [
        Row(1, f'R{depth}', dict(zip(columns, cells.split())), vt(depth), dict.fromkeys(columns, reasons[depth]))
        for depth, cells in paper.items()]


ERRATA = [
    ('Table 2, caption', '"uses 224M, 384M fewer FLOPs", in section 5.1 244M and 384M; its cells: '
     '1814 - 1579 = 235 and 3664 - 3299 = 365'),
    ('Table 2, caption', '"1.7 points and 2.2 points higher"; its cells: 72.0 - 69.9 = 2.1 and 74.8 - 73.3 = 1.5'),
    ('Table 3', 'R34, clustering-based: 3230, against 3299 filter-based; R18 has 1580 against 1579'),
    ('Table 4', 'R34 without the recurrent tokenizer: 3369, more than the 3299 with it; the rule gives 3269'),
    ('Table 7', 'R18 with projector: 11.7 M parameters; 11.6 M in Tables 2 to 6'),
    ('Tables 2 and 8', 'VT-R18 1579 and 1569 M, 11.6 and 11.7 M; VT-R34 3299 and 3236 M, 21.8 and 19.2 M'),
    ('Table 8', 'one VT stage for R50 and R101 (section 4), but it saves 25.5 - 21.4 = 4.1 M parameters in one and '
     '44.4 - 41.5 = 2.9 M in the other, 4089 - 3412 = 677 and 7802 - 7129 = 673 M multiply-adds'),
    ('Table 1', 'parameters in total, R18: 0.91, against 11.7 / 11.6 = 1.01 (Table 2); R34: 1.21, against '
     '21.8 / 21.8 = 1.00 (Table 2) or 21.8 / 19.2 = 1.14 (Table 8); R101: 1.19, against 44.4 / 41.5 = 1.07 (Table 8)'),
    ('Table 1', 'stage 5: 6.1 for R50 and 6.9 for R101, whose layer4 and VT stage are the same; R34: 5.0, against '
     '642 / (642 - 365) = 2.3 by Table 2'),
    ('Section 5.2', 'the gap "increases to 2.2 and 3.0 points" for R18 and R34; Table 8: 76.8 - 73.8 = 3.0 and '
     '79.9 - 77.7 = 2.2'),
    ('Abstract and section 1', 'the FPN needs 6.5 times fewer FLOPs in one and 6.4 times in the other'),
]


@dataclass(frozen=True)
class Counts:
    """Multiply-adds and weights of a model, and of its last stage (layer4 or vt_stage, without pooling and fc)."""
    total: int
    weights: int
    stage_total: int
    stage_weights: int
    lloyd: int  # multiply-adds of the k-means iterations, not in the totals


@cache
def count(spec: Spec) -> Counts:
    """Count a model on the meta device at 224x224."""
    model = timm.create_model(spec.name, device='meta', **dict(spec.options)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device='meta'))
    by_module = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}

    def multiply_adds(modules: List[torch.nn.Module]) -> int:
        wanted = {id(m) for m in modules}
        names = [name for name, m in model.named_modules() if id(m) in wanted]
        return sum(by_module.get(f'{type(model).__name__}.{name}', 0) for name in names)

    stage = getattr(model, 'vt_stage', None) or getattr(model, 'layer4', None) or torch.nn.Sequential()
    lloyd = multiply_adds([m for m in model.modules() if isinstance(m, KMeans)])
    return Counts(
        total=by_module['Global'] - lloyd,
        weights=count_weights(model),
        stage_total=multiply_adds(list(stage)) - lloyd,
        stage_weights=count_weights(stage),
        lloyd=lloyd,
    )


def ours(row: Row, column: str) -> Optional[float]:
    """Our number for a cell, in the unit of its column; None where there is nothing to count."""
    if row.model is None or column == 'accuracy, %':
        return None
    counts = count(row.model)
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
    """The record of a cell: paper, ours, difference, status and note."""
    printed, value = row.cells[column], ours(row, column)
    record = {
        'table': str(row.table), 'row': row.label, 'column': column, 'paper': printed, 'ours': '', 'difference': '',
        'status': 'unverified', 'note': ''}
    if column == 'accuracy, %':
        record['note'] = "the paper's"
    elif value is None:
        record['note'] = 'no such model in timm'
    else:
        paper, digits = float(printed), len(printed.partition('.')[2])
        difference = value / paper - 1
        close = abs(value - paper) <= 0.5 * 10 ** -digits or abs(difference) <= TOLERANCE
        record.update(
            ours=f'{value:.{max(digits, 2)}f}', difference=f'{100 * difference:+.2f} %',
            status='reproduced' if close else 'differing', note='' if close else row.reasons.get(column, ''))
        if count(row.model).lloyd and column.startswith('multiply-adds'):
            record['note'] += f'{"; " if record["note"] else ""}without {count(row.model).lloyd / 1e6:.1f} M of k-means'
    return record


def report(records: List[Dict[str, str]], environment: str) -> str:
    """The tables as Markdown."""
    tally = {s: sum(r['status'] == s for r in records) for s in ('reproduced', 'differing', 'unverified')}
    lines = [
        "# The paper's Tables 1 to 8", '', f'Command: `python benchmarks/paper_tables.py`. {environment}', '',
        'Multiply-adds and weights (no norms, no biases) of the real modules at 224x224, training form, by the flop '
        'counter of torch. A cell is *reproduced* within its rounding or 0.1 %. Accuracies are unverified: '
        f'nobody here has ImageNet. {tally["reproduced"]} cells are reproduced, {tally["differing"]} differ, '
        f'{tally["unverified"]} are unverified.', '']
    for table in sorted({r['table'] for r in records}):
        lines += [f'## Table {table}', '', '| row | column | paper | ours | difference | |', f'|{"---|" * 6}']
        for r in records:
            if r['table'] == table:
                status = f'{r["status"]}{": " if r["note"] else ""}{r["note"]}'
                cells = (r['row'], r['column'], r['paper'], r['ours'], r['difference'], status)
                lines.append(f'| {" | ".join(cells)} |')
        lines.append('')
    lines += ['## Errata: where the paper contradicts itself', '', '| where | what |', '|---|---|']
    lines += [f'| {where} | {what} |' for where, what in ERRATA]
    lines += ['', "## The paper's Figure 9", '',
              "![The paper's accuracies against its multiply-adds and parameters](paper_figure9.png)", '',
              "All numbers in this figure are the paper's (Table 8), accuracies unverified; none is from here.", '']
    return '\n'.join(lines)


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
    rows = [*_reduction_rows(), *_classification_rows()]
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
