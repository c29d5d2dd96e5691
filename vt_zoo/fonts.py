"""Fonts for names in any script: Pillow's own, DejaVu if matplotlib is installed, and the machine's fonts."""
import logging
import os
import sys
import unicodedata
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Tuple, Union

from PIL import ImageFont, features

_logger = logging.getLogger(__name__)

SIZE = 10  # pixels, the size of Pillow's own font
SUFFIXES = ('.ttf', '.otf', '.ttc')
NO_CHARACTER = '\U0010ffff'  # drawn by a font like any character that it does not have

Font = Union[ImageFont.ImageFont, ImageFont.FreeTypeFont]


def drawable(texts: Sequence[str], substitutes: Sequence[str]) -> List[Tuple[str, Font]]:
    """Pair each text with a font that has all of its letters.

    Args:
        texts: Names in any script.
        substitutes: Plain ASCII to draw in place of a text for which there is no font; a warning names such texts.
    """
    result, without = [], []
    for text, substitute in zip(texts, substitutes):
        text = unicodedata.normalize('NFC', text)
        font = ImageFont.load_default() if _is_plain(text) else _load(find_font_file(text, _shapes()))
        if font is None:
            without.append(text)
        result.append((substitute, ImageFont.load_default()) if font is None else (text, font))
    if without:
        warn_of(tuple(without))
    return result


@lru_cache(maxsize=256)
def warn_of(texts: Tuple[str, ...]) -> None:
    """Warn that texts cannot be drawn, once for the same texts."""
    listed = ', '.join(map(ascii, texts[:5])) + (f' and {len(texts) - 5} more' if len(texts) > 5 else '')
    _logger.warning(
        f'the fonts of this machine cannot draw {listed}: pictures show a number or escapes instead (fonts for most '
        'scripts are DejaVu and Noto)')


def find_font_file(text: str, shapes: bool) -> Optional[Path]:
    """Find the first font file that has all letters of a text: matplotlib's DejaVu Sans, then the machine's by name.

    Args:
        text: Text to draw.
        shapes: Whether the renderer can write from right to left, join letters and place marks over them.

    Returns:
        The file; None if there is none, if the text needs a renderer that can do this, or if it has characters that
        cannot be drawn, such as control characters.
    """
    letters = frozenset(c for c in text if not c.isspace())
    if any(unicodedata.category(c) in ('Cc', 'Cs', 'Co', 'Cn') for c in text):
        return None
    needs_shapes = any(unicodedata.bidirectional(c) in ('R', 'AL') or unicodedata.category(c)[0] == 'M' for c in text)
    return None if needs_shapes and not shapes else _find_for_letters(letters)


def _shapes() -> bool:
    """Whether this Pillow can shape text, as `find_font_file` needs to know."""
    return bool(features.check('raqm') and features.check('fribidi'))


@lru_cache(maxsize=4096)
def _find_for_letters(letters: frozenset) -> Optional[Path]:
    return next((path for path in _font_files() if _has(path, letters)), None)


@lru_cache(maxsize=1)
def _font_files() -> Tuple[Path, ...]:
    return tuple(_list_font_files())


def _list_font_files() -> Iterator[Path]:
    matplotlib = find_spec('matplotlib')
    if matplotlib is not None and matplotlib.origin is not None:
        dejavu = Path(matplotlib.origin).parent / 'mpl-data' / 'fonts' / 'ttf' / 'DejaVuSans.ttf'
        if dejavu.is_file():
            yield dejavu
    home = Path(os.path.expanduser('~'))
    folders = {
        'win32': [
            Path(os.environ.get('WINDIR', 'C:/Windows'), 'Fonts'), home / 'AppData/Local/Microsoft/Windows/Fonts'],
        'darwin': ['/System/Library/Fonts', '/Library/Fonts', home / 'Library/Fonts'],
    }.get(sys.platform, ['/usr/share/fonts', '/usr/local/share/fonts', home / '.local/share/fonts', home / '.fonts'])
    for folder in folders:
        found = [Path(root) / name for root, _, names in os.walk(folder) for name in names]
        yield from sorted((path for path in found if path.suffix.lower() in SUFFIXES), key=_plainest_first)


def _plainest_first(path: Path) -> Tuple:
    name = path.name.lower()
    return any(style in name for style in ('bold', 'italic', 'oblique')), 'sans' not in name, name, str(path)


@lru_cache(maxsize=64)
def _load(path: Optional[Path]) -> Optional[ImageFont.FreeTypeFont]:
    try:
        return None if path is None else ImageFont.truetype(str(path), SIZE)
    except (OSError, ImportError, ValueError):  # damaged, bitmaps of another size, or no FreeType
        return None


@lru_cache(maxsize=4096)
def _has(path: Path, letters: frozenset) -> bool:
    font = _load(path)
    if font is None:
        return False
    try:
        missing = _drawn(font, NO_CHARACTER)
        return all(_drawn(font, letter) != missing for letter in letters)
    except (OSError, ValueError):
        return False


def _drawn(font: ImageFont.FreeTypeFont, letter: str) -> Tuple:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()
