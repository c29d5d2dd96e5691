"""Folders of images: finding, checking and opening the files.

A folder is read as timm's ImageFolder reader reads it: a subfolder a class, in natural order, under `train/` and `val/`
(or `validation/`), with timm's image extensions. Opening differs from timm's in what a person would see: EXIF
orientation is applied, transparency is laid over white, 16-bit scans are scaled instead of clipped.
"""
import logging
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import numpy as np
import torch.utils.data
from PIL import Image, ImageOps
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from tqdm import tqdm

from .errors import InputError
from .files import check_regular, find_files, without_same_files

__all__ = ['ImageFolder', 'Split', 'find_split', 'load_image']

_logger = logging.getLogger(__name__)

Sample = Tuple[str, int]


def load_image(path: Union[str, Path]) -> Image.Image:
    """Open an image file as 8-bit RGB.

    Args:
        path: The file. EXIF orientation is applied; transparent pixels turn white; grey values of more than 8 bits are
            scaled from their full range; CMYK and palettes are converted.

    Returns:
        The image in mode 'RGB'.

    Raises:
        InputError: The file is missing, no regular file, not an image, or damaged.
    """
    check_regular(path, 'image')
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith('I'):
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            return image.convert('RGB')
    except FileNotFoundError:
        raise InputError(f'image {path} does not exist') from None
    except IsADirectoryError:
        raise InputError(f'image {path} is a folder, not an image file') from None
    except Exception as e:  # a damaged file makes Pillow's decoders raise nearly anything
        reason = 'it is not an image' if isinstance(e, Image.UnidentifiedImageError) else str(e).rstrip('.')
        raise InputError(f'image {path} cannot be read: {reason}') from e


@dataclass
class Split:
    """Training and held-out images of a folder: (path, class index) pairs, and the names of the classes."""
    classes: List[str]
    train: List[Sample]
    val: List[Sample]


class ImageFolder(torch.utils.data.Dataset):
    """Dataset of (image, class index) from a list of files, for `timm.data.create_loader`."""

    def __init__(self, samples: List[Sample], transform: Optional[Callable] = None) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        path, target = self.samples[index]
        image = load_image(path)
        return image if self.transform is None else self.transform(image), target


def _find_samples(root: Path) -> Tuple[List[Sample], Dict[str, int]]:
    """Images of a folder with the indices of their classes, and the indices by name, as timm's reader gives them."""
    paths = sorted(find_files(root, get_img_extensions(as_set=True)), key=natural_key)
    labels = ['' if Path(path).parent == root else Path(path).parent.name for path in paths]
    class_to_idx = {name: i for i, name in enumerate(sorted(set(labels), key=natural_key))}
    return [(path, class_to_idx[label]) for path, label in zip(paths, labels)], class_to_idx


def _split_by_class(samples: List[Sample], fraction: float, seed: int) -> Tuple[List[Sample], List[Sample]]:
    train, val = [], []
    rng = random.Random(seed)
    for target in sorted({t for _, t in samples}):
        of_class = [s for s in samples if s[1] == target]
        rng.shuffle(of_class)
        num_val = min(max(round(fraction * len(of_class)), 1), len(of_class) - 1)
        val += of_class[:num_val]
        train += of_class[num_val:]
    return sorted(train), sorted(val)


def _readable(samples: List[Sample], progress: bool) -> List[Sample]:
    """The samples whose files open; each other file is named in a warning."""
    def error(sample: Sample) -> Optional[InputError]:
        try:
            load_image(sample[0])
        except InputError as e:
            return e
        return None

    with ThreadPoolExecutor() as pool:
        errors = list(tqdm(
            pool.map(error, samples), total=len(samples), desc='checking images', disable=not progress, leave=False))
    for e in filter(None, errors):
        _logger.warning(f'{e}; left out')
    return [s for s, e in zip(samples, errors) if e is None]


def find_split(root: Union[str, Path], val_fraction: float = 0.2, seed: int = 0, progress: bool = False) -> Split:
    """Find the images of a folder and check that each opens.

    Args:
        root: Holds `train/` and `val/` (or `validation/`), or else the class folders themselves, which are then split.
        val_fraction: Share of each class held out where there is no `val/`.
        seed: Of that split.
        progress: Show a progress bar.

    Returns:
        The split, without the files that cannot be opened, of which each is named in a warning.

    Raises:
        InputError: The folder is missing, holds no images or fewer than two classes, a class is left without images, or
            `val/` has a class that `train/` has not.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f'data folder {root} {"is not a folder" if root.exists() else "does not exist"}')
    val_root = next((root / n for n in ('val', 'validation') if (root / n).is_dir()), None)
    train_root = root / 'train' if (root / 'train').is_dir() else root
    if (train_root == root) != (val_root is None):
        raise InputError(f'data folder {root} must hold both train/ and val/, or neither and the class folders instead')

    samples, class_to_idx = _find_samples(train_root)
    classes = list(class_to_idx)
    if not samples:
        raise InputError(f'data folder {train_root} holds no images in class folders')
    if '' in class_to_idx:
        raise InputError(f'data folder {train_root} holds images outside of class folders')
    if len(classes) < 2:
        raise InputError(f'data folder {train_root} holds one class, {classes[0]!r}, at least 2 are needed')
    if val_root is not None:
        val_samples, val_classes = _find_samples(val_root)
        unknown = sorted(set(val_classes) - set(classes))
        if unknown or not val_samples:
            raise InputError(
                f'data folder {val_root} has the class {unknown[0]!r}, which {train_root} has not' if unknown else
                f'data folder {val_root} holds no images in class folders')
        val = _readable([(path, class_to_idx[list(val_classes)[t]]) for path, t in val_samples], progress)
        if not val:
            raise InputError(f'data folder {val_root} holds no image that can be read')
    samples = _readable(samples, progress)
    if val_root is None:
        _check_counts(samples, classes, 2, train_root)
        train, val = _split_by_class(samples, val_fraction, seed)
    else:
        _check_counts(samples, classes, 1, train_root)
        train, val = samples, without_same_files(val, samples, train_root)
        if not val:
            raise InputError(f'data folder {val_root} holds no image that is not one of {train_root} too')
    return Split(classes, train, val)


def _check_counts(samples: List[Sample], classes: List[str], at_least: int, root: Path) -> None:
    counts = Counter(t for _, t in samples)
    for target, name in enumerate(classes):
        if counts[target] < at_least:
            raise InputError(
                f'class folder {root / name} holds {counts[target]} readable images, at least {at_least} are needed')
