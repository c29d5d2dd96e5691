"""Robust file handling: circular links, pipes that never end, and several processes writing to the same place."""
import ast
import errno
import logging
import os
import shutil
import stat
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Set, Tuple, Union

from safetensors import SafetensorError

from .devices import is_main_process
from .errors import InputError, check_utf8, first_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_logger = logging.getLogger(__name__)

Sample = Tuple[str, int]

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # raised by file systems without locks
RUN_LOCK = '.lock'  # in the folder of a run, while it is running

_held: Dict[Tuple[str, int], int] = {}  # descriptors of locks, by real path and thread


def read_docstring(file: str) -> str:
    """Read the docstring of a Python file, which its module does not have under `python -OO`."""
    return ast.get_docstring(ast.parse(Path(file).read_text(encoding='utf-8'))) or ''


def check_regular(path: Union[str, Path], what: str) -> None:
    """Raise InputError for a FIFO, socket or device, as reading it may never end. Missing files are left to `open`.

    Args:
        path: File or folder.
        what: What the message calls it, e.g. 'image'.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = 'a pipe' if stat.S_ISFIFO(mode) else 'a socket' if stat.S_ISSOCK(mode) else 'a device'
        raise InputError(f'{what} {path} is {kind}, a regular file is needed')


def check_output_folder(path: Path) -> None:
    """Raise InputError if a folder to write to is something else."""
    if path.exists() and not path.is_dir():
        raise InputError(f'out {path} is a file, a folder is needed')


def walk_files(
        folder: Union[str, Path],
        is_wanted: Callable[[str], bool],
        skip: Callable[[str], bool],
) -> Iterator[Tuple[str, Optional[OSError]]]:
    """Yield the files of a folder in the order of their names, then those of its subfolders.

    Links are followed, but each file counts only once, by its real path: links to files that are found without them, or
    were found already, are left out, and a warning at the end says how many. Memory holds the names in one folder at a
    time, all folders and all links.

    Args:
        folder: Folder to search.
        is_wanted: Whether to take a file of this name.
        skip: Whether to skip a file or folder of this name, without a warning.

    Yields:
        The path of a file and None; or the path of a folder and the error that kept it from being read.
    """
    roots: List[str] = []  # real paths of folders below which everything is found
    seen: Set[str] = set()  # real paths of the folders, and of the files that links lead to
    left_out: List[str] = []

    def is_below_a_root(real: str) -> bool:
        return any(
            os.path.join(real, '').startswith(os.path.join(root, ''))
            and not any(skip(name) for name in Path(real).relative_to(root).parts) for root in roots)

    pending = [(str(folder), os.path.realpath(folder), True)]
    while pending:
        path, real, is_link = pending.pop()
        if real in seen or (is_link and is_below_a_root(real)):
            left_out.append(path)
            continue
        seen.add(real)
        if is_link:
            roots.append(real)
        try:
            with os.scandir(path) as entries:
                found = sorted((entry.name, entry.is_symlink()) for entry in entries if not skip(entry.name))
        except OSError as e:
            yield path, e
            continue
        folders = []
        for name, is_link in found:
            child = os.path.join(path, name)
            target = os.path.realpath(child) if is_link else os.path.join(real, name)
            if os.path.isdir(child):
                folders.append((child, target, is_link))
            elif is_wanted(name):
                is_found = is_link and os.path.exists(child) and is_wanted(target) and is_below_a_root(target)
                if target in seen or is_found:
                    left_out.append(child)
                    continue
                if is_link:
                    seen.add(target)
                yield child, None
        pending += reversed(folders)
    if left_out:
        links = 'link' if len(left_out) == 1 else 'links'
        _logger.warning(f'{len(left_out)} {links} to what {folder} has already left out, as {min(left_out)}')


def without_same_files(samples: List[Sample], others: List[Sample], where: Union[str, Path]) -> List[Sample]:
    """Drop samples whose files are among those of others, also through links. A warning says how many were dropped.

    Args:
        samples: Paths of files, each with its class.
        others: The same for the files in `where`.
        where: Folder, for the warning.
    """
    real = {os.path.realpath(path) for path, _ in others}
    kept = [sample for sample in samples if os.path.realpath(sample[0]) not in real]
    if len(kept) < len(samples):
        same = min(set(samples) - set(kept))[0]
        _logger.warning(f'{len(samples) - len(kept)} files are in {where} too, as {same}; left out')
    return kept


def _close_in_child() -> None:
    """Release locks in a forked process: one that loads images may outlive the training process that holds them."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_close_in_child)


def _lock(file: Path, place: Path) -> int:
    """Lock a file exclusively and return its descriptor."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if fcntl is None or os.path.samestat(os.stat(file), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:  # removed by the process that held it before
            pass
        except OSError as e:
            if e.errno in NO_LOCKS:
                return descriptor
            os.close(descriptor)
            if isinstance(e, BlockingIOError):
                raise InputError(
                    f'{place} is being written by another process: wait for its end, or choose another place') from None
            raise
        os.close(descriptor)


@contextmanager
def hold(file: Path, place: Path) -> Iterator[None]:
    """Keep other processes and threads away from a place while a block runs; the lock is reentrant.

    It is a lock of the operating system, which ends with the process, however that ends. The lock file is removed at
    the end. On file systems without locks, nobody is kept away.

    Args:
        file: Lock file, in an existing folder.
        place: The place to protect, for the message.

    Raises:
        InputError: Another process or thread holds the lock.
        OSError: The lock file cannot be written.
    """
    key = os.path.realpath(file), threading.get_ident()
    if key in _held:
        yield
        return
    _held[key] = _lock(file, place)
    try:
        yield
    finally:
        descriptor = _held.pop(key, None)
        if descriptor is not None:  # None in a fork
            with suppress(OSError):
                file.unlink()
            os.close(descriptor)


@contextmanager
def whole(path: Union[str, Path], replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write a file or folder to; it is renamed to `path` if the block succeeds.

    Args:
        path: Final name. An existing file or folder is replaced, but only once the new one is complete.
        replace: If False, refuse a `path` that exists, even if another process has written it since the caller checked.

    Raises:
        InputError: Another process is writing `path`, or it exists and must not be replaced, as a folder is not by a
            file.
        OSError: The disk is full or the place cannot be written. Nothing is left behind, and `path` is unchanged.
    """
    path = Path(path)
    folder = path.parent / f'.{path.name}.tmp'
    is_ours = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with hold(folder / '.lock', path):
            is_ours = True
            try:
                if not replace and path.exists():
                    raise InputError(f'{path} is there already: choose another --out')
                with _named(path, folder):
                    yield from _write_whole(path, folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:  # it may come while the folder is being created or removed
        if is_ours:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_whole(path: Path, folder: Path) -> Iterator[Path]:
    for left in set(folder.iterdir()) - {folder / '.lock'}:  # left by a process that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    new = folder / path.name
    new.touch()
    mode = new.stat().st_mode  # as the umask allows; files written by safetensors can be read only by their owner
    new.unlink()
    yield new
    if path.is_dir() and not new.is_dir():
        raise InputError(f'{path} is a folder, a file is to be written there')
    for file in (new, *new.rglob('*')):
        if file.is_file():
            file.chmod(mode)
    if not path.is_dir():
        os.replace(new, path)
        return
    old = path.rename(folder / '.old')
    try:
        os.replace(new, path)
    except BaseException:
        old.rename(path)
        raise


@contextmanager
def _named(path: Path, folder: Path) -> Iterator[None]:
    """Make errors of writing in the temporary folder of `whole` name the final file."""
    try:
        yield
    except SafetensorError as e:
        raise OSError(errno.EIO, first_line(e), str(path)) from e
    except OSError as e:
        name = Path(str(e.filename2 or e.filename or folder))
        if name.is_relative_to(folder):
            e.filename, e.filename2 = str(path.joinpath(*name.relative_to(folder).parts[1:])), None
        raise


@contextmanager
def run_folder(out: Path) -> Iterator[None]:
    """Create the folder of a run and lock it while the block runs. New folders that are empty at the end are removed.

    In a distributed training, the first process does this for all.

    Raises:
        InputError: The name is not UTF-8 or that of a file, or another process or thread holds the lock.
        OSError: The folder cannot be created or written.
    """
    if not is_main_process():
        yield
        return
    check_utf8(out)
    check_output_folder(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        with hold(out / RUN_LOCK, out):
            yield
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
