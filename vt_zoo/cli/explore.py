"""Look into a model in the browser: drop an image, see what its tokens attend to.

Serves one page on this machine only, at http://127.0.0.1:PORT, until Ctrl-C. The page needs no internet.
"""
import argparse
import os
import socket
import tempfile

from vt_zoo.analysis.explorer import create_app
from vt_zoo.analysis.subject import load_subject
from vt_zoo.errors import InputError

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
    with _listen(args.port) as listener, tempfile.TemporaryDirectory() as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder  # of images that are opened and drawn; read at gradio's import
        try:
            app = create_app(load_subject(args.model), f'vt-zoo explore: {args.model}')
        except InputError:
            raise
        except ValueError as e:
            raise InputError(f'model {args.model} has no tokens to look at: {e}') from e
        import uvicorn  # comes with gradio

        print(f'open       http://{HOST}:{listener.getsockname()[1]}  (Ctrl-C ends it)', flush=True)
        # a page that is open keeps a connection: it is not waited for, and uvicorn need not say so
        config = uvicorn.Config(app, log_level='critical', timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listener])


def _listen(number: int) -> socket.socket:
    try:
        return socket.create_server((HOST, number))
    except OSError as e:
        raise InputError(f'port {number} cannot be used: {e.strerror}; give another, or 0 for any that is free') from e
