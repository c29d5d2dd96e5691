"""What benchmarks/speed.py measured, as Markdown and plots."""
import statistics
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

from vt_zoo.files import whole

REFERENCE = 'resnet50'
MIB = 2 ** 20
DEEP = ('resnet34', 'resnet50', 'resnet101')
STAGE_GOALS = {  # times faster than layer4, on a CPU: of ResNet-18, of deeper ones
    ('float32', 1): (1.5, 2.0), ('float32', 16): (1.4, 1.8),
    ('bfloat16', 1): (2.0, 3.0), ('bfloat16', 16): (2.0, 3.0),
    ('float32 compile', 1): (1.1, 1.3), ('float32 compile', 16): (1.6, 2.5)}
MODEL_GOALS = {  # times faster than ResNet-50
    'cpu': {('float32', 1): 1.20, ('float32', 16): 1.06, ('bfloat16', 1): 1.28, ('bfloat16', 16): 1.14},
    'cuda': {('bfloat16 compile', 1): 1.0, ('bfloat16 compile', 256): 1.15}}
LIKE_COST = 1.25  # multiply-adds differ by at most this factor
LEVEL = 0.01  # a share that rises by no more is level
BLUE, ORANGE, GREY = '#0072b2', '#d55e00', '#595959'


def twin(name: str) -> str:
    """The VT-ResNet with a ResNet's trunk."""
    return name.replace('resnet', 'vt_resnet')


def _is_vt(name: str) -> bool:
    return 'vt_resnet' in name


def _base(name: str) -> str:
    return name.replace('vt_resnet', 'resnet')


class Records:
    """The records of one part."""

    def __init__(self, part: dict) -> None:
        self.all: List[dict] = part['records']
        self.device: str = part['device']

    def where(self, **fields) -> List[dict]:
        """Those that have these fields."""
        return [r for r in self.all if all(r.get(k) == v for k, v in fields.items())]

    def seconds(self, **fields) -> Optional[List[float]]:
        """Seconds of the runs of the one that has these fields."""
        return next((r['seconds'] for r in self.where(**fields) if 'seconds' in r), None)

    def mib(self, **fields) -> Optional[float]:
        """Peak memory in MiB of the one that has these fields."""
        return next((r['bytes'] / MIB for r in self.where(**fields) if 'bytes' in r), None)

    def settings(self, what: str) -> List[Tuple[str, int]]:
        """Modes and batches in which something was timed."""
        return list(dict.fromkeys((r['mode'], r['batch']) for r in self.where(what=what) if 'seconds' in r))


def _times(base: List[float], own: List[float]) -> float:
    """How many times faster than the base, median of the rounds."""
    return statistics.median(b / o for b, o in zip(base, own))


def _spread(base: List[float], own: List[float]) -> str:
    low, median, high = statistics.quantiles([b / o for b, o in zip(base, own)], n=4, method='inclusive')
    return f'{median:.2f} ({low:.2f} to {high:.2f})'


def _ms(seconds: List[float]) -> str:
    return f'{1000 * statistics.median(seconds):.2f}'


def _verdict(value: float, goal: Optional[float]) -> str:
    return '| | |' if goal is None else f'| {goal:.2f} | {"yes" if value >= goal else "**no**"} |'


def _table(*columns: str) -> List[str]:
    return ['', f'| {" | ".join(columns)} |', '|---' * len(columns) + '|']


def _stage_goal(records: Records, name: str, mode: str, batch: int) -> Optional[float]:
    if records.device == 'cpu' and (mode, batch) in STAGE_GOALS and name in ('resnet18', *DEEP):
        return STAGE_GOALS[mode, batch][name in DEEP]
    return None


def _model_goal(records: Records, name: str, mode: str, batch: int) -> Optional[float]:
    return MODEL_GOALS[records.device].get((mode, batch)) if name == REFERENCE else None


def report_stage(records: Records) -> List[str]:
    """The last stage against layer4, and what its matrix products alone take."""
    lines = [
        '## The last stage', '',
        'From the map of stride 16 to the logits: VT modules and classifier against layer4, pooling and classifier of '
        "the same ResNet. *Bare products* are the VT stage's matrix products alone, each on its operands and into "
        'memory that is there already: code that calls the same library for them cannot take less. torch.compile with '
        'freezing packs weights ahead, so there they are no floor and are left out. The last stages of ResNet-50 '
        'and ResNet-101 are the same.',
        *_table('stage of', 'mode', 'batch', 'VT, ms', 'layer4, ms', 'times faster', 'goal', 'reached',
                'bare products, ms', 'layer4 / bare products')]
    missed = []
    for r in records.where(what='stage'):
        if not _is_vt(r['name']):
            continue
        key = {'mode': r['mode'], 'batch': r['batch']}
        own, base = r['seconds'], records.seconds(what='stage', name=_base(r['name']), **key)
        floor = records.seconds(what='products', name=r['name'], **key)
        goal, times = _stage_goal(records, _base(r['name']), **key), _times(base, own)
        bare = f'{_ms(floor)} | {_spread(base, floor)} |' if floor else '| |'
        lines.append(
            f'| {_base(r["name"])} | {r["mode"]} | {r["batch"]} | {_ms(own)} | {_ms(base)} | {_spread(base, own)} '
            f'{_verdict(times, goal)} {bare}')
        if goal and times < goal:
            text = f'{_base(r["name"])}, {r["mode"]}, batch {r["batch"]}: {times:.2f} of {goal}.'
            if floor:
                most, share = _times(base, floor), _times(floor, own)
                text += (
                    f' The bare products are {100 * share:.0f} % of the time of the stage; were they all of it, it '
                    f'would be {most:.2f} times faster than layer4, which {"misses" if most < goal else "reaches"} '
                    'the goal.')
            missed.append(f'- {text}')
    return [*lines, '', *(['Goals that are not reached:', '', *missed, ''] if missed else [])]


def _rate(record: dict) -> float:
    return record['batch'] / statistics.median(record['seconds'])


def report_models(records: Records) -> List[str]:
    """Whole models: speed, share of the last stage, memory."""
    about = {r['name']: r for r in records.where(what='about')}
    reference = REFERENCE if REFERENCE in about else next(n for n in about if not _is_vt(n))
    other_size = [f'{r["name"]} ({r["size"]})' for r in about.values() if r['size'] != 224]
    kept = [f'{r["name"]} ({r["norms_left"]})' for r in about.values() if r['norms_left']]
    absent = [r['name'] for r in records.where(what='absent')]
    lines = [
        '## Whole models', '',
        f'Images a second, median of the rounds, and how many times faster than {reference}, median of the ratios in '
        'each round (and their quartiles). Multiply-adds and parameters are those of the form that ran. Its outputs '
        f'differ by at most {max(r["difference"] for r in about.values()):.0e} of the largest from those of the model '
        'as it is trained. Accuracy is not compared here. Images are 224x224'
        + (f', but for models of a fixed size: {", ".join(other_size)}' if other_size else '') + '.'
        + (f' Batch norms that cannot be folded stayed in {", ".join(kept)}.' if kept else '')
        + (f' timm has no {", ".join(absent)}.' if absent else '')]
    settings = records.settings('model')
    for batch in sorted({batch for _, batch in settings}):
        modes = [mode for mode, b in settings if b == batch]
        lines += [
            '', f'Batch {batch}:',
            *_table('model', 'multiply-adds, M', 'parameters, M',
                    *(c for mode in modes for c in (f'{mode}, images/s', f'times {reference}')))]
        for name, r in sorted(about.items(), key=lambda item: item[1]['multiply_adds']):
            cells = [name, f'{r["multiply_adds"] / 1e6:.0f}', f'{r["parameters"] / 1e6:.1f}']
            for mode in modes:
                key = {'what': 'model', 'mode': mode, 'batch': batch}
                own, base = (records.seconds(name=n, **key) for n in (name, reference))
                cells.append(f'{batch / statistics.median(own):.1f}' if own else '')
                cells.append(_spread(base, own) if own and base else '')
            lines.append(f'| {" | ".join(cells)} |')
        rates = [
            (records.seconds(what='model', name=name, mode=mode, batch=batch) for mode in ('bfloat16', 'float32'))
            for name in about]
        slower = [_times(half, single) > 1 for half, single in rates if half and single]
        if any(slower):
            lines += ['', f'On this device bfloat16 is slower than float32 for {sum(slower)} of {len(slower)} models.']
    lines += [
        '', '### Against the same ResNet', '',
        'The floor is the same trunk with no last stage at all: no last stage can be faster. Shares are those of the '
        'last stage in the time of the whole model.',
        *_table('model', 'mode', 'batch', 'times faster', 'goal', 'reached', 'floor', 'share, VT', 'share, layer4')]
    for name in filter(_is_vt, about):
        for mode, batch in settings:
            key = {'mode': mode, 'batch': batch}
            own, base = (records.seconds(what='model', name=n, **key) for n in (name, _base(name)))
            trunk = records.seconds(what='trunk', name=_base(name), **key)
            if not own:
                continue
            goal = _model_goal(records, _base(name), **key)
            floor = [
                _spread(base, trunk), *(f'{100 * (1 - _times(trunk, s)):.0f} %' for s in (own, base))] if trunk else []
            lines.append(
                f'| {name} | {mode} | {batch} | {_spread(base, own)} {_verdict(_times(base, own), goal)} '
                f'{" | ".join(floor or [""] * 3)} |')
    peaks = list(dict.fromkeys((r['mode'], r['batch']) for r in records.where(what='model') if 'bytes' in r))
    lines += [
        '', '### Peak memory', '',
        'MiB that one pass needs at its peak beyond weights and images, in a process of its own.',
        *_table('model', 'weights in float32', *(f'{mode}, batch {batch}' for mode, batch in peaks))]
    for name, r in about.items():
        mib = (records.mib(what='model', name=name, mode=mode, batch=batch) for mode, batch in peaks)
        lines.append(f'| {name} | {4 * r["parameters"] / MIB:.0f} | {" | ".join(f"{m:.0f}" for m in mib)} |')
    return [*lines, '']


def report_training(records: Records) -> List[str]:
    """A training step."""
    lines = [
        '## Training', '',
        'A step: forward, backward and SGD with momentum, on random images. Memory is what it needs at its peak beyond '
        'weights and images: activations, gradients and momentum.',
        *_table('model', 'mode', 'batch', 'ms a step', 'times faster than its ResNet', 'MiB', "of its ResNet's")]
    for r in records.where(what='training'):
        if 'seconds' in r:
            which = {'what': 'training', 'batch': r['batch']}
            base, mib = (f(name=_base(r['name']), **which) for f in (records.seconds, records.mib))
            own = records.mib(name=r['name'], **which)
            last = f'{_spread(base, r["seconds"])} | {own:.0f} | {100 * own / mib:.0f} %'
            lines.append(
                f'| {r["name"]} | {r["mode"]} | {r["batch"]} | {_ms(r["seconds"])} | '
                f'{last if _is_vt(r["name"]) else f" | {own:.0f} | "} |')
    return [*lines, '']


def growth_cases(records: Records) -> Iterator[dict]:
    """Each size and number of tokens: seconds, MiB, and shares of the whole model's time, of VT and of layer4."""
    trunks = [r['seconds'] for r in records.where(what='trunk')]
    timed = [r for r in records.where(what='stage') if 'seconds' in r]
    for vt, base, trunk in zip(timed[::2], timed[1::2], trunks):
        key = {'what': 'stage', 'size': vt['size']}
        yield {
            'name': vt['name'], 'size': vt['size'], 'num_tokens': vt['num_tokens'],
            'seconds': (vt['seconds'], base['seconds']),
            'mib': tuple(records.mib(name=r['name'], num_tokens=r['num_tokens'], **key) for r in (vt, base)),
            'share': tuple(
                statistics.median(s / (s + t) for s, t in zip(r['seconds'], trunk)) for r in (vt, base))}


def _by_size_and_tokens(records: Records) -> Tuple[List[dict], List[dict]]:
    cases = list(growth_cases(records))
    return (
        [c for c in cases if c['num_tokens'] == cases[0]['num_tokens']],
        [c for c in cases if c['size'] == cases[0]['size']])


def report_growth(records: Records) -> List[str]:
    """Last stage by size and by tokens."""
    by_size, by_tokens = _by_size_and_tokens(records)
    lines = [
        '## Growth', '',
        f'Last stage of {by_size[0]["name"]} and layer4 of {_base(by_size[0]["name"])}, one image, float32 eager: by '
        f'size of the image with {by_size[0]["num_tokens"]} tokens, and by tokens at {by_tokens[0]["size"]}x'
        f'{by_tokens[0]["size"]}. The share is that of the last stage in its time and that of the trunk; memory is '
        'beyond weights and the incoming map.',
        *_table('image', 'tokens', 'VT, ms', 'layer4, ms', 'times faster', 'share, VT', 'share, layer4', 'VT, MiB',
                'layer4, MiB')]
    for c in by_size + by_tokens[1:]:
        (own, base), shares, mib = c['seconds'], c['share'], c['mib']
        lines.append(
            f'| {c["size"]} | {c["num_tokens"]} | {_ms(own)} | {_ms(base)} | {_spread(base, own)} | '
            f'{100 * shares[0]:.1f} % | {100 * shares[1]:.1f} % | {mib[0]:.1f} | {mib[1]:.1f} |')
    first, last = by_size[0]['share'], by_size[-1]['share']
    rises = max(c['share'][0] for c in by_size) - first[0] > LEVEL
    return [
        *lines, '',
        f"VT's share goes from {100 * first[0]:.1f} % at {by_size[0]['size']} to {100 * last[0]:.1f} % at "
        f"{by_size[-1]['size']}, layer4's from {100 * first[1]:.1f} % to {100 * last[1]:.1f} %. VT's "
        f'{"rises in between or at the end" if rises else "falls or stays level"}.', '']


def _losses_of_stage(records: Records) -> Iterator[str]:
    for r in records.where(what='stage'):
        base = records.seconds(what='stage', name=_base(r['name']), mode=r['mode'], batch=r['batch'])
        if _is_vt(r['name']) and _times(base, r['seconds']) < 1:
            yield (f'The last stage of {r["name"]} is slower than layer4 in {r["mode"]} at batch {r["batch"]} '
                   f'({_times(base, r["seconds"]):.2f} times its speed).')


def _losses_of_models(records: Records) -> Iterator[str]:
    about = {r['name']: r for r in records.where(what='about')}
    settings = records.settings('model')
    for name in filter(_is_vt, about):
        losses = []
        for other, r in about.items():
            cost = r['multiply_adds'] / about[name]['multiply_adds']
            if _is_vt(other) or (other != _base(name) and not 1 / LIKE_COST <= cost <= LIKE_COST):
                continue
            faster = []
            for mode, batch in settings:
                own, theirs = (records.seconds(what='model', name=n, mode=mode, batch=batch) for n in (name, other))
                if own and theirs and _times(own, theirs) > 1:
                    faster.append(f'{mode} batch {batch} ({_times(own, theirs):.2f})')
            if faster:
                losses.append(f'{other} is faster in {", ".join(faster)}')
        if losses:
            yield f'Speed of {name}, beside its ResNet and models of like cost: {"; ".join(losses)}.'
        for what, key in (('parameters', 'parameters'), ('multiply-adds', 'multiply_adds')):
            if about[name][key] > about[_base(name)][key]:
                more = about[name][key] / about[_base(name)][key]
                yield f'{name} has {more:.2f} times the {what} of {_base(name)}.'
    larger = []
    for r in records.where(what='model'):
        if 'bytes' in r and _is_vt(r['name']):
            base = records.mib(what='model', name=_base(r['name']), mode=r['mode'], batch=r['batch'])
            if r['bytes'] / MIB > 1.01 * base:
                larger.append(f'{r["name"]} {r["mode"]} batch {r["batch"]} ({r["bytes"] / MIB / base:.2f} times)')
    if larger:
        yield f'Peak memory is more than that of the same ResNet: {", ".join(larger)}.'


def _losses_of_training(records: Records) -> Iterator[str]:
    for r in records.where(what='training'):
        if _is_vt(r['name']):
            base = next(
                b for b in records.where(what='training', name=_base(r['name']), batch=r['batch'])
                if b.keys() == r.keys())
            if 'seconds' in r and _times(base['seconds'], r['seconds']) < 1:
                yield (f'A training step of {r["name"]} on {r["batch"]} images takes '
                       f'{_times(r["seconds"], base["seconds"]):.2f} times the time of one of {base["name"]}.')
            elif 'bytes' in r and r['bytes'] > base['bytes']:
                yield (f'A training step of {r["name"]} on {r["batch"]} images needs '
                       f'{r["bytes"] / base["bytes"]:.2f} times the memory of one of {base["name"]}.')


def _losses_of_growth(records: Records) -> Iterator[str]:
    slower = [
        f'{c["num_tokens"]} tokens at {c["size"]}' for c in growth_cases(records) if _times(*c['seconds'][::-1]) < 1]
    if slower:
        yield f'The last stage is slower than layer4 with {", ".join(slower)}.'
    more = [f'{c["num_tokens"]} tokens at {c["size"]}' for c in growth_cases(records) if c['mib'][0] > c['mib'][1]]
    if more:
        yield f'The last stage needs more memory than layer4 with {", ".join(more)}.'


PARTS = {
    'stage': (report_stage, _losses_of_stage), 'models': (report_models, _losses_of_models),
    'training': (report_training, _losses_of_training), 'growth': (report_growth, _losses_of_growth)}


def draw_models(records: Records, path: Path) -> None:
    """Images a second against multiply-adds, in the first mode."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    costs = {r['name']: r['multiply_adds'] / 1e9 for r in records.where(what='about')}
    vts, bases = [n for n in costs if _is_vt(n)], [n for n in costs if not _is_vt(n) and twin(n) in costs.keys() - {n}]
    groups = [
        (vts, {'color': ORANGE, 'marker': 'D'}), (bases, {'color': BLUE, 'marker': 'o'}),
        ([n for n in costs if n not in vts + bases], {'color': GREY, 'marker': 's', 'linestyle': 'none'})]
    first = records.settings('model')[0][0]
    batches = [batch for mode, batch in records.settings('model') if mode == first]
    figure = Figure(figsize=(11, 5), dpi=90, layout='constrained')
    axes = figure.subplots(1, len(batches), squeeze=False)[0]
    for ax, batch in zip(axes, batches):
        for names, style in groups:
            rates = [_rate(r) for n in names for r in records.where(what='model', name=n, mode=first, batch=batch)
                     if 'seconds' in r]
            ax.plot([costs[n] for n in names], rates, markersize=6, linewidth=0.8, **style)
        ax.set(xscale='log', yscale='log', title=f'{first}, batch {batch}',
               xlabel='multiply-adds of an image, G', ylabel='images a second')
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6)))
            axis.set_major_formatter(StrMethodFormatter('{x:g}'))
        ax.minorticks_off()
        ax.margins(0.12)
        ax.grid(alpha=0.2)
    figure.draw_without_rendering()
    figure.set_layout_engine('none')  # labels go where the points now are
    for ax in axes:
        _label(ax, {n: (point, style['color']) for (names, style), line in zip(groups, ax.lines)
                    for n, point in zip(names, line.get_xydata())})
    with whole(path) as new:
        figure.savefig(new)


def _label(ax, points: Dict[str, tuple]) -> None:
    """Write the names of points, each of a colour, as near as they cover no other name and no point."""
    from matplotlib.patheffects import withStroke

    frame = ax.get_window_extent()
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in (ax.transData.transform(point) for point, _ in points.values())]
    offsets = sorted(  # in pixels, of the middle of the text
        ((dx, dy) for dx in range(-150, 151, 3) for dy in range(-120, 121, 3)), key=lambda d: d[0] ** 2 + 9 * d[1] ** 2)
    for name, (point, colour) in points.items():
        text = ax.text(0, 0, name, fontsize=8, color=colour, ha='center', va='center', transform=None)
        size, (x, y) = text.get_window_extent(), ax.transData.transform(point)
        for dx, dy in offsets:
            x0, x1 = x + dx - size.width / 2, x + dx + size.width / 2
            y0, y1 = y + dy - size.height / 2, y + dy + size.height / 2
            if (frame.x0 < x0 and x1 < frame.x1 and frame.y0 < y0 and y1 < frame.y1
                    and all(x1 < a0 or x0 > a1 or y1 < b0 or y0 > b1 for a0, b0, a1, b1 in taken)):
                break
        taken.append((x0, y0, x1, y1))
        text.set(position=(x + dx, y + dy), path_effects=[withStroke(linewidth=2, foreground='white')])


def draw_growth(records: Records, path: Path) -> None:
    """Time, share and memory of the last stage against size and tokens."""
    from matplotlib.figure import Figure

    by_size, by_tokens = _by_size_and_tokens(records)
    figure = Figure(figsize=(10, 6), dpi=90, layout='constrained')
    panels = {
        'time, ms': lambda c, i: 1000 * statistics.median(c['seconds'][i]),
        "share of the whole model's time, %": lambda c, i: 100 * c['share'][i],
        'peak memory, MiB': lambda c, i: c['mib'][i]}
    axes = figure.subplots(2, 3)
    for row, cases, key, label in zip(
            axes, (by_size, by_tokens), ('size', 'num_tokens'), ('image, pixels a side', 'tokens')):
        for ax, (title, value) in zip(row, panels.items()):
            x = [c[key] for c in cases]
            ax.plot(x, [value(c, 0) for c in cases], 'D-', color=ORANGE, label=f'last stage of {by_size[0]["name"]}')
            ax.plot(x, [value(c, 1) for c in cases], 'o--', color=BLUE, label=f'layer4 of {_base(by_size[0]["name"])}')
            ax.set_xscale('log')
            ax.set_xticks(x, x)
            ax.minorticks_off()
            ax.set_ylim(bottom=0)
            ax.set(xlabel=label, title=title)
            ax.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=2)
    with whole(path) as new:
        figure.savefig(new)


def write_report(results: Dict[str, dict], stem: Path) -> None:
    """Write <stem>.md and the plots of the parts that are there."""
    parts = {name: Records(results[name]) for name in PARTS if name in results}
    lines = ['# Speed', '']
    runs: Dict[str, List[str]] = {}
    for name in parts:
        r = results[name]
        runs.setdefault(f'`{r["command"]}`. {r["machine"]}, {r["versions"]}', []).append(
            f'{name} {r["minutes"]:.1f} min')
    for run, names in runs.items():
        lines += [f'Command: {run}. Time: {", ".join(names)}.', '']
    lines += [
        "Each model is in its best public form: timm's `reparameterize_model`, then batch norms folded into "
        'convolutions. Images are random. Memory format is channels_last where nothing else is said; *compile* is '
        'torch.compile with freezing, other modes are eager. What is compared takes turns; times are medians of the '
        'rounds, ratios medians of the ratios in each round, in brackets their quartiles.', '']
    for name, records in parts.items():
        lines += PARTS[name][0](records)
    losses = [f'- {loss}' for name, records in parts.items() for loss in PARTS[name][1](records)]
    lines += [
        '## Where VT loses', '',
        f'Like cost is within {LIKE_COST} times the multiply-adds, up or down; in brackets how many times faster the '
        'other is.', '', *(losses or ['- Nowhere, in what was measured.']), '']
    if 'models' in parts:
        draw_models(parts['models'], stem.with_suffix('.png'))
        lines[-1:] = ['', f'![Images a second against multiply-adds]({stem.name}.png)', '']
    if 'growth' in parts:
        draw_growth(parts['growth'], stem.with_name(f'{stem.name}_growth.png'))
        lines[-1:] = ['', f'![Growth of the last stage]({stem.name}_growth.png)', '']
    with whole(stem.with_suffix('.md')) as new:
        new.write_text('\n'.join(lines))
