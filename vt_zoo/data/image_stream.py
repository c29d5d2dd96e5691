"""Streams of image files, which are found as they are needed, opened in threads and returned in batches.

Memory does not grow with the number of files, except for the names in one folder at a time, and those of links.
"""
import os
import select
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, List, Optional

from PIL import Image

from ..errors import InputError
from ..files import walk_files
from .folders import is_image, is_left_out
from .images import load_image

__all__ = ['OpenedImage', 'Source', 'find_images', 'open_images']

_STDIN = '-'
_CHUNK = 65536  # bytes of a list of paths that are read at once
_BOM = b'\xef\xbb\xbf'


@dataclass(frozen=True)
class Source:
    """An image file to open.

    Attributes:
        path: Its path, as given, or below a given folder.
        name: Its path relative to the given folder; for a file given by itself, its name.
        error: What is wrong with it, if that is known before it is opened.
    """
    path: str
    name: str
    error: Optional[str] = None


@dataclass
class OpenedImage:
    """An image file that was opened, or the reason why it could not be.

    Attributes:
        source: The file.
        content: What `prepare` returned for it; None if it cannot be read.
        error: One sentence that says why it cannot be read; None if it was.
    """
    source: Source
    content: Any = None
    error: Optional[str] = None


def find_images(words: Iterable[str]) -> Iterator[Optional[Source]]:
    """Find image files.

    Args:
        words: Files; folders, in which all files with an image's extension are taken, in the order of their names and
            including subfolders, each file once and without hidden ones; or '-' to read such paths from standard input,
            one per line, in the bytes of the file system. Blank lines are skipped.

    Yields:
        The files, not opened yet; for a folder that cannot be read or holds no images, a source with an error. None
        when the next path on standard input has not arrived yet.

    Raises:
        InputError: Standard input is closed.
    """
    for word in words:
        for path in _read_stdin() if word == _STDIN else (word,):
            if path is None:
                yield None
            else:
                yield from _expand(path)


def _read_stdin() -> Iterator[Optional[str]]:
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("standard input is closed, but '-' reads paths from it")
    descriptor = sys.stdin.fileno()
    rest, is_first = b'', True
    while True:
        if not _is_ready(descriptor):
            yield None
        chunk = os.read(descriptor, _CHUNK)
        *lines, rest = (rest + chunk).split(b'\n')
        for line in lines if chunk else [rest]:
            if is_first:
                line, is_first = line.removeprefix(_BOM), False
            line = line.removesuffix(b'\r')
            if line.strip():
                yield os.fsdecode(line)
        if not chunk:
            return


def _is_ready(descriptor: int) -> bool:
    try:
        return bool(select.select([descriptor], [], [], 0)[0])
    except OSError:  # on Windows, select takes only sockets
        return True


def _expand(path: str) -> Iterator[Source]:
    if not os.path.isdir(path):
        yield Source(path, os.path.basename(path))
        return
    is_empty = True
    for found, error in walk_files(path, is_image, is_left_out):
        is_empty = False
        reason = None if error is None else f'folder {found} cannot be read: {error.strerror}'
        yield Source(found, os.path.relpath(found, path), reason)
    if is_empty:
        yield Source(path, os.path.basename(path), f'folder {path} holds no images')


def open_images(
        sources: Iterable[Optional[Source]],
        prepare: Callable[[Image.Image], Any],
        batch_size: int,
        workers: int,
) -> Iterator[List[OpenedImage]]:
    """Open image files, keeping their order.

    Args:
        sources: Files, as from `find_images`. At a None, everything found so far is returned before the next is read.
        prepare: Called with each RGB image, in one of the threads.
        batch_size: Files per batch; there are fewer in the last one and before a None.
        workers: Number of threads that open files, at most two batches ahead of what was returned.

    Yields:
        The files of a batch, including those that cannot be read.
    """
    pool = ThreadPoolExecutor(workers)
    pending: deque = deque()

    def take() -> List[OpenedImage]:
        return [pending.popleft().result() for _ in range(min(batch_size, len(pending)))]

    try:
        for source in sources:
            if source is not None:
                pending.append(pool.submit(_open, source, prepare))
            while len(pending) >= 2 * batch_size or (source is None and pending):
                yield take()
        while pending:
            yield take()
    finally:
        pool.shutdown(cancel_futures=True)


def _open(source: Source, prepare: Callable[[Image.Image], Any]) -> OpenedImage:
    try:
        if source.error is not None:
            return OpenedImage(source, error=source.error)
        return OpenedImage(source, prepare(load_image(source.path)))
    except InputError as e:
        return OpenedImage(source, error=str(e))
