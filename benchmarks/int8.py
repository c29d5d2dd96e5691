"""Accuracy, speed and size of int8 files of onnxruntime, with other nodes in float32 than `vt-zoo quantize` leaves.

    OMP_NUM_THREADS=1 python benchmarks/int8.py

quantises test_vt_resnet.digits in each way of `variants`, calibrated on training images, measures what its outputs
differ on the other training images, which decided what `vt-zoo quantize` does, and its accuracy on the 450 held-out
ones, which decided nothing. Speed and size, but no accuracy, are measured of VT-ResNets with random weights too. It
writes benchmarks/results/int8.md and .json; about 5 minutes.

Time is the CPU time of one thread, which others on the machine disturb less than a clock. Files take turns.
"""
import argparse
import random
import time
from functools import partial
from itertools import chain, product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Sequence

import numpy as np
import onnx
import onnxruntime
from harness import environments, machine, speed_up, table, time_in_turns, versions, write_runs
from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from speed import SIZE, create
from timm.data import resolve_data_config
from tqdm import tqdm

from vt_zoo.data.digits import write_digits
from vt_zoo.data.images import load_image
from vt_zoo.export.formats import export, quiet
from vt_zoo.export.int8 import DEFAULT_LIMIT, Reader, quantize_static_arguments
from vt_zoo.weights import load
from vt_zoo.weights.files import write_model

RESULTS = Path(__file__).parent / 'results'
DIGITS, FLOAT, CHOSEN = 'test_vt_resnet', 'float32', '`vt-zoo quantize`'
LARGE, OF_LARGE = ('vt_resnet18', 'vt_resnet50'), (CHOSEN, 'VT modules in float32')
NUM_NOISE = 8  # images of noise that a model with random weights is calibrated on
LIMITS, SEEDS = (1, 3, 10, 30, 100, 300, 1000), 3
ROUNDS = {1: 60, 16: 15}  # by batch


def variants(graph: onnx.GraphProto) -> Dict[str, Dict[str, Any]]:
    """Ways to quantise a graph: arguments for `quantize_static`, or for `quantize_dynamic` where the name says so."""
    chosen = quantize_static_arguments(graph)
    names = chosen['nodes_to_quantize']
    weights = {tensor.name for tensor in graph.initializer}
    op_types = {node.name: node.op_type for node in graph.node}
    products = [n.name for n in graph.node if n.op_type == 'MatMul' and weights.isdisjoint(n.input)]
    first = next(name for name in names if op_types[name] == 'Conv')

    def nodes_without(*left_out: str) -> Dict[str, Any]:
        return {**chosen, 'nodes_to_quantize': [
            name for name in names if name not in left_out and op_types[name] not in left_out]}

    return {
        CHOSEN: chosen,
        'weights of 8 bits': {**chosen, 'reduce_range': False},
        'signed activations': {**chosen, 'activation_type': QuantType.QInt8},
        "products' outputs in int8": {**chosen, 'extra_options': {}},
        'products of activations in int8': {**chosen, 'nodes_to_quantize': names + products},
        'first convolution in float32': nodes_without(first),
        'classifier in float32': nodes_without('Gemm'),
        'VT modules in float32': nodes_without('MatMul', 'Gemm'),
        'dynamic': {'weight_type': QuantType.QInt8},
        'dynamic, no convolutions': {'weight_type': QuantType.QInt8, 'op_types_to_quantize': ['MatMul', 'Gemm']}}


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """With one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])


def write_variants(file: Path, images: Sequence[np.ndarray], names: Sequence[str] = ()) -> Dict[str, Path]:
    """Files of the variants of these names, or of all, and the file itself."""
    prepared, paths = file.with_suffix('.prepared.onnx'), {FLOAT: file}
    quant_pre_process(file, prepared)  # with symbolic shapes, which quantize_dynamic needs
    ways = variants(onnx.load(prepared).graph)
    for name in tqdm(names or ways, f'quantising {file.stem}'):
        paths[name] = file.with_suffix(f'.{len(paths)}.onnx')
        with quiet():
            if name.startswith('dynamic'):
                quantize_dynamic(prepared, paths[name], **ways[name])
            else:
                quantize_static(prepared, paths[name], Reader(images), **ways[name])
    return paths


def logits_of(path: Path, images: np.ndarray) -> np.ndarray:
    """Logits that a file gives of images, one at a time."""
    session = open_session(path)
    return np.concatenate([session.run(None, {'image': x[None]})[0] for x in images])


def difference(result: np.ndarray, expected: np.ndarray) -> float:
    """Of logits: the norm of the difference as a share of the norm."""
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


def measure(model: str, paths: Dict[str, Path], size: int) -> List[dict]:
    """Size and CPU time of files."""
    sessions = {name: open_session(path) for name, path in paths.items()}
    runs = [
        {'model': model, 'file': name, 'bytes': path.stat().st_size, 'seconds': {}} for name, path in paths.items()]
    for batch, rounds in ROUNDS.items():
        x = np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)
        works = {name: partial(session.run, None, {'image': x}) for name, session in sessions.items()}
        seconds = time_in_turns(works, rounds, warm_up=3, desc=f'batch {batch}', clock=time.process_time)
        for run in runs:
            run['seconds'][str(batch)] = seconds[run['file']]
    return runs


def measure_digits(folder: Path) -> List[dict]:
    """All variants of the digits model, and how `vt-zoo quantize` depends on the number of images."""
    file = folder / 'digits.onnx'
    export(DIGITS, 'onnx', file)
    write_digits(folder / 'digits')
    prepare = load(DIGITS).prepare
    images = {}
    for split in ('train', 'val'):
        paths = sorted((folder / 'digits' / split).glob('*/*.png'))
        random.Random(0).shuffle(paths)
        images[split] = np.stack([prepare(load_image(path)).numpy() for path in tqdm(paths, split)])
    labels = np.array([int(path.parent.name) for path in paths])
    held_out, rest = images['val'], images['train'][DEFAULT_LIMIT:]
    files = write_variants(file, images['train'][:DEFAULT_LIMIT, None])
    runs = measure(DIGITS, files, rest.shape[-1])
    expected, expected_held_out = (logits_of(file, x) for x in (rest, held_out))
    for run in tqdm(runs, 'accuracy'):
        path = files[run['file']]
        classes = logits_of(path, held_out).argmax(1)
        run.update(
            difference=difference(logits_of(path, rest), expected), correct=int((classes == labels).sum()),
            same=int((classes == expected_held_out.argmax(1)).sum()))
    for limit, seed in tqdm(list(product(LIMITS, range(SEEDS))), 'numbers of images'):
        drawn = random.Random(seed).sample(range(len(images['train'])), limit)
        path = write_variants(file, images['train'][drawn][:, None], [CHOSEN])[CHOSEN]
        logits = logits_of(path, held_out)
        runs.append({
            'model': DIGITS, 'limit': limit, 'seed': seed, 'difference': difference(logits, expected_held_out),
            'correct': int((logits.argmax(1) == labels).sum())})
    return runs


def measure_large(folder: Path, name: str) -> List[dict]:
    """Size and speed of a model with random weights, calibrated on noise."""
    model = create(name)
    write_model(folder / name, model, None, resolve_data_config({}, model=model))
    file = folder / f'{name}.onnx'
    export(str(folder / name), 'onnx', file)
    noise = np.random.default_rng(1).standard_normal((NUM_NOISE, 1, 3, SIZE, SIZE), dtype=np.float32)
    return measure(name, write_variants(file, noise, OF_LARGE), SIZE)


def report(runs: List[dict]) -> str:
    """The result as Markdown."""
    floats = {r['model']: r['seconds'] for r in runs if r.get('file') == FLOAT}
    files, limits = [], []
    for r in runs:
        accuracy = (f'{100 * r["difference"]:.2f} %', r['correct']) if 'difference' in r else ('', '')
        if 'limit' in r:
            limits.append((r['limit'], r['seed'], *accuracy))
            continue
        speeds = (
            (f'{1000 * median(own):.2f}', speed_up(base, own))
            for own, base in zip(r['seconds'].values(), floats[r['model']].values()))
        files.append((r['model'], r['file'], *accuracy, r.get('same', ''), f'{r["bytes"] / 1000:.0f}', *chain(*speeds)))
    return '\n'.join([
        '# int8 by onnxruntime', '',
        f'Command: `OMP_NUM_THREADS=1 python benchmarks/int8.py`. {environments(runs)}', '',
        f'{CHOSEN} is what the command does; each other row changes one thing of it, but for *dynamic*. Times are '
        'medians of the CPU time of one thread, the files take turns; the speed-up over float32 is the median '
        'of the ratios in each round, in brackets their quartiles.', '',
        f'{DIGITS}.digits, 64x64, is calibrated on {DEFAULT_LIMIT} training images. The difference is the norm of the '
        'difference from the logits in float32, as a share of their norm, on the other training images, by which the '
        'nodes were chosen; right, and of the same class as in float32, are of the 450 held-out images, by which '
        f'nothing was. The others, {SIZE}x{SIZE}, have random weights and no accuracy.',
        *table((
            'model', 'file', 'difference', 'right', 'same class', 'kB',
            *chain(*((f'batch {batch}, ms', 'speed-up') for batch in ROUNDS))), files),
        f'{CHOSEN} of the digits model, calibrated on images drawn from all training images; the difference is on the '
        'held-out ones:',
        *table(('images', 'seed', 'difference', 'right'), limits)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder to write')
    args = parser.parse_args()
    onnxruntime.set_default_logger_severity(3)
    with TemporaryDirectory() as folder:
        runs = measure_digits(Path(folder))
        for name in LARGE:
            runs += measure_large(Path(folder), name)
    args.out.mkdir(parents=True, exist_ok=True)
    environment = f'{machine()}, {versions()}, onnxruntime {onnxruntime.__version__}'
    write_runs(args.out / 'int8.json', [{**run, 'environment': environment} for run in runs], report)


if __name__ == '__main__':
    main()
