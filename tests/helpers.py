"""Helpers that several test files import: processes of the command line, what they leave behind, models."""
import copy
import csv
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache, cached_property
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from documents import blocks
from timm.data import ImageDataset, create_loader, resolve_data_config
from timm.utils import ModelEmaV3, reparameterize_model

from vt_zoo._requirements import timm_is_at_least
from vt_zoo.cli import main
from vt_zoo.weights.loading import load_model

# --- documents

SHAPE = r'\([\d, ]+\)'


def shapes_shown(block):
    comments = [line.split('#')[1] for line in block.splitlines() if line.lstrip().startswith('print(') and '#' in line]
    return re.findall(SHAPE, ''.join(comments))


def shell_words(line, folder):
    """Words of a command, with the files that its patterns stand for, as a shell gives them."""
    shell = f'{line.split()[0]}() {{ printf "%s\\n" "$@"; }}; {line}'
    return subprocess.run(['bash', '-c', shell], cwd=folder, capture_output=True, text=True).stdout.splitlines()


def run_blocks(document, folder, name=''):
    """Run blocks of a document in a folder and in this process; the shapes that Python prints are those it shows.

    Returns:
        The variables that its Python leaves.
    """
    names, printed = {}, []
    names['print'] = lambda *values: printed.append(' '.join(map(str, values)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for language, block in blocks(document, 'python', 'sh', name=name):
            if language == 'sh':
                for line in block.splitlines():
                    assert main(shell_words(line, folder)) == 0, line
            else:
                printed.clear()
                exec(compile(block, 'a document', 'exec'), names)
                text = '\n'.join(printed).replace('torch.Size([', '(').replace('])', ')')
                assert re.findall(SHAPE, text) == shapes_shown(block)
    return names


# --- processes


TIMEOUT = 600
WRITTEN = ['best', 'history.csv', 'last']  # by a run of segmentation
MAX_SENTENCE = 400  # characters, paths among them

# Imports modules once and forks a process a job, which runs code as `python -c` would and ends without tearing the
# interpreter down: that saves seconds a job. The hub's client, which reads its variables when it is imported, reads
# those of the job.
FORKS = '''
import atexit, gc, importlib, json, os, signal, sys, traceback
for name in sys.argv[1:]:
    importlib.import_module(name)
gc.collect()
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    os._exit(0)
for descriptor, path, flags in (0, os.devnull, os.O_RDONLY), (1, job['out'], os.O_WRONLY), (2, job['err'], os.O_WRONLY):
    os.dup2(os.open(path, flags), descriptor)
os.chdir(job['cwd'])
if job['environment']:
    os.environ.update(job['environment'])
    importlib.reload(importlib.import_module('huggingface_hub.constants'))
signal.setitimer(signal.ITIMER_REAL, job['timeout'])
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in what they run in the background
sys.argv[1:] = job['args']
code = 1
try:
    exec(job['code'], {'__name__': '__main__'})
    code = 0
except SystemExit as e:
    code = e.code or 0
except BaseException:
    traceback.print_exc()
try:
    sys.stdout.flush()
except OSError:
    traceback.print_exc()
    code = 120
atexit._run_exitfuncs()
os._exit(code)
'''

# A process that sends itself and its children a signal where it calls a function, in place of that call or after it.
SIGNAL_AT = '''
import itertools, multiprocessing.process, os, PIL.Image, timm.utils, vt_zoo.cli.predict, vt_zoo.data.images
def send_signal(owner, name, call, number, after):
    function, calls = getattr(owner, name), itertools.count(1)
    def replacement(*args, **kwargs):
        due = next(calls) == call  # threads call it too, and each must have a number of its own
        result = function(*args, **kwargs) if after or not due else None
        if due:
            os.killpg(0, number)
        return result
    setattr(owner, name, replacement)
os.setpgrp()
'''


def lines_of(text):
    """What is left to read on a terminal, where a progress bar is written over."""
    lines = [line.rsplit('\r', 1)[-1] for line in text.split('\n')]
    return [line for line in lines if line.strip()]


class Forks:
    """Runs Python code in forks of a process that has imported modules.

    Args:
        folder: Of the files to which the code prints.
        modules: What is imported.
    """

    def __init__(self, folder, *modules):
        self.folder = folder
        self.modules = modules

    @cached_property
    def server(self):
        return subprocess.Popen(
            [sys.executable, '-c', FORKS, *self.modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, code, *args, cwd=None, environment=None, out=None, timeout=TIMEOUT):
        """Run code as `python -c` would.

        Args:
            code: Python.
            args: Words for it.
            cwd: Folder to run it in.
            environment: Variables beside those of this process.
            out: File to take standard output; not read back where given.
            timeout: Seconds until SIGALRM ends it at once, as SIGKILL would.

        Returns:
            Exit code, standard output, standard error as text and its lines that stay on a terminal.
        """
        job = {
            'code': code, 'args': [str(a) for a in args], 'cwd': str(cwd or self.folder),
            'environment': environment or {}, 'timeout': timeout, 'out': str(out or self.folder / 'out'),
            'err': str(self.folder / 'err')}
        (self.folder / 'out').write_bytes(b'')
        (self.folder / 'err').write_bytes(b'')
        print(json.dumps(job), file=self.server.stdin, flush=True)
        code = int(self.server.stdout.readline())
        stdout, stderr = ((self.folder / n).read_bytes().decode(errors='surrogateescape') for n in ('out', 'err'))
        return SimpleNamespace(code=code, stdout=stdout, stderr=stderr, lines=lines_of(stderr))

    def command(self, *args, module='vt_zoo', before='', **kwargs):
        """Run `python -m vt_zoo` with these words, or another module; `before` is Python code that runs first."""
        run = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        return self.run(f'{before}\n{run}', *args, **kwargs)

    def close(self):
        if 'server' in self.__dict__:
            self.server.stdin.close()
            self.server.wait(TIMEOUT)
            self.server.stdout.close()


def run_main(*args, cwd):
    """Run a command of vt-zoo in this process: exit code, standard output, standard error, its lines that stay."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), 'utf-8', e, write_through=True) for e in ('strict', 'backslashreplace'))
    logger = logging.getLogger('vt_zoo')
    level = logger.level
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as stdin, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, 'stdin', stdin)
        patch.setattr(logging.root, 'handlers', [])  # of pytest, without which the command sets up its own
        patch.chdir(cwd)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', DeprecationWarning)  # as Python does; pytest would record the others
            warnings.showwarning = lambda *args, **kwargs: print(warnings.formatwarning(*args[:4]), file=sys.stderr)
            try:
                code = main([str(a) for a in args])
            except SystemExit as e:
                code = e.code
    logger.setLevel(level)
    stdout, stderr = (stream.buffer.getvalue().decode(errors='surrogateescape') for stream in (out, err))
    return SimpleNamespace(code=code or 0, stdout=stdout, stderr=stderr, lines=lines_of(stderr))


def run_command(forks, *args, cwd=None, **kwargs):
    """Run a command of vt-zoo, in a fork where something would stay in this process: what it is given, as `before`, and
    what `explore` sets, which is a server for as long as its process lives."""
    if kwargs or args[:1] == ('explore',):
        return forks.command(*args, cwd=cwd, **kwargs)
    return run_main(*args, cwd=cwd or forks.folder)


# --- what commands say and leave behind


def check_refused(result, *words, code=2):
    """One sentence on standard error, after warnings and notes, that holds the given words."""
    assert 'Traceback' not in result.stderr, result.stderr[-2000:]
    assert result.code == code
    assert result.lines, 'there is no sentence'
    *warnings, sentence = result.lines
    assert all(line.startswith(('vt-zoo: WARNING: ', 'vt-zoo: INFO: ')) for line in warnings), warnings
    assert sentence.startswith('vt-zoo') and ': error: ' in sentence
    assert len(sentence) <= MAX_SENTENCE + 20, f'a sentence of {len(sentence)} characters: {sentence[:200]}'
    for word in words:
        assert str(word) in sentence


def check_interrupted(result):
    assert 'Traceback' not in result.stderr, result.stderr[-2000:]
    assert result.code == 130
    assert result.lines[-1] == 'vt-zoo: interrupted'
    assert len(result.lines) <= 2


def interrupt_at_checkpoint(words, out):
    """Run a training command in a process of its own until its first checkpoint, then Ctrl-C: what it says of it."""
    process = subprocess.Popen(
        [sys.executable, '-m', 'vt_zoo', *words, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not (out / 'checkpoint.safetensors').exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert 'Traceback' not in stderr
    return stderr


def tree(folder):
    """Everything below a folder: bytes of the files, None for folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob('*')}


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file())


def weights(out):
    return (out / 'model' / 'model.safetensors').read_bytes()


def outcome(out):
    """All that a run of segmentation is judged by."""
    models = [(out / name / 'model.safetensors').read_bytes() for name in ('best', 'last')]
    return [*models, (out / 'history.csv').read_text()]


def history(out):
    with (out / 'history.csv').open(newline='') as f:
        return list(csv.DictReader(f))


def change_config(folder, **changes):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, **changes}))


def truncate(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])
    return path


def noise(*shape, high=256, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


@contextmanager
def interrupted_after(steps):
    """Ctrl-C in the step that follows so many, counted over the epochs."""
    update_ema, calls = ModelEmaV3.update, []

    def interrupt(*args, **kwargs):
        calls.append(args)
        if len(calls) > steps:
            raise KeyboardInterrupt
        update_ema(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelEmaV3, 'update', interrupt)
        with pytest.raises(KeyboardInterrupt):
            yield


def words_of(settings):
    return [word for name, value in settings.items() for word in (f'--{name.replace("_", "-")}', str(value))]


def run_by_two(launcher, two_processes, words):
    """What a command prints in two processes, of `accelerate launch` or of the fixture `two_processes`."""
    if launcher == 'accelerate':
        process = subprocess.run(
            [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '-m', 'vt_zoo',
             *words], capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr
        return process.stdout
    results = two_processes(*words)
    assert [r.code for r in results] == [0, 0], results[0].stderr
    return ''.join(r.stdout for r in results)


def count_correct(model_dir, data_dir):
    """Right predictions and images by timm's parts alone."""
    model = load_folder(model_dir)
    config = resolve_data_config({}, model=model)
    loader = create_loader(
        ImageDataset(str(data_dir)), config['input_size'], 7, interpolation=config['interpolation'],
        mean=config['mean'], std=config['std'], crop_pct=config['crop_pct'], num_workers=0,
        device=torch.device('cpu'), persistent_workers=False)
    correct = total = 0
    with torch.inference_mode():
        for x, target in loader:
            correct += int((model(x).argmax(-1) == target).sum())
            total += len(target)
    return correct, total


# --- models

TINY = {
    'layers': (1, 1, 1, 3), 'channels': (8, 8, 16), 'feature_dim': 24, 'token_dim': 32, 'num_tokens': 4,
    'num_classes': 5}
SINGLE = [
    {}, {'tokenizer': 'pooling'}, {'tokenizer': 'clustering'}, {'recurrent': False}, {'token_mixer': 'graph'},
    {'token_mixer': 'none'}, {'num_tokens': 1}, {'num_tokens': 7}, {'projector': False}, {'last_projector': True},
    {'dynamic_tokens': True}, {'position_code': True}, {'num_heads': 4}, {'attention_values': True}]
COMBINED = [
    {'tokenizer': 'clustering', 'dynamic_tokens': True, 'position_code': True, 'num_heads': 2,
     'attention_values': True, 'last_projector': True, 'num_tokens': 6},
    {'recurrent': False, 'token_mixer': 'graph', 'position_code': True, 'last_projector': True},
    {'tokenizer': 'pooling', 'num_tokens': 8, 'num_heads': 2, 'attention_values': True},
    {'tokenizer': 'clustering', 'projector': False, 'token_mixer': 'none', 'position_code': True, 'num_tokens': 5},
    {'dynamic_tokens': True, 'token_mixer': 'graph', 'position_code': True, 'token_dim': 24},
]
FORMS = ['training', 'eval', 'inference']
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def name(options):
    """Of the parameter of a test."""
    return ','.join(f'{k}={v}' for k, v in options.items()) or 'base'


def images(batch=4, height=32, width=48, seed=0, dtype=torch.float32, in_chans=3):
    return torch.randn(batch, in_chans, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stir(module, seed=0):
    """Give norms random affine values and running statistics, so that each of them matters; set eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for m in module.modules():
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            value = getattr(m, name, None)
            if value is not None and value.ndim == 1:
                low, high = (-0.5, 0.5) if name in ('bias', 'running_mean') else (0.5, 1.5)
                random = torch.rand(value.shape, generator=generator) * (high - low) + low
                value.data.copy_(random)
    return module.eval()


def build(cls, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    kwargs.setdefault('dtype', torch.float64)
    return stir(cls(*args, **kwargs), seed)


def ragged(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def calibrate(model):
    """Give norms random affine values and true statistics, so that no branch is zero; set eval mode."""
    generator = torch.Generator().manual_seed(1)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for m in model.modules():
            if getattr(m, 'weight', None) is not None and m.weight.ndim == 1:
                m.weight.copy_(torch.rand(m.weight.shape, generator=generator) + 0.5)
                m.bias.copy_(torch.rand(m.bias.shape, generator=generator) - 0.5)
        for m in norms:
            m.momentum = None
            m.reset_running_stats()
        in_chans = getattr(model, 'model', model).in_chans
        model.train()(images(8, 64, 64, seed=1, dtype=next(model.parameters()).dtype, in_chans=in_chans))
    for m in norms:
        m.momentum = 0.1
    return model.eval()


@cache
def _calibrated(options):
    torch.manual_seed(0)
    return calibrate(timm.create_model('test_vt_resnet', **{**TINY, **dict(options)}))


def calibrated(**options):
    """A tiny model with these options, in eval mode."""
    return copy.deepcopy(_calibrated(tuple(options.items())))


def vt_fpn():
    from vt_zoo.models.vt_fpn import VTFPN
    torch.manual_seed(0)
    model = VTFPN('tu-test_resnet', classes=3, token_dim=32, pyramid_channels=32, head_channels=64)
    stir(model.decoder.neck)  # or its projections, which start at zero, would hide what comes before them
    return model.eval()


def small_segmenter(cls=None, **kwargs):
    """A VT-FPN, or another segmentation model, of a few hundred thousand random weights."""
    from vt_zoo.models.vt_fpn import VTFPN
    cls = cls or VTFPN
    tokens = {'num_tokens': 4, 'token_dim': 24} if cls is VTFPN else {}
    torch.manual_seed(0)
    return cls(**{
        'encoder_name': 'tu-test_resnet', 'classes': 5, 'pyramid_channels': 32, 'head_channels': 32, **tokens,
        **kwargs})


@cache
def _calibrated_segmenter_state(cls, kwargs):
    """State of a small model with random affine values in its norms and true statistics, so that no branch is zero."""
    model = stir(small_segmenter(cls, **dict(kwargs)))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
            m.reset_running_stats()
    with torch.no_grad():
        model.train()(images(4, 64, 96, seed=1, in_chans=dict(kwargs).get('in_channels', 3)))
    return model.state_dict()


def calibrated_segmenter(cls=None, **kwargs):
    model = small_segmenter(cls, **kwargs)
    model.load_state_dict(_calibrated_segmenter_state(cls, tuple(kwargs.items())))
    return model.eval()


sync_batch_norm_conversions = pytest.mark.parametrize('convert', [
    nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm], ids=['torch', 'timm'])


def check_sync_batch_norms(model, convert, norm, x):
    """All batch norms become synchronised ones, that of this name among them, and the outputs stay."""
    converted = convert(copy.deepcopy(model))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
    assert isinstance(converted.get_submodule(norm), nn.SyncBatchNorm)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)


def in_form(model, form):
    if form == 'inference':
        return reparameterize_model(model)
    return model.train(form == 'training')


def leaves(model):
    """Modules that own weights and have no children, by name."""
    return {n: m for n, m in model.named_modules() if not list(m.children()) and list(m.parameters(recurse=False))}


def norms_of(model):
    return [m for m in model.modules() if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm))]


def outputs(model, *inputs):
    with torch.no_grad():
        return model(*inputs)


def assert_equal(result, expected):
    assert result.dtype == expected.dtype
    assert (result - expected).norm() < TOLERANCE[expected.dtype] * expected.norm()


def run_in_precision(model, inputs, precision):
    """Outputs of a model that is turned to a precision, or runs in autocast to bfloat16."""
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    if precision == 'autocast':
        with torch.autocast('cpu', torch.bfloat16):
            return model(*inputs)
    dtype = getattr(torch, precision)
    result = model.to(dtype)(*[x.to(dtype) for x in inputs])
    assert all(r.dtype == dtype for r in (result if isinstance(result, tuple) else (result,)))
    return result


def exports_max_pooling_of_any_size():
    side = torch.export.Dim('side', min=32)
    stem = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 7, stride=2, padding=3), torch.nn.MaxPool2d(3, 2, padding=1))
    try:
        torch.export.export(stem, (images(2, 80, 64),), dynamic_shapes=({2: side},))
    except torch._dynamo.exc.UserError:
        return False
    return True


TIMM_READS_FOLDERS = timm_is_at_least('1.0.31')

# for tests in which timm itself loads a folder
needs_timm_that_reads_folders = pytest.mark.skipif(
    not TIMM_READS_FOLDERS, reason='timm before 1.0.31 unpickles the weights of a folder, whatever they are')


def load_folder(folder):
    """The model of a folder in timm's hub layout, by timm alone where it reads them."""
    if TIMM_READS_FOLDERS:
        return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    return load_model(str(folder))


def as_in_version_0_1(state_dict):
    """A state dict of ours with the names of vt_zoo 0.1: norms of value and query maps, no learned filters."""
    maps = [
        n for n in state_dict
        if re.search(r'(tokenizers?(\.\d+)?\.value|projectors?(\.\d+)?\.query)\.conv\.weight$', n)]
    assert maps
    norms = {n.replace('.conv.', '.norm.'): torch.ones(len(state_dict[n])) for n in maps}
    kept = {n: t for n, t in state_dict.items() if not (n.endswith('tokenizer.filters.weight') and t.ndim == 2)}
    return {**kept, **norms}


def with_eval_size(loaded, eval_size):
    """A segmenter of `vt_zoo.load` for images of a short side, of (height, width), or as they are."""
    fixed = isinstance(eval_size, tuple)
    size = {'input_size': (3, *(eval_size if fixed else (None, None))), 'short_side': None if fixed else eval_size}
    return replace(loaded, preprocessing={**loaded.preprocessing, **size})
