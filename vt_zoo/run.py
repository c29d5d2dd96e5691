"""Run a script of timm with the models of vt_zoo registered, as in::

    python -m vt_zoo.run validate.py --model vt_resnet50 --data-dir data ...
    torchrun --nproc_per_node=2 -m vt_zoo.run train.py ...

timm's train.py does not need this, since it imports vt_zoo by `--device-modules vt_zoo`; its other scripts have no such
option. bulk_runner.py starts one process per model, which need it too: `python -m vt_zoo.run bulk_runner.py
--model-list 'vt_*' --module yes vt_zoo.run validate.py ...`.
"""
import os
import runpy
import sys
from pathlib import Path
from typing import List

import timm

from .files import read_docstring

__all__ = ['main', 'run_script']

_USAGE = 'usage: python -m vt_zoo.run SCRIPT.py ARGS...'
_START = '''
import sys
sys.path.insert(0, {folder!r})
try:
    from vt_zoo.run import main
except ImportError as e:
    print('vt_zoo.run: error: the timm in', {folder!r}, 'does not fit vt_zoo:', e, file=sys.stderr)
    sys.exit(2)
sys.exit(main())
'''


def _refuse(sentence: str) -> int:
    print(f'vt_zoo.run: error: {sentence}', file=sys.stderr)
    return 2


def _has_other_timm(folder: Path) -> bool:
    own = folder / 'timm' / '__init__.py'
    return own.exists() and not own.samefile(timm.__file__)


def _restart(folder: Path, args: List[str]) -> None:
    """Replace this process, which has already imported another timm, by one that finds the timm of this folder."""
    flags = sys.orig_argv[1:sys.orig_argv.index('-m')] if '-m' in sys.orig_argv else []
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *flags, '-c', _START.format(folder=str(folder)), *args])


def run_script(script: Path, args: List[str]) -> None:
    """Run a script as `python SCRIPT ARGS...` would, in this process.

    Exit codes, exceptions and signals are the script's own.

    Args:
        script: A Python file. Its folder comes first in `sys.path`.
        args: Arguments of the script.
    """
    folder = str(script.resolve().parent)
    if sys.path[0] != folder:
        sys.path.insert(0, folder)
    sys.argv = [str(script), *args]
    runpy.run_path(str(script), run_name='__main__')


def main() -> int:
    """Run the script that the command line names.

    Returns:
        The exit code, which is 0, or 2 with a message on standard error if the script does not exist or does not fit
        timm.
    """
    args = sys.argv[1:]
    if args[:1] in (['-h'], ['--help']):
        print(f'{_USAGE}\n\n{__doc__ or read_docstring(__file__)}')
        return 0
    if not args:
        return _refuse(f'no script was given; {_USAGE}')
    script = Path(args[0])
    if script.suffix != '.py' or not script.is_file():
        return _refuse(f"script {args[0]} is not a Python file that exists; timm's come with a clone of its repository")
    folder = script.resolve().parent
    if _has_other_timm(folder):
        _restart(folder, args)
    try:
        run_script(script, args[1:])
    except ImportError as e:
        if (e.name or '').split('.')[0] != 'timm':
            raise
        where = Path(timm.__file__).parent
        return _refuse(f'script {script} does not fit timm {timm.__version__} in {where}: {e}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
