"""A segmentation data set of real handwriting: scikit-learn's digits on textured backgrounds, with exact masks.

Each image shows two to five digits that do not overlap, each 1/4 to 1/2 as high as the image. A digit for which no room
is found in 50 trials is left out. The images in train/ use scans from the training part of `vt_zoo.data.digits`, those
in val/ use scans from its validation part. Colours carry no information about classes: a digit's colour is random,
except that its brightness differs from that of the background around it.
"""
from pathlib import Path
from typing import List, Optional, Tuple, Union

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import MAX_SIDE, InputError, short
from ..files import whole
from .digits import read_digits

__all__ = ['write_composed_digits']

CLASSES = ['background', *'0123456789']
MAX_IMAGES = 100_000  # per part, as names have five digits
MIN_SIZE = 32  # with the smallest digits 8 pixels high, like the scans

NUM_DIGITS = (2, 5)
HEIGHT = (1 / 4, 1 / 2)  # of a digit, as a share of the image height
TRIALS = 50  # attempts to find a place for a digit
INK = 0.45  # a pixel of the enlarged scan belongs to the stroke from this share of the darkest grey level
EDGE = 0.2  # width of the soft edge of a stroke, in the same unit
CONTRAST = 0.35  # smallest difference in brightness, 0 to 1, between a digit and the background around it
CELLS = (2, 4, 8, 16, 32)  # cells along each side of the noise grids that make up a background
BRIGHTNESS = np.array([0.299, 0.587, 0.114])  # of red, green and blue


def write_composed_digits(
        root: Union[str, Path],
        num_train: int,
        num_val: int,
        size: int = 96,
        seed: int = 0,
) -> None:
    """Write the data set in the layout of `vt_zoo.segmentation.datasets.FolderDataset`.

    The classes are background and the digits 0 to 9. A scan is enlarged by bicubic interpolation. A pixel belongs to
    the stroke if its grey level is at least 0.45 of the darkest: there, the mask has the digit's class, and the digit's
    colour covers at least half of the pixel. An image depends only on the seed, the size and its own number, not on how
    many images are written.

    Args:
        root: Folder to write, new or empty.
        num_train: Number of images in `train`.
        num_val: Number of images in `val`.
        size: Height and width in pixels.
        seed: Random seed.

    Raises:
        InputError: scikit-learn is not installed, the folder is not empty, a number of images is not between 1 and
            100,000, or the size is not between 32 and 4,096.
    """
    root = Path(root)
    for name, value, least, most in (
            ('num_train', num_train, 1, MAX_IMAGES), ('num_val', num_val, 1, MAX_IMAGES),
            ('size', size, MIN_SIZE, MAX_SIDE)):
        if not least <= value <= most:
            raise InputError(f'{name} {short(value)} must be at least {least} and at most {most}')
    _check_empty(root)
    scans, digits, parts = read_digits()
    numbers = [('train', i) for i in range(num_train)] + [('val', i) for i in range(num_val)]
    with whole(root) as new:
        _check_empty(root)  # another process may have written it since
        for kind in 'images', 'masks':
            for split in parts:
                (new / kind / split).mkdir(parents=True)
        (new / 'classes.txt').write_text('\n'.join(CLASSES) + '\n', encoding='utf-8')
        for split, i in tqdm(numbers, desc='composing digits', leave=False, delay=1, disable=None):
            rng = np.random.default_rng([seed, list(parts).index(split), i])
            chosen = rng.choice(parts[split], rng.integers(*NUM_DIGITS, endpoint=True), replace=False)
            image, mask = _compose([scans[j] / 16 for j in chosen], [1 + digits[j] for j in chosen], size, rng)
            image.save(new / 'images' / split / f'{i:05d}.png')
            mask.save(new / 'masks' / split / f'{i:05d}.png')


def _check_empty(root: Path) -> None:
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise InputError(f'{root} exists, but a new or empty folder is needed')


def _compose(
        scans: List[np.ndarray],
        labels: List[int],
        size: int,
        rng: np.random.Generator,
) -> Tuple[Image.Image, Image.Image]:
    """Compose an image and its mask from scans (8, 8) of ink 0 to 1; a scan for which there is no room is left out."""
    image = _background(size, rng)
    mask = np.zeros((size, size), dtype=np.uint8)
    taken = np.zeros((size, size), dtype=bool)
    for scan, label in zip(scans, labels):
        place = _free_place(taken, rng)
        if place is None:
            continue
        taken[place] = True
        ink = _enlarge(scan, place[0].stop - place[0].start)
        colour = _contrasting_colour(image[place].mean((0, 1)), rng)
        cover = ((ink - INK) / EDGE + 0.5).clip(0, 1)[..., None]
        image[place] = cover * colour + (1 - cover) * image[place]
        mask[place][ink >= INK] = label
    return Image.fromarray((image * 255).round().astype(np.uint8)), Image.fromarray(mask)


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth coloured noise (size, size, 3), 0 to 1: coarse scales look like light, fine ones like grain."""
    image = np.empty((size, size, 3))
    image[:] = rng.uniform(0.2, 0.8, 3)
    for cells in CELLS:
        strength = rng.uniform(0, 0.25)
        grey, colours = rng.uniform(-1, 1, (cells, cells, 1)), rng.uniform(-1, 1, (cells, cells, 3))
        grid = strength * (0.6 * grey + 0.4 * colours)
        image += np.stack([_enlarge(grid[..., c], size) for c in range(3)], axis=-1)
    return image.clip(0, 1)


def _free_place(taken: np.ndarray, rng: np.random.Generator) -> Optional[Tuple[slice, slice]]:
    """Rows and columns of a random square that is still free, or None if none was found."""
    for _ in range(TRIALS):
        height = round(len(taken) * rng.uniform(*HEIGHT))
        top, left = rng.integers(0, len(taken) - height, 2, endpoint=True)
        place = np.s_[top:top + height, left:left + height]
        if not taken[place].any():
            return place
    return None


def _contrasting_colour(background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    while True:
        colour = rng.uniform(0, 1, 3)
        if abs((colour - background) @ BRIGHTNESS) >= CONTRAST:
            return colour


def _enlarge(array: np.ndarray, size: int) -> np.ndarray:
    image = Image.fromarray(array.astype(np.float32))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
