"""What README and the first pages show runs as it stands there, and their numbers are those of the models."""
import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from documents import blocks
from helpers import SHAPE, shapes_shown, shell_words
from paper_order import in_paper_order
from torch.utils.flop_counter import FlopCounterMode

from vt_zoo.analysis.cost import count_multiply_adds, count_weights
from vt_zoo.models.vt_fpn import VTFPN, PanopticFPN

ROOT = Path(__file__).parents[2]
README = (ROOT / 'README.md').read_text()
PAGES = ['README.md', 'docs/getting_started.md', 'docs/models.md']
LINKING = [
    'README.md', 'MODEL_CARDS.md', 'docs/quickstart.ipynb',
    *(f'docs/{path.name}' for path in sorted((ROOT / 'docs').glob('*.md')))]
SHELL = [*(block for page in PAGES for block in blocks(page, 'sh')), *blocks('docs/segmentation.md', name='digits')]
COMMANDS = list(dict.fromkeys(
    line for _, block in SHELL for line in block.splitlines() if line.startswith('vt-zoo ')))


@pytest.fixture(scope='module')
def folder(digits, photograph, tmp_path_factory):
    """A photograph and data as `vt-zoo quickstart` leaves them, of fewer images but the sevens that are predicted."""
    folder = tmp_path_factory.mktemp('readme')
    shutil.copy(photograph, folder)
    for old in sorted(digits.glob('*/*')):
        new = folder / 'vt_zoo_quickstart' / 'data' / old.relative_to(digits)
        new.mkdir(parents=True)
        for path in sorted(old.iterdir())[:None if old == digits / 'val' / '7' else 10]:
            shutil.copy(path, new)
    return folder


@pytest.mark.parametrize('block', [block for page in PAGES for _, block in blocks(page, 'python')])
def test_python_block(checkout, folder, block, monkeypatch, capsys):
    assert re.search(r'import vt_zoo|from vt_zoo|torch\.hub', block), 'what registers the models is shown'
    monkeypatch.chdir(folder if 'vt_zoo_quickstart' in block else checkout)
    exec(compile(block, 'a document', 'exec'), {})
    printed = capsys.readouterr().out.replace('torch.Size([', '(').replace('])', ')')
    shown = shapes_shown(block)
    assert re.findall(SHAPE, printed)[:len(shown)] == shown  # a loop prints more


@pytest.fixture(scope='module')
def outputs(folder, segment_command):
    """What the commands of the README print, run one after the other."""
    return {line: segment_command(*shell_words(line, folder), cwd=folder) for line in COMMANDS}


@pytest.mark.slow
@pytest.mark.parametrize('line', COMMANDS)
def test_command(outputs, folder, line):
    """It ends well, says something and writes what it was asked for; what that is the tests of each command look at."""
    assert outputs[line].code == 0, outputs[line].stderr
    assert outputs[line].stdout
    out = re.search(r'--out (\S+)|segment digits (\S+)', line)
    assert out is None or (folder / (out[1] or out[2])).exists()
    sevens = {f'vt_zoo_quickstart/data/val/7/{p.name}' for p in (folder / 'vt_zoo_quickstart/data/val/7').iterdir()}
    if line.startswith('vt-zoo predict') and '--json' in line:
        assert {prediction['image'] for prediction in json.loads(outputs[line].stdout)} == sevens
    elif line.startswith('vt-zoo predict'):
        assert ({'cat.jpg'} if 'cat.jpg' in line else sevens) <= set(outputs[line].stdout.splitlines())


def test_each_command_is_shown():
    assert {line.split()[1] for line in COMMANDS} == {
        'finetune', 'predict', 'publish', 'models', 'segment', 'tokens', 'locality', 'export'}
    assert 'vt-zoo quickstart' in README
    # serves until Ctrl-C, as test_explorer.py runs it
    assert 'vt-zoo explore --model test_vt_resnet' in (ROOT / 'docs' / 'getting_started.md').read_text()


@pytest.mark.parametrize('document, both_orders', [('README.md', False), ('MODEL_CARDS.md', True)])
def test_table_of_the_models(document, both_orders, models):
    pattern = r'^\| `?(\w*vt_resnet\w*)`? \| ([\d.]+) M \| (\d+) M \|' + both_orders * r' (\d+) M \|'
    rows = re.findall(pattern, (ROOT / document).read_text(), re.MULTILINE)
    assert {model: counts for model, *counts in rows} == {
        name: [
            f'{entry["parameters"] / 1e6:.2f}',
            *(f'{n / 1e6:.0f}' for n in multiply_adds(name, entry)[:1 + both_orders])]
        for name, entry in models.items() if name in timm.list_models(module='vt_resnet')}


def test_length():
    assert len(README.splitlines()) <= 150


def test_table_of_models_on_other_trunks(models):
    rows = re.findall(
        r'^\| `(\w+)` \| ([\d.]+) M \| (\d+) M \| ([\d.]+) M \| (\d+) M \| `([\w.]+)` \|$',
        (ROOT / 'MODEL_CARDS.md').read_text(), re.MULTILINE)
    assert [row[0] for row in rows] == [name for name in timm.list_models(module='vt_net') if name != 'vt_net']
    for name, *counts, tag in rows:
        whole = timm.create_model(name.removeprefix('vt_'), device='meta').eval()
        assert counts == [
            f'{models[name]["parameters"] / 1e6:.2f}', f'{models[name]["multiply_adds"] / 1e6:.0f}',
            f'{count_weights(whole) / 1e6:.2f}', f'{count_multiply_adds(whole) / 1e6:.0f}']
        assert models[name]['weights'] == [tag]


def multiply_adds(name, entry):
    """As the model runs, and in the paper's order."""
    with torch.device('meta'):
        return entry['multiply_adds'], count_multiply_adds(in_paper_order(timm.create_model(name).eval()))


def test_table_of_the_necks():
    text = (ROOT / 'MODEL_CARDS.md').read_text()
    rows = re.findall(r'^\| (\S+) \| ([\d.]+) M \| ([\d.]+) G \| ([\d.]+) G \|$', text, re.MULTILINE)
    assert [row[0] for row in rows] == ['FPN', 'VT-FPN']
    for cls, (_, parameters, *costs) in zip((PanopticFPN, VTFPN), rows):
        with torch.device('meta'):
            neck = cls('tu-resnet50').decoder.neck.eval()
        assert parameters == f'{sum(p.numel() for p in neck.parameters()) / 1e6:.2f}'
        assert costs == costs_of(neck)
    assert "VT-FPN's neck needs {} G and {} G".format(*costs_of(in_paper_order(neck))) in text


def costs_of(neck):
    """Multiply-adds in 10^9 of a neck, on the maps of a ResNet-50 of the paper's images."""
    costs = []
    for height, width in ((800, 1216), (473, 473)):
        maps = [torch.empty(1, 64 * n, -(-height // n), -(-width // n), device='meta') for n in (4, 8, 16, 32)]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            neck(maps)
        costs.append(f'{counter.get_total_flops() / 2e9:.2f}')
    return costs


@pytest.mark.parametrize('name', LINKING)
def test_files_that_are_linked(name):
    document = ROOT / name
    targets = re.findall(r'\]\(([^)]+)\)', document.read_text())
    files = [target.split('#')[0] for target in targets if '://' not in target]  # test_site.py follows the rest
    assert [file for file in files if not (document.parent / file).exists()] == []
