"""Access control of the explorer: an ASGI application in front of gradio's, which filters requests.

gradio answers any Host, allows foreign origins and opens any path it is sent. Only requests that the page itself makes
are let through: to an address of this machine, and about uploaded or drawn files.
"""
import asyncio
import contextlib
import json
import os
import re
import stat
import time
from pathlib import Path
from typing import Any, Awaitable, Callable, Dict, Iterator, List, Optional, Tuple, Union

MAX_UPLOAD = 24 * 2 ** 20  # bytes of an upload: the largest file allowed, with the form around it
MAX_BODY = 2 ** 20  # bytes of any other request
MAX_SECONDS = 60  # in which a body must arrive
SKIP_SECONDS = 5  # in which the body of a refused request must arrive
MAX_FILES = 1000  # uploaded and drawn files to keep
MAX_BYTES = 256 * 2 ** 20  # total size of these files

API = '/gradio_api'
UPLOAD, JOIN, FILE = f'{API}/upload', f'{API}/queue/join', f'{API}/file='
POSTS = {UPLOAD, JOIN, f'{API}/reset', f'{API}/cancel'}
GETS = re.compile(
    r'/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static|svelte)/[\w.@+/-]{1,200}|'
    rf'{API}/(info|theme\.css|startup-events|app_id|upload_progress|queue/data|heartbeat/[^/]+|file=.+)', re.DOTALL)

Message = Dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class _RefusedError(Exception):
    """A refused request, with the status and text of the answer."""


def is_uploaded(path: Union[str, Path], folder: Path) -> bool:
    """Whether a path is a regular file in a folder and has no links on the way there.

    Args:
        path: Absolute path; a relative one is never accepted.
        folder: The folder of uploads.
    """
    path = str(path)
    try:
        return (
            os.path.isabs(path) and os.path.realpath(path) == path and folder.resolve() in Path(path).parents
            and stat.S_ISREG(os.lstat(path).st_mode))
    except (OSError, ValueError):  # not there, too long, or with a zero byte
        return False


class Gate:
    """ASGI application that lets through only the requests that the page makes.

    Args:
        app: gradio's ASGI application.
        folder: Folder in which it keeps uploaded and drawn files; nothing else may be in it.
        port: Port that the server listens on, which is part of every allowed Host and Origin.
    """

    def __init__(self, app: Callable, folder: Path, port: int) -> None:
        self.app = app
        self.folder = folder
        hosts = [f'{name}:{port}' for name in ('127.0.0.1', 'localhost', '[::1]')]
        if port == 80:  # browsers leave it out
            hosts += [host.rpartition(':')[0] for host in hosts]
        self.hosts = hosts
        self.upload = asyncio.Lock()

    async def __call__(self, scope: Dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request, as specified by ASGI."""
        if scope['type'] == 'lifespan':
            await self.app(scope, receive, send)
        elif scope['type'] == 'websocket':
            await receive()
            await send({'type': 'websocket.close'})
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Dict[str, Any], receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
        except _RefusedError as e:
            with contextlib.suppress(_RefusedError, asyncio.TimeoutError):
                await asyncio.wait_for(_read(receive, 0), SKIP_SECONDS)
            await _answer(send, *e.args)
            return
        try:
            if scope['method'] == 'POST':
                body = await self._body(scope['path'], receive)
                receive = _replay(body, receive)
        except _RefusedError as e:
            await _answer(send, *e.args)
            return
        kept = [(name, value) for name, value in scope['headers'] if not _of_proxy(name)]
        scope, send = {**scope, 'headers': kept}, _without_cors(send)
        if scope['path'] == JOIN:  # a click draws new files
            await asyncio.to_thread(_prune, self.folder)
        if scope['path'] != UPLOAD:
            await self.app(scope, receive, send)
            return
        async with self.upload:
            await self.app(scope, receive, send)
            await asyncio.to_thread(_prune, self.folder)

    def _check(self, scope: Dict[str, Any]) -> None:
        host = _header(scope, b'host')
        if host not in self.hosts:
            raise _RefusedError(403, f'the Host must be one of {", ".join(self.hosts)}')
        origins = [value for name, value in scope['headers'] if name == b'origin']
        if origins and _header(scope, b'origin') not in [f'http://{host}' for host in self.hosts]:
            raise _RefusedError(403, 'the Origin must be the page itself')
        method, path = scope['method'], scope['path']
        if method not in ('GET', 'HEAD', 'POST'):
            raise _RefusedError(405, 'the method must be GET, HEAD or POST')
        if not (path in POSTS if method == 'POST' else GETS.fullmatch(path)):
            raise _RefusedError(404, 'the page has nothing here')
        if path.startswith(FILE) and not is_uploaded(path[len(FILE):], self.folder):
            raise _RefusedError(403, 'the file must be one that was uploaded or drawn')

    async def _body(self, path: str, receive: Receive) -> bytes:
        limit = MAX_UPLOAD if path == UPLOAD else MAX_BODY
        try:
            body = await asyncio.wait_for(_read(receive, limit), MAX_SECONDS)
        except asyncio.TimeoutError:
            raise _RefusedError(408, f'the body must arrive within {MAX_SECONDS} seconds') from None
        if path == JOIN:
            try:
                paths = list(_paths(json.loads(body)))
            except (ValueError, RecursionError):
                raise _RefusedError(400, 'the body must be JSON') from None
            if not all(isinstance(path, str) and is_uploaded(path, self.folder) for path in paths):
                raise _RefusedError(403, 'the file must be one that was uploaded')
        return body


def _header(scope: Dict[str, Any], name: bytes) -> Optional[str]:
    """Value of a header in lower case; None unless it occurs exactly once."""
    values = [value for key, value in scope['headers'] if key == name]
    return values[0].decode('latin-1').lower() if len(values) == 1 else None


def _of_proxy(name: bytes) -> bool:
    """Whether a header gives the page another address, which gradio would use in the page's links."""
    return name == b'forwarded' or name.startswith((b'x-forwarded-', b'x-gradio-', b'x-direct-'))


async def _read(receive: Receive, limit: int) -> bytes:
    """Read a body. Up to MAX_BODY more is read if it is too long, so that its sender gets an answer, not a reset."""
    body, size = bytearray(), 0
    while size <= limit + MAX_BODY:
        message = await receive()
        if message['type'] == 'http.disconnect':
            raise _RefusedError(400, 'the body is not complete')
        piece = message.get('body', b'')
        size += len(piece)
        if size <= limit:
            body += piece
        if not message.get('more_body'):
            break
    if size > limit:
        raise _RefusedError(413, f'the body must have at most {limit} bytes')
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    messages = [{'type': 'http.request', 'body': body, 'more_body': False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()
    return replay


def _paths(data: Any) -> Iterator[Any]:
    """Yield every value in JSON that gradio would take for a path."""
    if isinstance(data, dict):
        if 'path' in data:
            yield data['path']
        data = list(data.values())
    if isinstance(data, list):
        for value in data:
            yield from _paths(value)


def _without_cors(send: Send) -> Send:
    """Change the headers of answers so that they allow no other origin, and no other page may embed them."""
    async def send_without_cors(message: Message) -> None:
        if message['type'] == 'http.response.start':
            kept = [(k, v) for k, v in message.get('headers', ()) if not k.lower().startswith(b'access-control-')]
            message = {**message, 'headers': [
                *kept, (b'cross-origin-resource-policy', b'same-origin'), (b'x-frame-options', b'DENY')]}
        await send(message)
    return send_without_cors


async def _answer(send: Send, status: int, sentence: str) -> None:
    headers = [(b'content-type', b'text/plain; charset=utf-8'), (b'connection', b'close')]
    await send({'type': 'http.response.start', 'status': status, 'headers': headers})
    await send({'type': 'http.response.body', 'body': f'{sentence}\n'.encode()})


def _prune(folder: Path) -> None:
    """Delete the oldest files beyond MAX_FILES and MAX_BYTES, and the folders that have long been empty."""
    files: List[Tuple[float, int, Path]] = []
    for parent, folders, names in os.walk(folder, topdown=False):
        for path in (Path(parent, name) for name in (*names, *folders)):
            with contextlib.suppress(OSError):  # it is gone, or is a folder that is not empty
                status = path.lstat()
                if not stat.S_ISDIR(status.st_mode):
                    files.append((status.st_mtime, status.st_size, path))
                elif status.st_mtime < time.time() - MAX_SECONDS:
                    path.rmdir()
    count = size = 0
    for _, bytes_, path in sorted(files, reverse=True):
        count, size = count + 1, size + bytes_
        if count > MAX_FILES or size > MAX_BYTES:
            path.unlink(missing_ok=True)
