"""Files as machines have them: links that go in circles, pipes that never end, two processes at one place."""
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

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # of file systems
RUN_LOCK = '.lock'  # in the folder of a run, while it goes on

_held: Dict[Tuple[str, int], int] = {}  # descriptors of locks, by real path and thread


def read_docstring(file: str) -> str:
    """Docstring of a Python file, which `python -OO` leaves out of the module."""
    return ast.get_docstring(ast.parse(Path(file).read_text(encoding='utf-8'))) or ''


def check_regular(path: Union[str, Path], what: str) -> None:
    """Raise InputError for a FIFO, socket or device: to read one may never end. What is not there is left to `open`.

    Args:
        path: The file, or a folder.
        what: What the sentence calls it, as 'image'.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = 'a pipe' if stat.S_ISFIFO(mode) else 'a socket' if stat.S_ISSOCK(mode) else 'a device'
        raise InputError(f'{what} {path} is {kind}, a regular file is needed')


def walk_files(
        folder: Union[str, Path],
        is_wanted: Callable[[str], bool],
        skip: Callable[[str], bool],
) -> Iterator[Tuple[str, Optional[OSError]]]:
    """Files of a folder in the order of their names, then those of its subfolders.

    Links are followed, and each file counts once, by its real path: links to what is found without them, or was found
    already, are left out. How many is said in a warning at the end. Memory is taken by the names in one folder at a
    time, the folders, and the links.

    Args:
        folder: Where to look.
        is_wanted: Whether to take a file of this name.
        skip: Whether to leave out a file or folder of this name, without a warning.

    Yields:
        The path of a file and None; or of a folder and why it cannot be read.
    """
    roots: List[str] = []  # real paths of folders of which all is found that is below
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
    """The samples whose files are not those of others, whatever links lead there. A warning says how many are.

    Args:
        samples: Paths of files, each with its class.
        others: The same, of files that are in `where`.
        where: Folder.
    """
    real = {os.path.realpath(path) for path, _ in others}
    kept = [sample for sample in samples if os.path.realpath(sample[0]) not in real]
    if len(kept) < len(samples):
        same = min(set(samples) - set(kept))[0]
        _logger.warning(f'{len(samples) - len(kept)} files are in {where} too, as {same}; left out')
    return kept


def _close_in_child() -> None:
    """A process that loads images does not hold the locks of one that trains, which it may outlive."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_close_in_child)


def _lock(file: Path, place: Path) -> int:
    """Descriptor of a file with the only lock on it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if fcntl is None or os.path.samestat(os.stat(file), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:  # by the process that held it before, at its end
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
    """Keep other processes and threads away from a place while the block runs; within it the same may be held again.

    The lock is the system's and ends with the process, however that ends. The file is removed at the end. File systems
    without locks keep nobody away.

    Args:
        file: File that stands for the lock, in a folder that is there.
        place: What it is about, which the sentence names.

    Raises:
        InputError: Another process or thread has it.
        OSError: The file cannot be written.
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
    """A temporary path beside `path` to write a file or folder to; it takes the name `path` when the block ends well.

    Args:
        path: Final name. What stood there is replaced, but not before the new is complete.
        replace: Refuse a `path` that is there, also one that another process wrote since the caller looked.

    Raises:
        InputError: Another process writes `path`, or it is there and not to be replaced.
        OSError: The disk is full or the place cannot be written. Nothing is left behind and `path` is as it was.
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
    except KeyboardInterrupt:  # which may come while the folder is made or removed
        if is_ours:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_whole(path: Path, folder: Path) -> Iterator[Path]:
    for left in set(folder.iterdir()) - {folder / '.lock'}:  # of a process that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    new = folder / path.name
    new.touch()
    mode = new.stat().st_mode  # what the umask leaves; safetensors writes files that their owner alone can read
    new.unlink()
    yield new
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
    """Errors of writing in the folder that `whole` makes name the file as it would be called."""
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
    """Make the folder of a run and hold it while the block runs. What is empty at the end and was not there is removed.

    Of several processes that train together the first does it for all.

    Raises:
        InputError: Its name is not UTF-8, or another process or thread has it.
        OSError: It cannot be made or written.
    """
    if not is_main_process():
        yield
        return
    check_utf8(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        with hold(out / RUN_LOCK, out):
            yield
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
