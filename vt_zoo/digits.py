"""The handwritten digits that scikit-learn carries, as a folder of images.

1,797 scans of 13 people's handwriting, 8x8 pixels of 17 grey levels: the test part of the UCI set "Optical Recognition
of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998, CC BY 4.0). Nothing is downloaded.
"""
from pathlib import Path
from typing import Union

from PIL import Image

from .errors import InputError

__all__ = ['write_digits']


def write_digits(root: Union[str, Path]) -> None:
    """Write the digits as an ImageFolder: `train/0` to `train/9` (1,347 images), `val/0` to `val/9` (450 images).

    The split is fixed and stratified, so that figures of different runs can be compared. The pixels are the scans'
    own; grey levels 0 to 16 become 0 to 255.

    Args:
        root: Folder to write into.

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
    for split, indices in (('train', train), ('val', val)):
        for i in indices:
            folder = Path(root) / split / str(digits.target[i])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[i] * (255 / 16)).round().astype('uint8')).save(folder / f'{i:04d}.png')
