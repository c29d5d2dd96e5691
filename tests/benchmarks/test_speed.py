"""benchmarks/speed.py on the smallest models: what it runs, what it keeps, and that its report shows its numbers."""
import json
import multiprocessing
import re
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import speed
import torch
from PIL import Image

ROUNDS = 3
SMALL = {
    'RESNETS': ('test_resnet',), 'TRAINED': ('test_resnet',), 'REFERENCE': 'test_resnet', 'RIVALS': (),
    'MODES': ('float32',), 'BATCHES': (1, 2), 'TRAINING_BATCHES': (2,), 'SIZES': (224, 256), 'TOKENS': (16, 32),
    'NECK_SIZE': 64}
pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(sys.platform != 'linux', reason='asks Linux for memory')]


def run(out, *options):
    """Run it in a new process: in one with much freed memory a peak may be no higher."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        pool.submit(work, out, *options).result()
    return {
        run['part']: run['records'] for page in ('speed', 'segmentation_speed')
        for run in json.loads((out / f'{page}.json').read_text())['runs']}


def work(out, *options):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(speed, name, value)
        patch.setattr(sys, 'argv', ['speed.py', '--rounds', str(ROUNDS), '--out', str(out), *options])
        speed.main()


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp('speed')
    return out, run(out)


def test_each_part_is_timed_and_weighed(measured):
    _, results = measured
    assert list(results) == ['stage', 'models', 'training', 'photographs', 'growth', 'necks', 'segmenters']
    for records in results.values():
        assert all(len(r['seconds']) == ROUNDS and min(r['seconds']) > 0 for r in records)
    # of a small model what was freed before may be enough
    for part in ('training', 'photographs', 'growth', 'necks', 'segmenters'):
        assert max(r['bytes'] for r in results[part]) > 0


def test_report_shows_the_numbers(measured):
    out, results = measured
    report = (out / 'speed.md').read_text()
    vt, layer4 = (r['seconds'] for r in results['stage'] if r['batch'] == 2)
    row = re.search(
        r'^\| stage \| test_vt_resnet \| test_resnet \| float32 \| 2 \| 224 \|  \| (\S+) \| (\S+) \| (\S+) ', report,
        re.M)
    expected = [1000 * statistics.median(vt), 1000 * statistics.median(layer4)]
    expected.append(statistics.median(b / a for a, b in zip(vt, layer4)))
    assert [float(cell) for cell in row.groups()] == pytest.approx(expected, abs=0.006)
    for name in re.findall(r'\]\((\S+\.png)\)', report):
        Image.open(out / name).verify()


def test_a_part_is_measured_again_and_the_rest_kept(measured):
    out, results = measured
    again = run(out, '--parts', 'stage')
    assert again['stage'] != results['stage']
    assert all(again[part] == results[part] for part in results if part != 'stage')


def test_memory_is_that_of_the_pass():
    """Doubling the batch doubles the activations."""
    one, two = speed.measure_peaks([speed.Job('model', 'test_vt_resnet', batch=n) for n in (4, 8)])
    assert two == pytest.approx(2 * one, rel=0.2)


def test_the_parts_make_the_model():
    model, x = speed.best_form('test_vt_resnet'), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(speed.LastStage(model)(speed.trunk_of(model)(x)), model(x))
