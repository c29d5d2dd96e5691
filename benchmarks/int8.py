"""Accuracy, speed and size of int8 files of onnxruntime, with other nodes in float32 than `vt-zoo quantize` leaves.

    OMP_NUM_THREADS=1 python benchmarks/int8.py

quantises test_vt_resnet.digits in each way of `variants`, calibrated on training images, measures what its outputs
differ on the other training images, which decided what `vt-zoo quantize` does, and its accuracy on the 450 held-out
ones, which decided nothing. Speed and size, but no accuracy, are measured of VT-ResNets with random weights too. It
writes benchmarks/results/int8.md and .json; about 5 minutes.

Time is the CPU time of one thread, which others on the machine disturb less than a clock. Files take turns.
"""
import argparse
import json
import random
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Tuple

import numpy as np
import onnx
import onnxruntime
import timm
from harness import versions
from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from speed import create, machine
from timm.data import resolve_data_config
from tqdm import tqdm

from vt_zoo.data.digits import write_digits
from vt_zoo.data.images import load_image
from vt_zoo.export.formats import export, quiet
from vt_zoo.export.int8 import DEFAULT_LIMIT, OF_MAPS, Reader, quantize_static_arguments
from vt_zoo.files import whole
from vt_zoo.weights import load
from vt_zoo.weights.files import write_model

RESULTS = Path(__file__).parent / 'results'
FLOAT, CHOSEN = 'float32', '`vt-zoo quantize`'
LARGE = ('vt_resnet18', 'vt_resnet50')
OF_LARGE = (CHOSEN, 'weights of 8 bits', 'everything that runs', 'VT modules in float32', 'dynamic, no convolutions')
NUM_NOISE = 8  # images of noise that a model with random weights is calibrated on
LIMITS, SEEDS = (1, 3, 10, 30, 100, 300, 1000), 3
ROUNDS = {1: 60, 16: 15}  # by batch
WARM_UP = 3


def variants(graph: onnx.GraphProto) -> Dict[str, Dict[str, Any]]:
    """Ways to quantise a graph: arguments for `quantize_static`, or 'dynamic' and those for `quantize_dynamic`."""
    chosen = quantize_static_arguments(graph)
    names = chosen['nodes_to_quantize']
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    op_types = {node.name: node.op_type for node in graph.node}
    stacks = [n.name for n in graph.node if n.op_type == 'MatMul' and any(ranks.get(i, 0) > 2 for i in n.input)]
    products = [n.name for n in graph.node if n.op_type == 'MatMul' and not any(i in ranks for i in n.input)]
    first = next(name for name in names if op_types[name] == 'Conv')
    everything = {
        **chosen, 'op_types_to_quantize': None, 'nodes_to_quantize': None, 'nodes_to_exclude': stacks,
        'extra_options': {}}

    def nodes_without(*left_out: str) -> Dict[str, Any]:
        return {**chosen, 'nodes_to_quantize': [
            name for name in names if name not in left_out and op_types[name] not in left_out]}

    return {
        CHOSEN: chosen,
        'weights of 8 bits': {**chosen, 'reduce_range': False},
        'one scale for each matrix': {**chosen, 'per_channel': False},
        'signed activations': {**chosen, 'activation_type': QuantType.QInt8},
        'ranges of 99.99 % of the values': {
            **chosen, 'calibrate_method': CalibrationMethod.Percentile,
            'extra_options': {**chosen['extra_options'], 'CalibPercentile': 99.99}},
        "products' outputs in int8": {**chosen, 'extra_options': {}},
        'products of activations in int8': {**chosen, 'nodes_to_quantize': names + products},
        'everything that runs': everything,
        'first convolution in float32': nodes_without(first),
        'sums, maxima, ReLUs in float32': nodes_without(*OF_MAPS),
        'classifier in float32': nodes_without('Gemm'),
        'VT modules in float32': nodes_without('MatMul', 'Gemm'),
        'dynamic': {'dynamic': True, 'weight_type': QuantType.QInt8},
        'dynamic, no convolutions': {
            'dynamic': True, 'weight_type': QuantType.QInt8, 'op_types_to_quantize': ['MatMul', 'Gemm']}}


def write_variant(prepared: Path, path: Path, arguments: Dict[str, Any], images: List[np.ndarray]) -> None:
    """Quantise a file of `quant_pre_process`."""
    with quiet():
        if arguments.get('dynamic'):
            quantize_dynamic(prepared, path, **{k: v for k, v in arguments.items() if k != 'dynamic'})
        else:
            quantize_static(prepared, path, Reader(images), **arguments)


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """With one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])


def run_all(session: onnxruntime.InferenceSession, images: np.ndarray) -> np.ndarray:
    """Logits of images, one at a time."""
    return np.concatenate([session.run(None, {'image': x[None]})[0] for x in images])


def difference(result: np.ndarray, expected: np.ndarray) -> float:
    """Of logits: the norm of the difference as a share of the norm."""
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


def time_sessions(sessions: Dict[str, onnxruntime.InferenceSession], size: int) -> Dict[str, Dict[int, List[float]]]:
    """Seconds of CPU time by file and batch."""
    seconds = {name: {batch: [] for batch in ROUNDS} for name in sessions}
    for batch, rounds in ROUNDS.items():
        x = np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)
        for i in tqdm(range(WARM_UP + rounds), f'batch {batch}'):
            for name, session in sessions.items():
                start = time.process_time()
                session.run(None, {'image': x})
                if i >= WARM_UP:
                    seconds[name][batch].append(time.process_time() - start)
    return seconds


def measure(
        file: Path,
        images: List[np.ndarray],
        size: int,
        names: Tuple[str, ...] = (),
) -> Tuple[Dict[str, dict], Dict[str, onnxruntime.InferenceSession]]:
    """Files of variants, their size and speed; the sessions are for what else is to be measured."""
    prepared = file.with_suffix('.prepared.onnx')
    quant_pre_process(file, prepared)  # with symbolic shapes, which quantize_dynamic needs
    paths = {FLOAT: file}
    ways = variants(onnx.load(prepared).graph)
    for i, name in enumerate(tqdm(names or ways, f'quantising {file.stem}')):
        paths[name] = file.with_suffix(f'.{i}.onnx')
        write_variant(prepared, paths[name], ways[name], images)
    sessions = {name: open_session(path) for name, path in paths.items()}
    seconds = time_sessions(sessions, size)
    return {name: {'bytes': paths[name].stat().st_size, 'seconds': seconds[name]} for name in paths}, sessions


def measure_digits(folder: Path) -> Tuple[Dict[str, dict], List[dict]]:
    """All variants of the digits model, and how `vt-zoo quantize` depends on the number of images."""
    file = folder / 'digits.onnx'
    export('test_vt_resnet', 'onnx', file)
    write_digits(folder / 'digits')
    prepare = load('test_vt_resnet').prepare
    images, labels = {}, {}
    for split in ('train', 'val'):
        paths = sorted((folder / 'digits' / split).glob('*/*.png'))
        random.Random(0).shuffle(paths)
        images[split] = np.stack([prepare(load_image(path)).numpy() for path in tqdm(paths, split)])
        labels[split] = np.array([int(path.parent.name) for path in paths])
    calibration, rest = images['train'][:DEFAULT_LIMIT, None], images['train'][DEFAULT_LIMIT:]
    records, sessions = measure(file, calibration, rest.shape[-1])
    expected, expected_val = run_all(sessions[FLOAT], rest), run_all(sessions[FLOAT], images['val'])
    for name, session in tqdm(sessions.items(), 'accuracy'):
        logits = run_all(session, images['val'])
        records[name].update(
            difference=difference(run_all(session, rest), expected), total=len(logits),
            correct=int((logits.argmax(1) == labels['val']).sum()),
            same=int((logits.argmax(1) == expected_val.argmax(1)).sum()))
    prepared = file.with_suffix('.prepared.onnx')
    arguments = quantize_static_arguments(onnx.load(prepared).graph)
    by_limit = []
    for limit in tqdm(LIMITS, 'numbers of images'):
        for seed in range(SEEDS):
            drawn = random.Random(seed).sample(range(len(images['train'])), limit)
            write_variant(prepared, folder / 'limit.onnx', arguments, images['train'][drawn][:, None])
            logits = run_all(open_session(folder / 'limit.onnx'), images['val'])
            by_limit.append({
                'limit': limit, 'seed': seed, 'difference': difference(logits, expected_val),
                'correct': int((logits.argmax(1) == labels['val']).sum())})
    return records, by_limit


def measure_large(folder: Path, name: str) -> Dict[str, dict]:
    """Size and speed of a model with random weights, calibrated on noise."""
    model = create(name)
    write_model(folder / name, model, None, resolve_data_config({}, model=model))
    file = folder / f'{name}.onnx'
    export(str(folder / name), 'onnx', file)
    size = timm.get_pretrained_cfg(name).input_size[-1]
    noise = np.random.default_rng(1).standard_normal((NUM_NOISE, 1, 3, size, size), dtype=np.float32)
    return measure(file, noise, size, OF_LARGE)[0]


def _speed(records: Dict[str, dict], name: str, batch: int) -> str:
    seconds, base = records[name]['seconds'][batch], records[FLOAT]['seconds'][batch]
    low, ratio, high = statistics.quantiles([b / s for b, s in zip(base, seconds)], n=4)
    times = '' if name == FLOAT else f'{ratio:.2f} ({low:.2f} to {high:.2f})'
    return f'{1000 * statistics.median(seconds):.2f} | {times}'


def report(digits: Dict[str, dict], by_limit: List[dict], large: Dict[str, Dict[str, dict]], environment: str) -> str:
    """The result as Markdown."""
    speeds = ' | '.join(f'batch {b}, ms | times faster' for b in ROUNDS)
    lines = [
        '# int8 by onnxruntime', '',
        f'Command: `OMP_NUM_THREADS=1 python benchmarks/int8.py`. {environment}.', '',
        f'{CHOSEN} is what the command does; each other row changes one thing of it, but for the three that are named '
        '*everything* and *dynamic*. Times are medians of the CPU time of one thread, the files take turns; how many '
        'times faster than float32 is the median of the ratios in each round, in brackets their quartiles. The '
        'difference is the norm of the difference from the logits in float32, as a share of their norm.', '',
        '## test_vt_resnet.digits, 64x64', '',
        f'Calibrated on {DEFAULT_LIMIT} training images. The difference is that on the other training images, by which '
        'the nodes were chosen; right are the held-out images, by which nothing was.', '',
        f'| file | difference | right of {digits[FLOAT]["total"]} | accuracy | same class as float32 | kB | {speeds} |',
        '|' + '---|' * 10]
    for name, r in digits.items():
        lines.append(
            f'| {name} | {100 * r["difference"]:.2f} % | {r["correct"]} | {100 * r["correct"] / r["total"]:.2f} % | '
            f'{r["same"]} | {r["bytes"] / 1000:.0f} | ' + ' | '.join(_speed(digits, name, b) for b in ROUNDS) + ' |')
    lines += [
        '', f'Number of images that {CHOSEN} is calibrated on, drawn from all training images with {SEEDS} seeds, and '
        'the difference on the held-out images:', '',
        '| images | difference, each seed | right, each seed |', '|---|---|---|']
    for limit in LIMITS:
        of_limit = [r for r in by_limit if r['limit'] == limit]
        differences = ', '.join(f'{100 * r["difference"]:.1f} %' for r in of_limit)
        lines.append(f'| {limit} | {differences} | {", ".join(str(r["correct"]) for r in of_limit)} |')
    for model, records in large.items():
        lines += [
            '', f'## {model}, 224x224, random weights', '',
            'Speed and size alone: what trained weights lose was not measured, and these have no accuracy.', '',
            f'| file | MB | {speeds} |', '|' + '---|' * 6]
        for name, r in records.items():
            lines.append(
                f'| {name} | {r["bytes"] / 1e6:.1f} | ' + ' | '.join(_speed(records, name, b) for b in ROUNDS) + ' |')
    return '\n'.join([*lines, ''])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write')
    args = parser.parse_args()
    environment = f'{machine()}, {versions()}, onnxruntime {onnxruntime.__version__}'
    onnxruntime.set_default_logger_severity(3)
    with TemporaryDirectory() as folder:
        digits, by_limit = measure_digits(Path(folder))
        large = {name: measure_large(Path(folder), name) for name in LARGE}
    text = report(digits, by_limit, large, environment)
    log = {'environment': environment, 'digits': digits, 'by_limit': by_limit, **large}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, content in (('int8.json', json.dumps(log, indent=1) + '\n'), ('int8.md', text)):
        with whole(args.out / name) as new:
            new.write_text(content)
    print(text)


if __name__ == '__main__':
    main()
