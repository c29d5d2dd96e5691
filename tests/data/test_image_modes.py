"""Pictures of every mode that Pillow knows and files of several pictures: right, or refused in one sentence."""
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from vt_zoo.data.images import load_image

COLOUR = (200, 30, 60)
GREY = 84


def pixel(path):
    """The colour of a picture of one colour."""
    image = load_image(path)
    assert image.mode == 'RGB'
    (_, colour), = image.getcolors()
    return colour


def of_mode(mode):
    """A picture of COLOUR, or of GREY, in a mode."""
    image = Image.new('RGB', (16, 16), COLOUR)
    if mode == 'LAB':
        srgb, lab = ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB')
        return ImageCms.profileToProfile(image, srgb, lab, outputMode='LAB')
    if mode in ('L', 'LA'):
        return Image.new('RGB', (16, 16), (GREY,) * 3).convert(mode)
    if mode == 'P':
        return image.quantize(2)
    return image.convert('P', palette=Image.Palette.ADAPTIVE).convert('PA') if mode == 'PA' else image.convert(mode)


@pytest.mark.parametrize('mode, suffix', [
    ('L', 'png'), ('LA', 'png'), ('LA', 'tiff'), ('P', 'png'), ('P', 'gif'), ('PA', 'tiff'), ('RGB', 'png'),
    ('RGBA', 'png'), ('RGBX', 'tiff'), ('CMYK', 'tiff'), ('CMYK', 'jpg'), ('YCbCr', 'jpg'), ('LAB', 'tiff')])
def test_colour_of_every_mode(tmp_path, mode, suffix):
    path = tmp_path / f'a.{suffix}'
    of_mode(mode).save(path)
    expected = (GREY,) * 3 if mode in ('L', 'LA') else COLOUR
    np.testing.assert_allclose(pixel(path), expected, atol=2)


@pytest.mark.parametrize('mode', ['HSV', 'RGBa', 'La', 'I;16', 'I;16B', 'I;16L', 'I;16N', 'I', 'F'])
def test_modes_that_no_usual_file_has(tmp_path, monkeypatch, mode, input_error):
    """As a plugin of Pillow may open them."""
    if mode == 'I;16N' and int(Image.__version__.split('.')[0]) < 10:
        pytest.skip('this Pillow does not know it')
    value = {'HSV': (0, 255, 200), 'RGBa': (100, 15, 30, 128), 'La': (42, 128), 'F': 0.5}.get(mode, 32896)
    image = Image.new(mode, (4, 4), value)
    image.format = None
    monkeypatch.setattr(Image, 'open', lambda path: image)
    if mode == 'F':
        with input_error('floating point'):
            load_image('a')
        return
    expected = {'HSV': (200, 0, 0), 'RGBa': (227, 142, 157), 'La': (169,) * 3}.get(mode, (128,) * 3)
    np.testing.assert_allclose(pixel('a'), expected, atol=1)


@pytest.mark.parametrize('values', [
    np.linspace(0, 1, 16), np.linspace(-1, 1, 16), np.linspace(0, 255, 16), np.full(16, np.nan)])
def test_floating_point_is_refused(tmp_path, values, input_error):
    Image.fromarray(values.astype(np.float32).reshape(4, 4)).save(tmp_path / 'a.tiff')
    with input_error(r'a\.tiff cannot be read: its values are floating point numbers.*save it with 8 or 16 bits'):
        load_image(tmp_path / 'a.tiff')


@pytest.mark.parametrize('dtype, values, match', [
    (np.int32, [0, 70000], 'go from 0 to 70000, allowed is 0 to 65535'),
    (np.int32, [-5, 1000], 'go from -5 to 1000'),
    (np.int32, [0, 255], 'go up to 255 where 65535 is white, which is all black'),
    (np.uint16, [0, 255], 'go up to 255 where 65535 is white, which is all black'),
])
def test_whole_numbers_whose_white_is_not_known(tmp_path, dtype, values, match, input_error):
    Image.fromarray(np.array([values], dtype=dtype)).save(tmp_path / 'a.tiff')
    with input_error(match):
        load_image(tmp_path / 'a.tiff')


def test_black_picture_of_16_bits(tmp_path):
    Image.fromarray(np.zeros((2, 2), dtype=np.uint16)).save(tmp_path / 'a.png')
    assert pixel(tmp_path / 'a.png') == (0, 0, 0)


def tiff(path, data, size, **tags):
    """A TIFF of one strip, with tags as they are given."""
    numbers = {'bits': 258, 'compression': 259, 'photometric': 262, 'samples': 277, 'sample_format': 339}
    entries = {256: size[0], 257: size[1], 259: 1, 277: 1, 278: size[1], 279: len(data), 273: 8}
    entries.update((numbers[name], value) for name, value in tags.items())
    directory = struct.pack('<H', len(entries))
    for tag in sorted(entries):
        directory += struct.pack('<HHII', tag, 4 if tag in (273, 279) else 3, 1, entries[tag])
    path.write_bytes(struct.pack('<2sHI', b'II', 42, 8 + len(data)) + data + directory + bytes(4))
    return path


def test_grey_of_12_bits_is_scaled_from_its_full_range(tmp_path):
    path = tiff(tmp_path / 'a.tiff', bytes([0xff, 0xf8, 0x00]), (2, 1), bits=12, photometric=1)  # 4095 and 2048
    assert np.asarray(load_image(path))[0, :, 0].tolist() == [255, 127]


@pytest.mark.parametrize('photometric, expected', [(0, [255, 0]), (1, [0, 255])])
def test_16_bits_in_which_zero_is_white(tmp_path, photometric, expected):
    path = tiff(tmp_path / 'a.tiff', struct.pack('<HH', 0, 65535), (2, 1), bits=16, photometric=photometric)
    assert np.asarray(load_image(path))[0, :, 0].tolist() == expected


@pytest.mark.parametrize('bits', [8, 16])
def test_signed_numbers_are_refused(tmp_path, bits, input_error):
    path = tiff(tmp_path / 'a.tiff', bytes(4), (2, 1), bits=bits, photometric=1, sample_format=2)
    with input_error(f'signed numbers of {bits} bits|it is not an image'):  # the latter of an old Pillow
        load_image(path)


def test_ycbcr_without_compression_is_refused(tmp_path, input_error):
    Image.new('YCbCr', (8, 8)).save(tmp_path / 'a.tiff')
    with input_error('YCbCr without compression'):
        load_image(tmp_path / 'a.tiff')


def png(path, size, colour_type, rows, transparent):
    """A PNG of 16 bits a channel with a transparent colour."""
    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))

    data = b''.join(b'\0' + struct.pack(f'>{len(row)}H', *row) for row in rows)
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', *size, 16, colour_type, 0, 0, 0))
        + chunk(b'tRNS', struct.pack(f'>{len(transparent)}H', *transparent))
        + chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b''))
    return path


def test_rgb_of_16_bits(tmp_path):
    path = png(tmp_path / 'a.png', (2, 1), 2, [[51400, 7710, 15420, 65535, 0, 0]], [51400, 7710, 15420])
    assert np.asarray(load_image(path)).tolist() == [[[255, 255, 255], [255, 0, 0]]], 'the first is transparent'


def test_transparent_grey_of_16_bits(tmp_path):
    path = png(tmp_path / 'a.png', (2, 1), 0, [[1000, 32896]], [1000])
    assert np.asarray(load_image(path))[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize('suffix', ['tiff', 'gif', 'webp', 'png'])
def test_first_of_several_pictures(tmp_path, suffix):
    if suffix == 'webp' and not features.check('webp'):
        pytest.skip('this Pillow reads no WebP')
    first, *others = (Image.new('RGB', (16, 16), colour) for colour in (COLOUR, (0, 255, 0), (0, 0, 255)))
    options = {'lossless': True} if suffix == 'webp' else {}
    first.save(tmp_path / f'a.{suffix}', save_all=True, append_images=others, **options)
    assert pixel(tmp_path / f'a.{suffix}') == COLOUR


@pytest.mark.parametrize('compression', [None, 'tiff_lzw'])
@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
def test_tiff_is_turned_upright(tmp_path, orientation, compression):
    raw = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    raw.save(tmp_path / 'a.tiff', tiffinfo={274: orientation}, compression=compression)
    turns = {1: 0, 3: 2, 6: -1, 8: 1}[orientation]
    assert (np.asarray(load_image(tmp_path / 'a.tiff'))[..., 0] == np.rot90(np.asarray(raw), turns)).all()
