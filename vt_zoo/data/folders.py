"""Finding images in folders, and telling which folders are parts of the data and which are classes.

As in torchvision, the first level below the data folder, or below its parts, is the class; images in subfolders belong
to it. Everything is ordered by name alone, in timm's natural, case-insensitive order. Names that are equal in it (`A`
and `a`, `1` and `01`), whose order in timm changes from process to process, are ordered by comparing the names
themselves. Hidden files and folders are skipped, as are `__MACOSX` and `@eaDir`, in which systems keep copies.
"""
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Set, Tuple, Union

from ..errors import InputError
from ..files import walk_files

PARTS = {
    'train': ('train', 'training'),
    'val': ('val', 'valid', 'validation'),
    'test': ('test', 'testing', 'evaluation'),
}
IMAGE_EXTENSIONS = frozenset((  # of the files in a folder that are taken for images
    '.avif', '.bmp', '.dib', '.gif', '.j2k', '.jfif', '.jp2', '.jpe', '.jpeg', '.jpg', '.pbm', '.pgm', '.png', '.pnm',
    '.ppm', '.tga', '.tif', '.tiff', '.webp'))
COPIES = ('__MACOSX', '@eaDir')

_FILLER = '(data|dataset|set|image|img|picture|photo|split|seg|part)s?'
_LIKE_A_PART = re.compile(f'({_FILLER})*(train|training|val|valid|validation|test|testing|eval|evaluation)({_FILLER})*')


def name_order(name: str) -> Tuple[list, str]:
    """Sort key of names: timm's natural order, with ties broken by the name itself."""
    words = re.split(r'(\d+)', name.lower())
    return [int(word) if i % 2 else word for i, word in enumerate(words)], name


def is_image(name: str) -> bool:
    """Whether a file in a folder is taken for an image, judging by the extension of its name."""
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def is_left_out(name: str) -> bool:
    """Whether a file or folder is skipped, because it is hidden or one in which systems keep copies."""
    return name.startswith('.') or name in COPIES


def find_images(folder: Union[str, Path]) -> List[str]:
    """Find all image files in a folder and its subfolders, in the order of their names.

    Links are followed, but each file counts only once, by its real path; a warning says how many links were left out.

    Raises:
        OSError: A folder cannot be read.
    """
    paths = []
    for path, error in walk_files(folder, is_image, is_left_out):
        if error is not None:
            raise error
        paths.append(path)
    return sorted(paths, key=name_order)


def find_parts(root: Path) -> Dict[str, Path]:
    """Find which of the parts 'train', 'val' and 'test' a data folder has, in any of their spellings.

    Raises:
        InputError: There are two folders for the same part.
    """
    parts: Dict[str, Path] = {}
    for path in sorted(p for p in root.iterdir() if p.is_dir()):
        for part, names in PARTS.items():
            if path.name.lower() not in names:
                continue
            if part in parts:
                raise InputError(f'data folder {root} has both {parts[part].name}/ and {path.name}/, one is needed')
            parts[part] = path
    return parts


def is_part(folder: Path, part: str) -> bool:
    """Whether a folder has the name of a part of a data set."""
    return folder.resolve().name.lower() in PARTS[part]


def find_labels(folder: Path, without: Optional[Path] = None) -> List[Tuple[str, str]]:
    """Find the images in a folder, with the class that each belongs to, which is the first folder below this one.

    Args:
        folder: Folder that holds the class folders.
        without: A folder in it that is not a class.

    Returns:
        Paths and class names; the name is '' for an image outside of class folders.
    """
    labels = []
    for path in find_images(folder):
        first, *rest = Path(path).relative_to(folder).parts
        if without is None or first != without.name:
            labels.append((path, first if rest else ''))
    return labels


def check_classes(root: Path, labels: Sequence[Tuple[str, str]]) -> None:
    """Raise InputError if the folders in a data folder may be parts of the data rather than classes.

    Args:
        root: The data folder.
        labels: The images in it, as `find_labels` returns them.
    """
    classes = {label for _, label in labels}
    for name in sorted(classes, key=name_order):
        if _LIKE_A_PART.fullmatch(''.join(re.findall(r'[^\W\d_]', name.lower()))):
            raise InputError(
                f'data folder {root} has {name}/, which looks like a part of the data and not like a class: call parts '
                'train/, val/ and test/, or give the class another name')
    flat = {label for path, label in labels if Path(path).parent == root / label}
    parents: Dict[str, Set[str]] = defaultdict(set)
    for path, label in labels:
        if label not in flat:
            for name in Path(path).relative_to(root / label).parts[:-1]:
                parents[name].add(label)
    for name in sorted(parents, key=name_order):
        if len(parents[name]) > 1:
            first, second = sorted(parents[name], key=name_order)[:2]
            raise InputError(
                f'data folder {root} has {name}/ in {first}/ and in {second}/: if these are parts of the data, call '
                f'them train/ and val/; if they are classes, take the pictures out of their subfolders, or call the '
                'data folder train/')
