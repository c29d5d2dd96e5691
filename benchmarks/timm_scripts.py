"""Runs timm's own scripts on the recipes, test_vt_resnet and the handwritten digits, and writes down what came of it.

    git clone https://github.com/huggingface/pytorch-image-models
    python benchmarks/timm_scripts.py pytorch-image-models

writes benchmarks/results/timm_scripts.md. Everything runs on the CPU. tests/test_timm_scripts.py asks more of the same
runs, where VT_ZOO_TIMM_SCRIPTS names a clone.
"""
import argparse
import csv
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shutil import copytree, ignore_patterns
from tempfile import TemporaryDirectory
from typing import Dict, List

import timm
import torch
from safetensors.torch import save_file
from timm.models import load_state_dict
from tqdm import tqdm

import vt_zoo
from vt_zoo.data.digits import write_digits
from vt_zoo.files import whole
from vt_zoo.recipes import recipe_path
from vt_zoo.weights.files import write_model

RESULTS = Path(__file__).parent / 'results'
SIZE, CLASSES = 64, 10
MODEL = ('--model', 'test_vt_resnet', '--num-classes', CLASSES)
LOADER = ('--img-size', SIZE, '--device', 'cpu', '-j', 1)
TIMEOUT = 1200  # seconds a script


@dataclass
class Training:
    """A run of train.py: its folder and the lines of its summary.csv."""
    folder: Path
    epochs: List[Dict[str, float]]

    @property
    def best(self) -> Path:
        return self.folder / 'model_best.pth.tar'

    @property
    def top1(self) -> float:
        """Of the best epoch, in percent."""
        return max(epoch['eval_top1'] for epoch in self.epochs)


def _read_csv(path: Path) -> List[Dict[str, str]]:
    with path.open(newline='') as f:
        return list(csv.DictReader(f))


class TimmScripts:
    """timm's scripts at work in a folder. Each property runs what it is named after, once."""

    def __init__(self, scripts: Path, folder: Path) -> None:
        self.scripts, self.folder = scripts.resolve(), folder
        self.environment = {
            **os.environ,
            'PYTHONPATH': os.pathsep.join(filter(None, [
                str(Path(vt_zoo.__file__).parents[1]), os.environ.get('PYTHONPATH')])),
        }
        self.commands: Dict[str, str] = {}
        write_digits(folder / 'data')
        few = [f'*{digit}.png' for digit in range(1, 10)]  # leaves every tenth image
        copytree(folder / 'data', folder / 'few', ignore=ignore_patterns(*few))

    def _words(self, script: str, *words: object) -> List[str]:
        launcher = [] if script == 'train.py' else ['-m', 'vt_zoo.run']
        return [sys.executable, *launcher, str(self.scripts / script), *map(str, words)]

    def run(self, script: str, *words: object, name: str = '') -> str:
        """Run a script and return what it printed."""
        process = subprocess.run(
            self._words(script, *words), cwd=self.folder, env=self.environment, capture_output=True, text=True,
            timeout=TIMEOUT)
        if process.returncode != 0:
            raise RuntimeError(f'{script} ended with {process.returncode}: {process.stderr[-3000:]}')
        launcher = 'python' if script == 'train.py' else 'python -m vt_zoo.run'
        self.commands[name or script] = f'{launcher} {shlex.join([script, *map(str, words)])}'
        return process.stdout

    def result(self, script: str, *words: object) -> dict:
        """Run a script and return the object that it prints after `--result`."""
        return json.loads(self.run(script, *words).rsplit('--result', 1)[1])

    def _training_words(self, name: str, recipe: str, data: str, *words: object) -> tuple:
        return (
            '-c', recipe_path(recipe), '--data-dir', data, '--val-split', 'val', *MODEL, *LOADER, '--hflip', 0,
            '--output', 'runs', '--experiment', name, *words)

    def train(self, name: str, recipe: str, data: str, *words: object) -> Training:
        """Run train.py with one of our recipes."""
        self.run('train.py', *self._training_words(name, recipe, data, *words), name=name)
        folder = self.folder / 'runs' / name
        rows = _read_csv(folder / 'summary.csv')
        return Training(folder, [{key: float(value) for key, value in row.items()} for row in rows])

    @cached_property
    def plain(self) -> Training:
        return self.train('plain', 'plain', 'data', '--epochs', 5, '--decay-epochs', 4, '-b', 64)

    @cached_property
    def teacher(self) -> Path:
        """Its best weights in timm's hub layout, with the names of the classes."""
        model = timm.create_model('test_vt_resnet', num_classes=CLASSES)
        model.load_state_dict(load_state_dict(self.plain.best, use_ema=True))
        data_config = timm.data.resolve_data_config({'img_size': SIZE}, model=model)
        folder = self.folder / 'teacher'
        write_model(folder, model, [f'digit {i}' for i in range(CLASSES)], data_config)
        return folder

    @cached_property
    def advanced(self) -> Training:
        """All of the recipe; fewer epochs, the rates scaled to the batch, and a moving average as long as the run."""
        scale = 64 / 2048
        return self.train(
            'advanced', 'advanced', 'data', '-b', 64, '--epochs', 5, '--warmup-epochs', 1, '--lr', 0.16 * scale,
            '--warmup-lr', 0.01 * scale, '--model-ema-decay', 0.95, '--kd-model-name', f'local-dir:{self.teacher.name}')

    @cached_property
    def finetune(self) -> Training:
        """From the trunk of timm's resnet18, whose weights here are random: the real ones are on the hub."""
        save_file(timm.create_model('resnet18').state_dict(), self.folder / 'resnet18.safetensors')
        return self.train(
            'finetune', 'finetune', 'few', '--model', 'vt_resnet18.trunk_a1_in1k', '--pretrained-path',
            'resnet18.safetensors', '--epochs', 2, '--warmup-epochs', 1, '-b', 32)

    # One batch an epoch and no augmentation: timm seeds a run at its start, not its epochs, so that the order of images
    # after a resumption is another one.
    @cached_property
    def _steady(self) -> tuple:
        images = len(list((self.folder / 'few' / 'train').rglob('*.png')))
        return '--epochs', 4, '--model-ema', '--model-ema-decay', 0.9, '-b', images, '--no-aug'

    @cached_property
    def uninterrupted(self) -> Training:
        return self.train('uninterrupted', 'plain', 'few', *self._steady)

    @cached_property
    def resumed(self) -> Training:
        """Killed in its third epoch and resumed."""
        with subprocess.Popen(
                self._words('train.py', *self._training_words('killed', 'plain', 'few', *self._steady)),
                cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                text=True) as process:
            for line in process.stderr:
                if line.startswith('Train: 2 '):
                    process.kill()
                    break
            process.stderr.read()
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError(f'train.py ended with {process.returncode} before it was killed')
        return self.train(
            'resumed', 'plain', 'few', *self._steady, '--resume', Path('runs') / 'killed' / 'last.pth.tar')

    @cached_property
    def validated(self) -> Dict[str, dict]:
        """validate.py on the best weights of each training, and on a folder in timm's hub layout."""
        words = ('--data-dir', 'data', '--split', 'val', *LOADER, '-b', 50)
        plain, advanced = (os.path.relpath(run.best, self.folder) for run in (self.plain, self.advanced))
        return {
            'plain': self.result('validate.py', *words, *MODEL, '--checkpoint', plain),
            'advanced': self.result('validate.py', *words, *MODEL, '--checkpoint', advanced, '--use-ema'),
            'local-dir': self.result(
                'validate.py', *words, '--model', f'local-dir:{self.teacher.name}', '--pretrained'),
        }

    @cached_property
    def predictions(self) -> List[Dict[str, str]]:
        """inference.py: a line an image with the index, name and probability of its class."""
        self.run(
            'inference.py', '--data-dir', 'data', '--split', 'val', *LOADER, '-b', 50, '--model',
            f'local-dir:{self.teacher.name}', '--pretrained', '--label-type', 'name', '--include-index', '--topk', 1,
            '--fullname', '--results-dir', 'predictions', '--results-file', 'table')
        return _read_csv(self.folder / 'predictions' / 'table.csv')

    _SPEED = ('--img-size', SIZE, '-b', 4, '--device', 'cpu', '--num-warm-iter', 1, '--num-bench-iter', 10)

    @cached_property
    def speed(self) -> dict:
        return self.result('benchmark.py', '--model', 'test_vt_resnet', *self._SPEED, '--bench', 'both')

    @cached_property
    def bulk(self) -> List[Dict[str, str]]:
        """bulk_runner.py, which starts benchmark.py in a process of its own; it wants a word after --module."""
        self.run(
            'bulk_runner.py', '--model-list', 'test_vt_*', '--results-file', 'bulk.csv', '--sort-key',
            'infer_samples_per_sec', '--module', 'yes', 'vt_zoo.run', self.scripts / 'benchmark.py', *self._SPEED,
            '--bench', 'inference')
        return _read_csv(self.folder / 'bulk.csv')

    @cached_property
    def onnx(self) -> Path:
        self.run(
            'onnx_export.py', 'model.onnx', *MODEL, '--img-size', SIZE, '-b', 50, '--check-forward', '--checkpoint',
            os.path.relpath(self.plain.best, self.folder))
        return self.folder / 'model.onnx'

    @cached_property
    def onnx_top1(self) -> float:
        """onnx_validate.py on it; the script knows no model, so its preprocessing is given."""
        text = self.run(
            'onnx_validate.py', 'data/val', '--onnx-input', self.onnx.name, '--img-size', SIZE, '-b', 50, '-j', 1,
            '--crop-pct', 1.0, '--interpolation', 'bilinear')
        return float(re.search(r'\* Prec@1 ([\d.]+)', text)[1])


def distance(a: Path, b: Path, use_ema: bool) -> float:
    """Euclidean distance of the weights of two checkpoints, or of their moving averages."""
    a, b = (torch.cat([t.flatten().double() for t in load_state_dict(p, use_ema=use_ema).values()]) for p in (a, b))
    return (a - b).norm().item()


def outcomes(timm_scripts: TimmScripts) -> List[tuple]:
    """Each script, the name of its command and what came of it."""
    s = timm_scripts
    rows = [
        ('plain', lambda: f'top-1 {s.plain.top1:.2f} %'),
        ('advanced', lambda: f'top-1 {s.advanced.top1:.2f} % (moving average)'),
        ('finetune', lambda: f'top-1 {s.finetune.top1:.2f} %; random weights stand in for the pretrained ResNet'),
        ('resumed', lambda: 'killed with SIGKILL in the third epoch, resumed: the last weights and their moving '
            f'average are those of the uninterrupted run up to {resumed_difference(s):.0e} of the way since'),
        ('validate.py', lambda: ', '.join(
            f'{name} {result["top1"]:.2f} %' for name, result in s.validated.items())),
        ('inference.py', lambda: f'{len(s.predictions)} lines, {100 * right(s.predictions):.2f} % right'),
        ('benchmark.py', lambda: 'images a second: inference and training measured'
            if min(s.speed['infer_samples_per_sec'], s.speed['train_samples_per_sec']) > 0 else 'failed'),
        ('bulk_runner.py', lambda: f'{len(s.bulk)} model'),
        ('onnx_export.py', lambda: f'{s.onnx.name}, checked by the script against PyTorch'),
        ('onnx_validate.py', lambda: f'top-1 {s.onnx_top1:.2f} %'),
    ]
    return [(name, outcome()) for name, outcome in tqdm(rows, desc='scripts')]


def right(predictions: List[Dict[str, str]]) -> float:
    """Share of the predictions that name the class of the image's folder."""
    return sum(row['label'] == f'digit {Path(row["filename"]).parent.name}' for row in predictions) / len(predictions)


def resumed_difference(s: TimmScripts) -> float:
    """Of the resumed from the uninterrupted run, as a share of the way that the weights went after the resumption.

    The larger of that of the weights and that of their moving average.
    """
    end = s.uninterrupted.folder / 'last.pth.tar'
    start = s.folder / 'runs' / 'killed' / 'last.pth.tar'
    resumed = s.resumed.folder / 'last.pth.tar'
    return max(distance(resumed, end, use_ema) / distance(start, end, use_ema) for use_ema in (False, True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('scripts', type=Path, help='folder with train.py and the other scripts of timm')
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        s = TimmScripts(args.scripts, Path(folder))
        rows = outcomes(s)
        commands = {name: command.replace(f'{recipe_path("plain").parent}/', '').replace(f'{s.scripts}/', '')
                    for name, command in s.commands.items()}
    version = re.search(r"'(.*)'", (s.scripts / 'timm' / 'version.py').read_text())[1]
    lines = [
        "# timm's scripts on our models", '',
        f'Command: `python benchmarks/timm_scripts.py {args.scripts.name}`. {platform.machine()}, CPU, Python '
        f'{platform.python_version()}, torch {torch.__version__}, scripts of timm {version} with the timm beside them, '
        f'vt_zoo {vt_zoo.__version__}.', '',
        f'`test_vt_resnet` on the handwritten digits at {SIZE}x{SIZE}, a few epochs: this shows that the scripts work, '
        'not how good the recipes are.', '', '| script | outcome | command |', '|---|---|---|']
    for name, outcome in rows:
        label = name if name.endswith('.py') else f'train.py, {name}'
        lines.append(f'| {label} | {outcome} | `{commands[name]}` |')
    text = '\n'.join([*lines, ''])
    with whole(RESULTS / 'timm_scripts.md') as new:
        new.write_text(text)
    print(text)


if __name__ == '__main__':
    main()
