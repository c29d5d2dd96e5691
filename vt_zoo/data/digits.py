"""The handwritten digits that come with scikit-learn, as a folder of images.

They are 1,797 scans of 13 people's handwriting, 8x8 pixels of 17 grey levels each: the test part of the UCI data set
"Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998, CC BY 4.0). Nothing is downloaded.
"""
from pathlib import Path
from typing import Dict, Sequence, Tuple, Union

import numpy as np
from PIL import Image

from ..errors import InputError

__all__ = ['read_digits', 'write_digits']


def read_digits() -> Tuple[np.ndarray, np.ndarray, Dict[str, Sequence[int]]]:
    """Read the scans, their digits and their split, which is fixed and stratified, so that results are comparable.

    Returns:
        Grey levels 0 to 16, (1797, 8, 8); the digits 0 to 9, (1797,); and the indices of the scans in 'train' (1,347)
        and 'val' (450).

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise InputError("the digits need scikit-learn: pip install 'vt_zoo[digits]'") from None

    digits = load_digits()
    train, val = train_test_split(range(len(digits.target)), test_size=0.25, random_state=0, stratify=digits.target)
    return digits.images, digits.target, {'train': train, 'val': val}


def write_digits(root: Union[str, Path]) -> None:
    """Write the digits as an ImageFolder: `train/0` to `train/9` (1,347 images), `val/0` to `val/9` (450 images).

    The images have the size of the scans; grey levels 0 to 16 become 0 to 255.

    Args:
        root: Folder to write into.

    Raises:
        InputError: scikit-learn is not installed.
    """
    scans, digits, parts = read_digits()
    for split, indices in parts.items():
        for i in indices:
            folder = Path(root) / split / str(digits[i])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((scans[i] * (255 / 16)).round().astype('uint8')).save(folder / f'{i:04d}.png')
