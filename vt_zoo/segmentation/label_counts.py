"""Checking all images and masks of a data set before it is used, and counting how often each class occurs."""
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple, Union

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from .._version import __version__
from ..errors import InputError
from .datasets import SegmentationDataset

__all__ = ['LabelCounts', 'count_labels']

SHOWN = 20  # the most classes that are all listed
RAREST = 5  # classes that are listed if there are more


@dataclass
class LabelCounts:
    """How often each class occurs in the masks of a part of a data set.

    Attributes:
        pixels: Number of pixels of each class, followed by the number of ignored pixels.
        masks: Number of masks in which each class occurs, followed by the number of masks with ignored pixels.
        total: Number of masks.
    """
    pixels: List[int]
    masks: List[int]
    total: int


def count_labels(dataset: SegmentationDataset, progress: bool = True) -> LabelCounts:
    """Open each image and mask of a part of a data set and count the classes.

    The counts are cached in the user's cache folder. As long as the names, sizes and times of all files, the label map
    and the classes do not change, a second call opens no files. With torch.distributed, each process opens its share.

    Args:
        dataset: The part of the data set.
        progress: Show a progress bar.

    Raises:
        InputError: Some images or masks cannot be used. The message describes the first and says how many there are.
    """
    rank, world_size = _place()
    distributed = world_size > 1
    found = [None]
    if rank == 0:
        state = _state(dataset)
        found = [_recall(dataset, state)]
    if distributed:
        dist.broadcast_object_list(found)
    if found[0] is not None:
        return LabelCounts(*found[0])

    parts = [_count(dataset, range(rank, len(dataset), world_size), progress and rank == 0)]
    if distributed:
        own, parts = parts[0], [None] * world_size
        dist.all_gather_object(parts, own)
    errors = sorted(error for _, of_part in parts for error in of_part)
    if errors:
        more = f'; {len(errors)} of {len(dataset)} samples of this part have errors' if len(errors) > 1 else ''
        raise InputError(errors[0][1] + more)
    pixels, masks = sum(counts for counts, _ in parts).tolist()
    kept = [*range(len(dataset.classes)), dataset.ignore_index]
    counts = LabelCounts([pixels[i] for i in kept], [masks[i] for i in kept], len(dataset))
    if rank == 0:
        _remember(dataset, state, counts)
    return counts


def _place() -> Tuple[int, int]:
    """Rank of this process, and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _count(dataset: SegmentationDataset, indices: range, progress: bool) -> Tuple[np.ndarray, List[Tuple[int, str]]]:
    """Count the pixels and masks of each label, int64 (2, 256), and collect errors as (index, message)."""
    def look(index: int) -> Union[np.ndarray, InputError]:
        try:
            return np.bincount(dataset.load(index)[1].ravel(), minlength=256)
        except InputError as e:
            return e

    counts, errors = np.zeros((2, 256), dtype=np.int64), []
    bar = tqdm(
        total=len(indices), desc='checking images and masks', disable=None if progress else True, leave=False)
    pool = ThreadPoolExecutor()
    try:
        for index, of_mask in zip(indices, pool.map(look, indices)):
            if isinstance(of_mask, InputError):
                errors.append((index, str(of_mask)))
            else:
                counts += of_mask, of_mask > 0
            bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    return counts, errors


def check_classes(dataset: SegmentationDataset, counts: LabelCounts, part: str) -> None:
    """Check that the masks of a part have more than one class.

    Args:
        dataset: The part of the data set.
        counts: Counts of its labels.
        part: Name of the part; masks of a part other than 'train' may all be of one class.

    Raises:
        InputError: In a data set of one or two classes, only one occurs, e.g. because 255 was meant as the other.
    """
    names, pixels = dataset.classes, counts.pixels[:-1]
    absent = [i for i, count in enumerate(pixels) if not count]
    folder = dataset.samples[0][1].parent
    if len(absent) == 1 and len(names) == 2 and dataset.label_map is None and counts.pixels[-1]:
        missing, there = absent[0], 1 - absent[0]
        raise InputError(
            f'the masks in {folder} hold only {there} ({names[there]}) and 255, and 255 is ignored, so that class '
            f'{missing} ({names[missing]}) occurs in none: if 255 stands for it, set label_map, e.g. by '
            f"--label-map '{{{there}: {there}, 255: {missing}}}'; if 255 should be ignored, "
            "say so by '{0: 0, 1: 1, 255: 255}'")
    if part == 'train' and len(names) - len(absent) == 1 and len(names) <= 2:
        only = next(i for i in range(len(names)) if i not in absent)
        reason = f'class {absent[0]} ({names[absent[0]]}) occurs in none' if absent else 'classes.txt names no other'
        raise InputError(
            f'the masks in {folder} hold only class {only} ({names[only]}), {reason}: nothing can be learned')


def describe_absent(classes: List[str], counts: LabelCounts) -> Optional[str]:
    """Say which classes occur in no training mask; None if all of them occur."""
    absent = [name for name, pixels in zip(classes, counts.pixels) if not pixels]
    if not absent:
        return None
    more = f' and {len(absent) - SHOWN} more' if len(absent) > SHOWN else ''
    return (
        f'{len(absent)} of {len(classes)} classes occur in no training mask and cannot be learned: '
        f'{", ".join(map(repr, absent[:SHOWN]))}{more}')


def describe_counts(classes: List[str], parts: Dict[str, LabelCounts]) -> List[str]:
    """Describe in lines how often each class, or each of the rarest if there are many, occurs in each part.

    Args:
        classes: Names of the classes.
        parts: Counts of each part by its name, starting with the training part.
    """
    order = list(range(len(classes)))
    first = next(iter(parts.values()))
    lines = []
    if len(classes) > SHOWN:
        order = sorted(order, key=lambda i: first.pixels[i])[:RAREST]
        lines.append(f'{len(classes)} classes, the rarest are')
    rows = [['class', *(f'{part}, {counts.total} masks' for part, counts in parts.items())]]
    for name, i in zip([*(classes[i] for i in order), 'ignored (255)'], [*order, -1]):
        cells = (f'{_share(c, i)} in {c.masks[i]}' if c.masks[i] else 'in no mask' for c in parts.values())
        rows.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return lines + [
        '  '.join([f'{row[0]:{widths[0]}}', *(f'{cell:>{width}}' for cell, width in zip(row[1:], widths[1:]))])
        for row in rows]


def _share(counts: LabelCounts, index: int) -> str:
    return f'{100 * counts.pixels[index] / max(sum(counts.pixels), 1):.2f} %'


def _memory(dataset: SegmentationDataset) -> Path:
    """Path of the file in the user's cache folder that belongs to this part of this data set."""
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    folders = '\n'.join(str(path.parent.absolute()) for path in dataset.samples[0])
    return cache / 'vt_zoo' / 'masks' / f'{hashlib.sha256(os.fsencode(folders)).hexdigest()[:32]}.json'


def _state(dataset: SegmentationDataset) -> str:
    """Hash of everything that the counts depend on: names, sizes and times of the files, classes, label map."""
    label_map = sorted((str(key), label) for key, label in (dataset.label_map or {}).items())
    state = hashlib.sha256(json.dumps([__version__, type(dataset).__name__, dataset.classes, label_map]).encode())
    for path in (*dataset.described_by, *(path for sample in dataset.samples for path in sample)):
        try:
            found = path.stat()
            state.update(os.fsencode(f'{path.name}\n{found.st_size}\n{found.st_mtime_ns}\n'))
        except OSError:  # opening this file will give an error that names it
            state.update(b'?')
    return state.hexdigest()


def _recall(dataset: SegmentationDataset, state: str) -> Optional[List]:
    try:
        memory = json.loads(_memory(dataset).read_text())
        return memory['counts'] if memory['state'] == state else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # no such file, no home folder, or half a file
        return None


def _remember(dataset: SegmentationDataset, state: str, counts: LabelCounts) -> None:
    try:
        memory = _memory(dataset)
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps({'state': state, 'counts': [counts.pixels, counts.masks, counts.total]}))
    except (OSError, RuntimeError):  # the masks are checked again next time
        pass
