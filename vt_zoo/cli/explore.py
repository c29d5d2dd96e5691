"""Look at a model in the browser: drop an image on the page and see what the tokens attend to.

Serves one page on this machine only, at http://127.0.0.1:PORT, until Ctrl-C. The page needs no internet.
"""
import argparse
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from vt_zoo.analysis.explorer import create_app
from vt_zoo.errors import InputError
from vt_zoo.weights import load

from .arguments import port

HOST = '127.0.0.1'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add('--model', required=True, metavar='NAME_OR_DIR',
        help='model as in `vt-zoo predict`, or a folder of `vt-zoo segment`')
    add('--port', type=port, default=7860, metavar='PORT', help='port to listen on, 0 for any free one')


def run(args: argparse.Namespace) -> None:
    """Serve the page."""
    _end_on_signals()
    with _listen(args.port) as listener, _temporary_folder() as folder:
        tempfile.tempdir = str(folder)  # so that leftovers of broken uploads are deleted too
        port = listener.getsockname()[1]
        try:
            app = create_app(load(args.model), f'vt-zoo explore: {args.model}', folder, port)
        except InputError:
            raise
        except ValueError as e:
            raise InputError(f'model {args.model} has no tokens to look at: {e}') from e
        import uvicorn  # comes with gradio

        print(f'open       http://{HOST}:{port}  (Ctrl-C ends it)', flush=True)
        # an open page keeps a connection: do not wait for it, and keep uvicorn from saying so
        config = uvicorn.Config(
            app, log_level='critical', timeout_graceful_shutdown=1, proxy_headers=False, limit_concurrency=64)
        uvicorn.Server(config).run(sockets=[listener])


def _end_on_signals() -> None:
    """Make SIGTERM and SIGHUP end this process like Ctrl-C, so that its temporary files are deleted."""
    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    for name in ('SIGTERM', 'SIGHUP'):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, end)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Yield a private folder, which is deleted at the end; folders of explorers that were killed are deleted now."""
    if os.name != 'posix':
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    import fcntl

    def lock(path: Path, flags: int) -> int:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, flags)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    parent = _private_folder()
    starting = lock(parent, fcntl.LOCK_EX)  # so that no other process finds the folder before it is locked
    for path in parent.iterdir():
        try:
            os.close(lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except OSError:  # its explorer is running, or it is not a folder
            continue
        shutil.rmtree(path, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=parent))
    held = lock(folder, fcntl.LOCK_EX)
    os.close(starting)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _private_folder() -> Path:
    """Folder for this user's explorers in the temporary directory."""
    path = Path(tempfile.gettempdir()).resolve() / f'vt_zoo_explore_{os.getuid()}'
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise InputError(f'{path} must be a folder that is yours alone; delete it, or set TMPDIR to another place')
    return path


def _listen(number: int) -> socket.socket:
    try:
        return socket.create_server((HOST, number))
    except OSError as e:
        raise InputError(f'port {number} cannot be used: {e.strerror}; give another, or 0 for any that is free') from e
