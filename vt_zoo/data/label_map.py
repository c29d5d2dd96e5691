"""Label maps, which say what the values and colours of masks mean if they are not class indices (`label_map`)."""
import re
from typing import Any, Dict, Optional, Union

import numpy as np

from ..errors import InputError

__all__ = ['LabelMap', 'read_label_map']

IGNORED = 255
NAMED = 8  # the most values that a message lists


def read_label_map(value: Any) -> Optional[Dict[Union[int, str], int]]:
    """Check and normalise a label map: keys are grey values 0 to 65535 or colours 'R,G,B', values are class indices.

    Args:
        value: Content of YAML or JSON, e.g. `{0: 0, 255: 1}` or `{'255,0,0': 1}`, where class index 255 means that
            pixels are ignored; None for no map.

    Raises:
        InputError: It is not such a mapping, or it has a key twice.
    """
    if value is None:
        return None
    if not isinstance(value, dict) or not value:
        raise _wrong(value)
    result: Dict[Union[int, str], int] = {}
    for key, label in value.items():
        read = _read_key(key)
        if read is None or isinstance(label, bool) or not isinstance(label, int) or not 0 <= label <= IGNORED:
            raise _wrong({key: label})
        if read in result:
            raise InputError(f'label_map names {read!r} twice')
        result[read] = label
    return result


def _wrong(value: Any) -> InputError:
    return InputError(
        'label_map must be class indices, or 255 to ignore, by grey value (0 to 65535) or colour, as {0: 0, 255: 1} or '
        f'{{"0,0,0": 0, "255,0,0": 1}}, got {value!r}')


def _read_key(key: Any) -> Optional[Union[int, str]]:
    if isinstance(key, int) and not isinstance(key, bool) and 0 <= key <= 65535:
        return key
    if isinstance(key, str) and re.fullmatch(r'\s*[0-9]{1,5}\s*(,\s*[0-9]{1,5}\s*){0,2}', key):
        numbers = [int(n) for n in key.split(',')]
        if len(numbers) == 1 and numbers[0] <= 65535:
            return numbers[0]
        if len(numbers) == 3 and max(numbers) <= 255:
            return ','.join(map(str, numbers))
    return None


class LabelMap:
    """A label map that can be applied to masks.

    Args:
        mapping: Label map, as returned by `read_label_map`.
        num_classes: Number of classes.

    Attributes:
        values: Grey values that have a class.
        colors: Colours that have a class, as 'R,G,B'.

    Raises:
        InputError: A class index is neither below `num_classes` nor 255.
    """

    def __init__(self, mapping: Dict[Union[int, str], int], num_classes: int) -> None:
        for key, label in mapping.items():
            if label >= num_classes and label != IGNORED:
                raise InputError(
                    f'label_map maps {key} to class {label}, allowed are 0 to {num_classes - 1} and {IGNORED} '
                    '(ignored)')
        self.values = {key: label for key, label in mapping.items() if isinstance(key, int)}
        self.colors = {key: label for key, label in mapping.items() if isinstance(key, str)}
        self._of_value = np.full(65537, -1, dtype=np.int16)  # the last entry is for values out of range
        self._of_value[IGNORED] = IGNORED
        self._of_value[list(self.values)] = list(self.values.values())
        codes = {_code(*map(int, key.split(','))): label for key, label in self.colors.items()}
        self._codes = np.array(sorted(codes), dtype=np.int64)
        self._of_code = np.array([codes[code] for code in sorted(codes)], dtype=np.int16)

    def of_values(self, pixels: np.ndarray) -> np.ndarray:
        """Map grey values of any shape to classes, int16; 255 is ignored unless the map has it.

        Raises:
            InputError: A value has no class. The message is meant to follow the name of a mask.
        """
        pixels = pixels.astype(np.int64)
        labels = self._of_value[np.where((pixels < 0) | (pixels > 65535), 65536, pixels)]
        if (labels < 0).any():
            raise InputError(f'has the label {pixels[labels < 0][0]}, label_map names {_listed(self.values)}')
        return labels

    def of_colors(self, pixels: np.ndarray) -> np.ndarray:
        """Map colours (..., 3), uint8, to classes (...), int16.

        Raises:
            InputError: A colour has no class. The message is meant to follow the name of a mask.
        """
        codes = _code(*np.moveaxis(pixels.astype(np.int64), -1, 0))
        places = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        wrong = self._codes[places] != codes
        if wrong.any():
            color = ','.join(map(str, pixels[wrong][0]))
            raise InputError(f'has the colour {color}, label_map names {_listed(self.colors)}')
        return self._of_code[places]


def _code(red: Any, green: Any, blue: Any) -> Any:
    return 65536 * red + 256 * green + blue


def _listed(names: Dict[Any, int]) -> str:
    shown = ' and '.join(map(str, list(names)[:NAMED])) or 'none'
    return shown if len(names) <= NAMED else f'{shown} and {len(names) - NAMED} more'
