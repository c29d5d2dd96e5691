"""`python -m vt_zoo.run`: what a script of timm sees, and what comes of it."""
import json
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch

import vt_zoo.run

REPORT = '''
import json, os, sys
import timm
print(json.dumps({
    'name': __name__, 'file': __file__, 'argv': sys.argv, 'path': sys.path[0], 'timm': timm.__file__,
    'registered': timm.is_model('vt_resnet50'), 'rank': os.environ.get('RANK')}))
'''
SECONDS = 300


@pytest.fixture
def write_script(tmp_path):
    def write(text, name='folder/script.py'):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path
    return write


def run_process(*args, launcher=(), **kwargs):
    command = [sys.executable, *launcher, '-m', 'vt_zoo.run', *map(str, args)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, **kwargs)
    return SimpleNamespace(code=process.returncode, stdout=process.stdout, stderr=process.stderr)


@pytest.fixture
def run(command):
    """As run_process, in a fork of a process that has imported timm."""
    return partial(command, module='vt_zoo.run')


def report(process):
    assert process.code == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{')]


def check_refused(process, *words):
    assert process.code == 2, process.stderr
    assert 'Traceback' not in process.stderr
    *_, sentence = process.stderr.splitlines()
    assert sentence.startswith('vt_zoo.run: error: ')
    for word in words:
        assert str(word) in sentence


def test_what_a_script_sees(run, write_script, tmp_path):
    script = write_script(REPORT)
    seen, = report(run(script, '--model', 'vt_resnet50', '-b', 8, cwd=tmp_path))
    assert seen == {
        'name': '__main__', 'file': str(script), 'argv': [str(script), '--model', 'vt_resnet50', '-b', '8'],
        'path': str(script.parent), 'timm': timm.__file__, 'registered': True, 'rank': None}


def test_relative_path(run, write_script):
    script = write_script(REPORT)
    seen, = report(run('folder/script.py', cwd=script.parents[1]))
    assert seen['argv'] == ['folder/script.py']
    assert seen['path'] == str(script.parent)


def test_timm_beside_the_script_is_taken(run, write_script):
    """As in a clone of timm, whose scripts need not fit another version."""
    script = write_script(REPORT)
    os.symlink(os.path.dirname(timm.__file__), script.parent / 'linked')
    write_script('''
        import os
        __path__ = [os.path.join(os.path.dirname(__file__), os.pardir, 'linked')]
        exec(open(os.path.join(__path__[0], '__init__.py')).read())
    ''', 'folder/timm/__init__.py')
    seen, = report(run(script, 'word'))
    assert seen['timm'] == str(script.parent / 'timm' / '__init__.py')
    assert seen['registered']
    assert seen['argv'] == [str(script), 'word']


def test_exit_code(run, write_script):
    assert run(write_script('import sys; sys.exit(7)')).code == 7


def test_exception(run, write_script):
    process = run(write_script('raise KeyError("my own")'))
    assert process.code == 1
    assert process.stderr.splitlines()[-1] == "KeyError: 'my own'"


@pytest.mark.parametrize('number', [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_signal(write_script, number):
    script = write_script('import time; print("here", flush=True); time.sleep(100)')
    with subprocess.Popen(
            [sys.executable, '-m', 'vt_zoo.run', str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as process:
        assert process.stdout.readline() == b'here\n'
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        # torch imports tabulate at exit, and where that is installed Python exits with 1 after a KeyboardInterrupt
        assert process.returncode == -number or stderr.endswith(b'KeyboardInterrupt\n')


def test_signal_that_the_script_handles(run, write_script):
    script = write_script('''
        import os, signal, sys
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        os.kill(os.getpid(), signal.SIGTERM)
    ''')
    assert run(script).code == 5


@pytest.mark.slow
def test_workers_of_a_data_loader(write_script):
    """With processes that import the script's file again, as they do on some systems."""
    script = write_script('''
        import torch
        if __name__ == '__main__':
            loader = torch.utils.data.DataLoader(torch.arange(4), num_workers=1, multiprocessing_context='spawn')
            print([x.item() for x in loader])
    ''')
    process = run_process(script)
    assert process.stdout == '[0, 1, 2, 3]\n', process.stderr


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason='this torch has no torch.distributed')
def test_torchrun(write_script, tmp_path):
    script = write_script(REPORT)
    process = run_process(
        script, 'word', cwd=tmp_path,
        launcher=['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'])
    seen = report(process)
    assert sorted(r['rank'] for r in seen) == ['0', '1']
    assert all(r['registered'] and r['argv'] == [str(script), 'word'] for r in seen)


@pytest.fixture
def main(monkeypatch, capsys):
    """Runs it in this process: exit code, standard output, standard error."""
    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['vt_zoo.run', *map(str, args)])
        code = vt_zoo.run.main()
        out = capsys.readouterr()
        return SimpleNamespace(code=code, stdout=out.out, stderr=out.err)
    return call


@pytest.mark.parametrize('name', ['missing.py', 'folder', 'notes.txt'])
def test_no_script(main, tmp_path, name):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'notes.txt').write_text('text')
    check_refused(main(tmp_path / name), tmp_path / name)


def test_no_words(main):
    check_refused(main(), 'usage: python -m vt_zoo.run SCRIPT.py')


def test_help(main):
    process = main('--help')
    assert process.code == 0
    assert 'torchrun' in process.stdout


def test_script_of_another_timm(run, write_script):
    script = write_script('from timm.utils import no_such_name')
    check_refused(run(script), script, timm.__version__, 'no_such_name')


def test_import_error_of_the_script(run, write_script):
    process = run(write_script('import no_such_module'))
    assert process.code == 1
    assert process.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'no_such_module'"


def test_timm_that_does_not_fit(run, write_script):
    script = write_script(REPORT)
    write_script('__version__ = "0.1"', 'folder/timm/__init__.py')
    check_refused(run(script), script.parent, 'timm')
