"""Entry point of the CLI, which finds the command and turns usage errors into one sentence and an exit code."""
import argparse
import io
import logging
import os
import sys
from contextlib import suppress
from typing import List, Optional

import torch

from vt_zoo import __version__
from vt_zoo.errors import InputError, first_line
from vt_zoo.files import read_docstring

from . import (
    convert,
    explore,
    export,
    finetune,
    locality,
    models,
    predict,
    publish,
    quantize,
    quickstart,
    recipe,
    segment,
    tokens,
)
from .arguments import HelpFormatter

__all__ = ['create_parser', 'main']

COMMANDS = {
    'quickstart': quickstart, 'finetune': finetune, 'predict': predict, 'models': models, 'recipe': recipe,
    'convert': convert, 'publish': publish, 'segment': segment, 'tokens': tokens, 'locality': locality,
    'explore': explore, 'export': export, 'quantize': quantize}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f'{self.prog}: error: {message}\n')


def create_parser() -> argparse.ArgumentParser:
    """The parser of `vt-zoo`, with a subparser for each command."""
    parser = _Parser(prog='vt-zoo', description='Visual Transformers as timm models.')
    parser.add_argument('--version', action='version', version=f'vt-zoo {__version__}')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for name, module in COMMANDS.items():
        text = (module.__doc__ or read_docstring(module.__file__)).strip()
        command = commands.add_parser(
            name, help=text.splitlines()[0].rstrip('.'), description=text,
            formatter_class=HelpFormatter)
        module.add_arguments(command)
    return parser


def _open_streams() -> None:
    """Redirect closed standard streams (`vt-zoo ... >&-`) to the null device, so that no file takes their place."""
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        if getattr(sys, name) is None:
            with suppress(OSError):
                while os.open(os.devnull, os.O_RDWR) < number:
                    pass
            setattr(sys, name, open(os.devnull, 'r+' if number else 'r'))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # for names that the console cannot print


def _is_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text


def _complain(sentence: str) -> None:
    with suppress(OSError):  # standard error is closed, but the exit code still tells
        print(sentence, file=sys.stderr)


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command.

    Args:
        argv: Its words; those of the process where None.

    Returns:
        The exit code, 0, 1 where some of many images cannot be used, 2 for input that cannot be used, 130 after
        Ctrl-C.
    """
    _open_streams()
    args = create_parser().parse_args(argv)
    logging.basicConfig(format='vt-zoo: %(levelname)s: %(message)s', level=logging.WARNING)
    logging.getLogger('vt_zoo').setLevel(logging.INFO)
    try:
        code = COMMANDS[args.command].run(args)
        sys.stdout.flush()
    except InputError as e:
        _complain(f'vt-zoo: error: {e}')
        return 2
    except BrokenPipeError:  # the reader of our output is gone, as in `vt-zoo models | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        _complain(f'vt-zoo: error: cannot read or write {e.filename or "a file"}: {e.strerror or e}')
        return 2
    except (MemoryError, RuntimeError) as e:
        if not _is_of_memory(e):
            raise
        _complain(f'vt-zoo: error: the memory does not suffice, try a smaller batch or smaller images: {first_line(e)}')
        return 2
    except KeyboardInterrupt:
        _complain('vt-zoo: interrupted')
        return 130
    return code or 0
