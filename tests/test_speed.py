"""benchmarks/speed.py on the smallest models: what it runs, what it keeps, and that its report follows its numbers."""
import json
import multiprocessing
import re
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parents[1] / 'benchmarks'))
import speed

ROUNDS = 3
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(speed.CUDA or sys.platform != 'linux', reason='looks at the CPU, and Linux for memory')]


def run(out, *options):
    """Run it in a new process: in one with much freed memory a peak may be no higher."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(work, out, *options).result()


def work(out, *options):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {'BATCHES': (1, 2), 'SIZES': (224, 256), 'TOKENS': (16, 32)}.items():
            patch.setattr(speed, name, value)
        small = ['--models', 'test_resnet', '--modes', 'float32', '--rounds', str(ROUNDS)]
        patch.setattr(sys, 'argv', ['speed.py', *small, '--out', str(out), *options])
        speed.main()
    return json.loads((out / 'speed.json').read_text())


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp('speed')
    return out, run(out)


def test_each_part_is_timed_and_weighed(measured):
    _, results = measured
    assert list(results) == ['stage', 'models', 'training', 'growth']
    for part in results.values():
        records = [r for r in part['records'] if r['what'] != 'about']
        assert all(len(r['seconds']) == ROUNDS and min(r['seconds']) > 0 for r in records if 'seconds' in r)
    weighed = [r['bytes'] for part in results.values() for r in part['records'] if 'bytes' in r]
    assert len(weighed) > 4 and max(weighed) > 0  # of a small model what was freed before may be enough


def test_report_shows_the_numbers(measured):
    out, results = measured
    report = (out / 'speed.md').read_text()
    vt, layer4 = (
        next(r['seconds'] for r in results['stage']['records'] if (r['what'], r['name'], r['batch']) == ('stage', n, 2))
        for n in ('test_vt_resnet', 'test_resnet'))
    row = re.search(r'^\| test_resnet \| float32 \| 2 \| (\S+) \| (\S+) \| (\S+) ', report, re.M).groups()
    ratio = statistics.median(b / a for a, b in zip(vt, layer4))
    assert [float(cell) for cell in row] == pytest.approx(
        [1000 * statistics.median(vt), 1000 * statistics.median(layer4), ratio], abs=0.006)
    said = 'The last stage of test_vt_resnet is slower than layer4 in float32 at batch 2' in report
    assert said == (ratio < 1)


def test_a_part_is_measured_again_and_the_rest_kept(measured):
    out, results = measured
    again = run(out, '--parts', 'stage')
    assert again['stage'] != results['stage']
    assert all(again[part] == results[part] for part in ('models', 'training', 'growth'))


def test_memory_is_that_of_the_pass():
    """Doubling the batch doubles the activations."""
    one, two = (speed.measure_all_memory([speed.Job('model', 'test_vt_resnet', 'float32', n)])[0] for n in (4, 8))
    assert two['bytes'] == pytest.approx(2 * one['bytes'], rel=0.2)


def test_bare_products_do_the_work_of_the_stage():
    model = speed.best_form('test_vt_resnet')
    with torch.no_grad():
        x = speed.trunk_of(model)(torch.randn(2, 3, 64, 64))
        with FlopCounterMode(display=False) as whole:
            speed.LastStage(model)(x)
    products = speed.bare_products(speed.LastStage(model), x)
    with FlopCounterMode(display=False) as bare, torch.no_grad():
        products()
    assert 0 < bare.get_total_flops() == whole.get_total_flops()


def test_the_parts_make_the_model():
    model, x = speed.best_form('test_vt_resnet'), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(speed.LastStage(model)(speed.trunk_of(model)(x)), model(x))
