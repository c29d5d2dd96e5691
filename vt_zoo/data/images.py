"""Folders of images: finding, checking and opening the files.

`vt_zoo.data.folders` decides which folders are classes, and their order. Unlike timm, this module opens images the way
a person would see them: EXIF orientation is applied, transparency is laid over white, 16-bit scans are scaled instead
of clipped, and images of which white is not known (floating point) are refused.
"""
import logging
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.data
from PIL import ExifTags, Image, ImageOps
from timm.data import create_transform
from torchvision.transforms import v2
from tqdm import tqdm

from ..errors import InputError
from ..files import check_regular, without_same_files
from .folders import check_classes, find_labels, find_parts, is_part, name_order

__all__ = ['ImageFolder', 'Split', 'find_split', 'image_transform', 'load_image', 'prepare_image']

_logger = logging.getLogger(__name__)

Sample = Tuple[str, int]
CHUNK = 100  # files that a thread checks in its turn
MOST_NAMED = 20  # the most classes that `describe_split` lists one by one

BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, SAMPLE_FORMAT = 258, 259, 262, 339  # tags of TIFF
WHITE_IS_ZERO, YCBCR = 0, 6  # of PHOTOMETRIC
SIGNED = 2  # of SAMPLE_FORMAT


def load_image(path: Union[str, Path]) -> Image.Image:
    """Open an image file as 8-bit RGB.

    Args:
        path: The file, of any mode that Pillow knows. EXIF orientation is applied; transparent pixels turn white; grey
            values of 9 to 16 bits are scaled from their full range; palettes, CMYK, YCbCr, LAB and HSV are converted.
            From an animation or a file with several pages, the first image is taken.

    Returns:
        The image in mode 'RGB'.

    Raises:
        InputError: The file is missing, not a regular file, not an image, or damaged; or nothing says which value is
            white, because values are floating point, signed or beyond 16 bits, or are 8-bit values in a 16-bit file,
            which would be all black.
    """
    return load_upright(path)[0]


def load_upright(path: Union[str, Path]) -> Tuple[Image.Image, int]:
    """Like `load_image`, but also return the EXIF orientation, 1 to 8, by which the stored pixels were turned."""
    check_regular(path, 'image')
    try:
        with Image.open(path) as image:
            return _to_rgb(image)
    except FileNotFoundError:
        raise InputError(f'image {path} does not exist') from None
    except IsADirectoryError:
        raise InputError(f'image {path} is a folder, not an image file') from None
    except Exception as e:  # a damaged file makes Pillow's decoders raise nearly anything
        reason = 'it is not an image' if isinstance(e, Image.UnidentifiedImageError) else str(e).rstrip('.')
        raise InputError(f'image {path} cannot be read: {reason}') from e


def _to_rgb(opened: Image.Image) -> Tuple[Image.Image, int]:
    """Convert an image to upright RGB, and return it with its EXIF orientation."""
    tags = getattr(opened, 'tag_v2', {})  # of a TIFF
    bits, (sample_format, *_) = tags.get(BITS_PER_SAMPLE, (16,))[0], tags.get(SAMPLE_FORMAT, (1,))
    photometric = tags.get(PHOTOMETRIC)
    rgb_of_16_bits = opened.format == 'PNG' and opened.tile and opened.tile[0][3] == 'RGB;16B'
    if sample_format == SIGNED and bits < 32:
        raise ValueError(f'its values are signed numbers of {bits} bits, and which one is white is not known')
    if photometric == YCBCR and tags.get(COMPRESSION) == 1:
        raise ValueError('Pillow does not read YCbCr without compression; save it as RGB')

    if opened.format == 'TIFF':
        orientation = tags.get(ExifTags.Base.Orientation, 1)
        opened.filename = ''  # otherwise Pillow maps the file into memory and scrambles what it turns by 90 degrees
        opened.load()  # this turns it upright
        image = opened
    else:
        orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
        image = ImageOps.exif_transpose(opened)
    if image.mode == 'F':
        raise ValueError(
            'its values are floating point numbers, and which are black and white is not known; save it with 8 or 16 '
            'bits')
    if image.mode.startswith('I'):
        image = _grey_of_8_bits(image, 2 ** min(bits, 16) - 1, inverted=photometric == WHITE_IS_ZERO)
    if rgb_of_16_bits and 'transparency' in image.info:
        image.info['transparency'] = tuple(value >> 8 for value in image.info['transparency'])
    if image.mode in ('RGBa', 'La'):
        image = image.convert(image.mode.upper())
    has_alpha = image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info
    if has_alpha or (image.palette and image.palette.mode.endswith('A')):
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB'), orientation if orientation in range(1, 9) else 1


def _grey_of_8_bits(image: Image.Image, white: int, inverted: bool) -> Image.Image:
    """Convert grey values 0 to `white` to mode 'L', or to 'LA' if one of them is transparent."""
    values = np.asarray(image).astype(np.int64)
    low, high = values.min(), values.max()
    if low < 0 or high > white:
        raise ValueError(f'its grey values go from {low} to {high}, allowed is 0 to {white}; save it with 8 or 16 bits')
    if 0 < high * 255 < white:
        raise ValueError(
            f'its grey values go up to {high} where {white} is white, which is all black; save it with 8 bits')
    grey = values * 255 // white
    grey = Image.fromarray((255 - grey if inverted else grey).astype(np.uint8))
    if 'transparency' in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info['transparency'], 0, 255).astype(np.uint8)))
    return grey


def image_mode(channels: int) -> str:
    """Pillow's mode of the images for a model with this many input channels: 'RGB' for 3, 'L' (grey) for 1.

    Raises:
        InputError: The number is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise InputError(
            f'the model takes images of {channels} channels, but an image file gives 1 (grey) or 3 (RGB)')
    return 'L' if channels == 1 else 'RGB'


def _convert(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def image_transform(data_config: Dict[str, Any], **kwargs) -> Callable[[Image.Image], torch.Tensor]:
    """Create timm's inference transform for images returned by `load_image`.

    Args:
        data_config: Data config, as from `timm.data.resolve_data_config`. A model with one input channel gets the image
            in grey.
        **kwargs: Further arguments of `timm.data.create_transform`.

    Raises:
        InputError: The model takes neither 1 nor 3 channels.
    """
    to_mode = partial(_convert, mode=image_mode(data_config['input_size'][0]))
    transform = create_transform(**data_config, **kwargs)
    transform.transforms.insert(0, to_mode)
    return transform


def prepare_image(
        image: Union[Image.Image, torch.Tensor], mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Convert an RGB image, a PIL image or a tensor (..., 3, H, W), to float32 and normalise it by mean and std."""
    x = v2.functional.to_dtype(v2.functional.to_image(image), torch.float32, scale=True)
    return v2.functional.normalize(x, mean, std).as_subclass(torch.Tensor)


def to_eval_size(images: torch.Tensor, eval_size: Optional[Union[int, Tuple[int, int]]]) -> torch.Tensor:
    """Resize images (B, C, H, W) to the (height, width), or short side, of evaluation; None leaves them unchanged."""
    if eval_size is None:
        return images
    if isinstance(eval_size, int):
        factor = eval_size / min(images.shape[-2:])
        eval_size = (round(images.shape[-2] * factor), round(images.shape[-1] * factor))
    return F.interpolate(images, size=eval_size, mode='bilinear', align_corners=False, antialias=True)


@dataclass
class Split:
    """Images in a folder, as (path, class index) pairs, and the names of the classes.

    Attributes:
        classes: Names of the classes, in the order of their indices.
        train: Training images.
        val: Held-out images.
        test: Images that are in neither part and were not opened; the index is -1 if the folder is not a class.
    """
    classes: List[str]
    train: List[Sample]
    val: List[Sample]
    test: List[Sample] = field(default_factory=list)


class ImageFolder(torch.utils.data.Dataset):
    """Dataset of (image, class index) from a list of files, for `timm.data.create_loader`.

    Args:
        samples: The files and their classes.
        transform: Called with each image. May be set later.
        mode: Mode of the images, as returned by `image_mode`.
    """

    def __init__(
            self,
            samples: List[Sample],
            transform: Optional[Callable] = None,
            mode: str = 'RGB',
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.mode = mode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        path, target = self.samples[index]
        image = _convert(load_image(path), self.mode)
        return image if self.transform is None else self.transform(image), target


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
    """Return the samples whose files can be opened, and name each of the others in a warning."""
    def error(sample: Sample) -> Optional[InputError]:
        try:
            load_image(sample[0])
        except InputError as e:
            return e
        return None

    errors: List[Optional[InputError]] = []
    bar = tqdm(total=len(samples), desc='checking images', disable=None if progress else True, leave=False)
    with ThreadPoolExecutor() as pool, bar:  # by chunks, since a small image takes less time than a thread's turn
        for found in pool.map(lambda i: [error(s) for s in samples[i:i + CHUNK]], range(0, len(samples), CHUNK)):
            errors += found
            bar.update(len(found))
    for e in filter(None, errors):
        _logger.warning(f'{e}; left out')
    return [s for s, e in zip(samples, errors) if e is None]


def find_split(
        root: Union[str, Path],
        val_fraction: float = 0.2,
        seed: int = 0,
        progress: bool = False,
        classes: Sequence[str] = (),
) -> Split:
    """Find the images in a folder and check that each of them can be opened.

    Args:
        root: Folder that holds either `train/` and `val/` (or `training/`, `valid/`, `validation/`, in any case), or
            the class folders themselves, which are then split. `test/` (or `testing/`, `evaluation/`) beside them is a
            part of its own. See `vt_zoo.data.folders` for what counts as a class.
        val_fraction: Share of each class to hold out if there is no `val/`.
        seed: Random seed of that split.
        progress: Show a progress bar.
        classes: Order of the classes in a run that is resumed; used if the folder has the same classes.

    Returns:
        The split. Files that cannot be opened are left out, and a warning names each of them. The files in `test/` are
        not opened.

    Raises:
        InputError: The folder is missing, holds no images or fewer than two classes, a class is left without images,
            `val/` has a class that `train/` does not have, or folders may be parts of the data rather than classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f'data folder {root} {"is not a folder" if root.exists() else "does not exist"}')
    parts = find_parts(root)
    if ('train' in parts) != ('val' in parts):
        found = ' and '.join(f'{path.name}/' for path in parts.values())
        hint = f': give {parts["train"]} to hold out a share of it' if 'train' in parts else ''
        raise InputError(
            f'data folder {root} must hold both train/ and val/, or neither and the class folders instead, it holds '
            f'{found}{hint}')
    train_root, test_root = parts.get('train', root), parts.get('test')
    labels = find_labels(train_root, without=None if 'train' in parts else test_root)
    if 'train' not in parts and not is_part(root, 'train'):
        check_classes(root, labels)
    classes = _order_classes(train_root, labels, classes)
    index = {name: target for target, name in enumerate(classes)}
    if 'val' in parts:
        val = _readable(_find_val(parts['val'], index, train_root), progress)
        if not val:
            raise InputError(f'data folder {parts["val"]} holds no image that can be read')
    samples = _readable([(path, index[label]) for path, label in labels], progress)
    if 'val' in parts:
        _check_counts(samples, classes, 1, train_root)
        train, val = samples, without_same_files(val, samples, train_root)
        if not val:
            raise InputError(f'data folder {parts["val"]} holds no image that is not also in {train_root}')
    else:
        _check_counts(samples, classes, 2, train_root)
        train, val = _split_by_class(samples, val_fraction, seed)
    test = [] if test_root is None else [(path, index.get(label, -1)) for path, label in find_labels(test_root)]
    return Split(classes, train, val, test)


def _order_classes(root: Path, labels: List[Tuple[str, str]], known: Sequence[str]) -> List[str]:
    """Names of the classes in a folder; if they are the same as the known ones, in the order of those."""
    classes = sorted({label for _, label in labels}, key=name_order)
    if not classes:
        raise InputError(f'data folder {root} holds no images in class folders')
    if '' in classes:
        raise InputError(f'data folder {root} holds images outside of class folders')
    if len(classes) < 2:
        deep = any(Path(path).parent != root / classes[0] for path, _ in labels)
        hint = f'; give {root / classes[0]} if that is the data folder' if deep else ''
        raise InputError(f'data folder {root} holds only one class, {classes[0]!r}, at least 2 are needed{hint}')
    return list(known) if sorted(known) == sorted(classes) else classes


def _find_val(root: Path, index: Dict[str, int], train_root: Path) -> List[Sample]:
    labels = find_labels(root)
    for path, label in labels:
        if not label:
            raise InputError(f'data folder {root} holds images outside of class folders, as {path}')
        if label not in index:
            raise InputError(f'data folder {root} has the class {label!r}, which {train_root} does not have')
    if not labels:
        raise InputError(f'data folder {root} holds no images in class folders')
    return [(path, index[label]) for path, label in labels]


def _check_counts(samples: List[Sample], classes: List[str], at_least: int, root: Path) -> None:
    counts = Counter(t for _, t in samples)
    for target, name in enumerate(classes):
        if counts[target] < at_least:
            needed = f'{at_least} {"is" if at_least == 1 else "are"} needed'
            raise InputError(
                f'class folder {root / name} holds {counts[target]} readable images, at least {needed}')


def describe_split(split: Split) -> List[str]:
    """Describe each part in a line, with its images by class, or only those of the smallest class if there are many."""
    parts = (('train', split.train, ''), ('val', split.val, ''), ('test', split.test, '; not used'))
    return [f'{name:<11}{_describe_counts(samples, split.classes)}{note}' for name, samples, note in parts if samples]


def _describe_counts(samples: List[Sample], classes: List[str]) -> str:
    counts = Counter(target for _, target in samples)
    if len(classes) <= MOST_NAMED:
        text = ', '.join(f'{name} ({counts[target]})' for target, name in enumerate(classes))
    else:
        smallest = min(range(len(classes)), key=lambda target: counts[target])
        text = f'the smallest is {classes[smallest]} ({counts[smallest]})'
    others = f', others ({counts[-1]})' if counts[-1] else ''
    return f'{len(samples)} images of {len(classes)} classes: {text}{others}'
