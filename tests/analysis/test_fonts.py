"""Names in any script, drawn with a font that has their letters or said not to be drawn."""
import logging
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from vt_zoo import fonts
from vt_zoo.analysis.figures import draw_interaction, draw_locality, draw_token_attention
from vt_zoo.segmentation.predict import draw_overlay

pytest.importorskip('matplotlib')

NOWHERE = '\u13a0\U00012000'  # Cherokee and cuneiform: no font has both


@pytest.fixture
def no_fonts(monkeypatch):
    """A machine with no font but Pillow's own."""
    monkeypatch.setattr(fonts, '_font_files', lambda: ())
    fonts._find_for_letters.cache_clear()
    fonts.warn_of.cache_clear()
    yield
    fonts._find_for_letters.cache_clear()
    fonts.warn_of.cache_clear()


def legend(name):
    """The legend beside a picture that is all of one class."""
    picture = draw_overlay(Image.new('RGB', (20, 20)), np.zeros((20, 20), np.uint8), [name])
    return np.asarray(picture)[:, 40:]


def ink(font, letter):
    return bytes(font.getmask(letter))


@pytest.mark.parametrize('name', ['Straße', 'café', 'Fußgänger', 'собака', 'Ελληνικά', 'Ł', 'a\u0308'])
def test_letters_have_shapes_of_their_own(name):
    (text, font), = fonts.drawable([name], ['class 0'])
    assert text != 'class 0'
    drawn = [ink(font, letter) for letter in sorted(set(text))]
    assert len(set(drawn)) == len(drawn)
    assert ink(font, fonts.NO_CHARACTER) not in drawn


def test_legend_tells_names_apart():
    assert not np.array_equal(legend('käse'), legend('köse'))
    assert np.array_equal(legend('ka\u0308se'), legend('käse'))


@pytest.mark.parametrize('name', [NOWHERE, 'tab\there', '\udce4', 'line\nbreak', '\x07'])
def test_name_that_cannot_be_drawn_is_named_and_numbered(name, caplog):
    fonts.warn_of.cache_clear()
    with caplog.at_level(logging.WARNING, 'vt_zoo'):
        assert np.array_equal(legend(name), legend('class 0'))
        legend(name)
    assert len(caplog.records) == 1
    assert f'cannot draw {name!a}' in caplog.text


def test_machine_without_fonts(no_fonts, caplog):
    with caplog.at_level(logging.WARNING, 'vt_zoo'):
        (text, font), (plain, own) = fonts.drawable(['Straße', 'road'], ['class 0', 'class 1'])
    assert (text, plain) == ('class 0', 'road')
    assert own.getlength('road') == ImageFont.load_default().getlength('road') and font.getlength('class 0') > 0
    assert ascii('Straße') in caplog.text


def test_fonts_of_the_machine_without_matplotlib(tmp_path, monkeypatch):
    """As on Linux; a file that is no font is passed over."""
    dejavu = fonts.find_font_file('ß', True)
    folder = tmp_path / '.local' / 'share' / 'fonts' / 'truetype'
    folder.mkdir(parents=True)
    (folder / 'A Sans.ttf').write_bytes(b'no font')
    (folder / 'Mine.TTF').write_bytes(dejavu.read_bytes())
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setattr(sys, 'platform', 'linux')
    monkeypatch.setattr(fonts, 'find_spec', lambda name: None)
    files = list(fonts._list_font_files())
    assert dejavu not in files or dejavu.is_relative_to('/usr')
    assert {folder / 'A Sans.ttf', folder / 'Mine.TTF'} <= set(files)
    monkeypatch.setattr(fonts, '_font_files', lambda: (folder / 'A Sans.ttf', folder / 'Mine.TTF'))
    fonts._find_for_letters.cache_clear()
    assert fonts.find_font_file('ß', True) == folder / 'Mine.TTF'
    fonts._find_for_letters.cache_clear()


def test_scripts_that_need_shapes():
    assert fonts.find_font_file('\u062e\u0637', shapes=False) is None
    assert fonts.find_font_file('\u062e\u0637', shapes=True) is not None, "DejaVu has Arabic"


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', ['a$b$c.png', '$\\frac{', 'käse_1^2.png', 'собака', NOWHERE, '\udce4.png', 'خط'])
def test_titles_of_figures(tmp_path, name):
    """matplotlib warns of letters that it cannot draw and takes what is between two dollars for a formula."""
    image, maps = Image.new('RGB', (16, 16)), torch.rand(1, 2, 4, 4)
    draw_token_attention([image], maps, [name], tmp_path / 'grid.png')
    draw_interaction(image, maps[0], maps[0], name, tmp_path / 'one.png')
    draw_locality(torch.rand(2, 2), 0.1, name, tmp_path / 'locality.svg')
    assert {path.name for path in tmp_path.iterdir()} == {'grid.png', 'one.png', 'locality.svg'}
