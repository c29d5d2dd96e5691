"""Any number of image files: found while they are needed, opened in threads, handed out in batches.

What is in memory does not depend on how many there are, but for the names of one folder at a time, and of links.
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
_CHUNK = 65536  # bytes of a list that are read at once
_BOM = b'\xef\xbb\xbf'


@dataclass(frozen=True)
class Source:
    """An image file to open.

    Attributes:
        path: As it was given, or below a folder that was given.
        name: Its path below that folder; of a file that was given its last part.
        error: What is wrong with it, where that is known before it is opened.
    """
    path: str
    name: str
    error: Optional[str] = None


@dataclass
class OpenedImage:
    """An image file that was opened, or the sentence that says why it was not.

    Attributes:
        source: The file.
        content: What `prepare` made of it; None where it cannot be read.
        error: One sentence; None where it was read.
    """
    source: Source
    content: Any = None
    error: Optional[str] = None


def find_images(words: Iterable[str]) -> Iterator[Optional[Source]]:
    """Find image files.

    Args:
        words: Files; folders, whose files with the end of an image's name are taken, in the order of their names and
            with all that lies below, each file once, but nothing that is hidden; '-' for paths of both kinds on
            standard input, one a line, as the file system has their bytes. Blank lines are left out.

    Yields:
        The files, not opened yet; a folder that cannot be read or holds no image has an error. None where the next
        path of standard input is not there yet.

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
        raise InputError("standard input is closed, '-' reads paths from it")
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
    except OSError:  # Windows asks sockets alone
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
    """Open image files, in their order.

    Args:
        sources: As of `find_images`. At None, what was found so far is handed out before more is asked for.
        prepare: Called with each image, RGB, in one of the threads.
        batch_size: Files at a time; fewer at the end and before a None.
        workers: Threads that open files, at most one and a batch ahead of what was handed out.

    Yields:
        The files of a batch, among them those that cannot be read.
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
