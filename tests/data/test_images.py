"""Files of images: what opens and how."""
import io
import random
from collections import Counter

import numpy as np
import pytest
from helpers import noise, truncate
from PIL import Image, features

from vt_zoo.data.images import ImageFolder, load_image
from vt_zoo.errors import InputError

RED, WHITE = (255, 0, 0), (255, 255, 255)

# how a raw image is turned so that a viewer that obeys EXIF orientation k shows the original
RAW = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def pixels(path):
    image = load_image(path)
    assert image.mode == 'RGB'
    return np.asarray(image).astype(int)


def save(array, path, mode=None, **kwargs):
    image = Image.fromarray(np.asarray(array, dtype=np.uint8))
    (image.convert(mode) if mode else image).save(path, **kwargs)
    return path


def over_white(colour, alpha):
    alpha = alpha[..., None] / 255
    return colour * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize('suffix', ['png', 'webp', 'tiff'])
def test_rgba_lies_over_white(tmp_path, suffix):
    array = noise(6, 6, 4)
    array[0, :, 3], array[1, :, 3] = 0, 255
    options = {'lossless': True, 'exact': True} if suffix == 'webp' else {}
    result = pixels(save(array, tmp_path / f'a.{suffix}', **options))
    assert (result[0] == 255).all()
    assert (result[1] == array[1, :, :3]).all()
    np.testing.assert_allclose(result, over_white(array[..., :3], array[..., 3]), atol=1)


def test_grey_with_alpha_lies_over_white(tmp_path):
    array = noise(6, 6, 2)
    array[0, :, 1] = 0
    image = Image.merge('LA', [Image.fromarray(array[..., i].copy()) for i in range(2)])
    image.save(tmp_path / 'a.png')
    result = pixels(tmp_path / 'a.png')
    assert (result[0] == 255).all()
    np.testing.assert_allclose(result, over_white(array[..., :1].repeat(3, -1), array[..., 1]), atol=1)


def palette_image():
    image = Image.fromarray(np.array([[0, 1], [2, 2]], dtype=np.uint8)).convert('P')
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2, 2])
    return image


@pytest.mark.parametrize('suffix', ['png', 'gif'])
def test_palette_with_a_transparent_colour(tmp_path, suffix):
    palette_image().save(tmp_path / f'a.{suffix}', transparency=0)
    expected = [[[255, 255, 255], [0, 255, 0]], [[0, 0, 255], [0, 0, 255]]]
    assert pixels(tmp_path / f'a.{suffix}').tolist() == expected


def test_palette_with_an_alpha_a_colour(tmp_path):
    palette_image().save(tmp_path / 'a.png', transparency=bytes([0, 128, 255]))
    np.testing.assert_allclose(
        pixels(tmp_path / 'a.png'), [[WHITE, (127, 255, 127)], [(0, 0, 255), (0, 0, 255)]], atol=1)


def test_transparent_colour_of_grey_and_rgb(tmp_path):
    Image.fromarray(np.array([[0, 100]], dtype=np.uint8)).save(tmp_path / 'grey.png', transparency=0)
    assert pixels(tmp_path / 'grey.png').tolist() == [[[255] * 3, [100] * 3]]
    image = Image.new('RGB', (2, 1), RED)
    image.putpixel((1, 0), (0, 0, 9))
    image.save(tmp_path / 'rgb.png', transparency=RED)
    assert pixels(tmp_path / 'rgb.png').tolist() == [[list(WHITE), [0, 0, 9]]]


@pytest.mark.parametrize('mode', [None, '1'])
def test_grey(tmp_path, mode):
    array = np.arange(256, dtype=np.uint8).reshape(16, 16) // (128 if mode else 1) * (255 if mode else 1)
    assert (pixels(save(array, tmp_path / 'a.png', mode=mode)) == array[..., None]).all()


@pytest.mark.parametrize('name, dtype', [
    ('a.png', np.uint16), ('a.tiff', np.uint16), ('big_endian.tiff', '>u2'), ('a.tiff', np.int32)])
def test_16_bit_grey_is_scaled(tmp_path, name, dtype):
    values = np.array([[0, 257, 300, 1000], [32768, 50000, 65000, 65535]])
    Image.fromarray(values.astype(dtype)).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.mode.startswith('I')
    np.testing.assert_allclose(pixels(tmp_path / name), (values / 257)[..., None].repeat(3, -1), atol=1)


def test_whole_range_of_16_bit_grey_is_used(tmp_path):
    Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256)).save(tmp_path / 'a.png')
    result = pixels(tmp_path / 'a.png')[..., 0].ravel()
    assert sorted(set(result.tolist())) == list(range(256))
    assert (np.diff(result) >= 0).all()


@pytest.mark.parametrize('orientation', RAW)
@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp'])
def test_exif_orientation(tmp_path, orientation, suffix):
    upright = Image.new('RGB', (48, 32), 'white')
    upright.paste('red', (0, 0, 16, 16))
    upright.paste('blue', (32, 16, 48, 32))
    raw = upright if RAW[orientation] is None else upright.transpose(RAW[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw.save(tmp_path / f'a.{suffix}', exif=exif, quality=95)
    result = pixels(tmp_path / f'a.{suffix}')
    assert result.shape == (32, 48, 3)
    assert np.abs(result - np.asarray(upright)).mean() < 4


def test_exif_orientation_of_16_bit_grey_and_rgba(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)).save(tmp_path / 'grey.png', exif=exif)
    assert pixels(tmp_path / 'grey.png')[0, :, 0].tolist() == [255, 0]
    save([[[255, 0, 0, 255], [0, 255, 0, 0]]], tmp_path / 'rgba.png', exif=exif)
    assert pixels(tmp_path / 'rgba.png').tolist() == [[list(WHITE), list(RED)]]


@pytest.mark.parametrize('suffix', ['png', 'webp'])
def test_rgb_is_unchanged(tmp_path, suffix):
    array = noise(5, 7, 3)
    path = save(array, tmp_path / f'a.{suffix}', **({'lossless': True} if suffix == 'webp' else {}))
    for given in (path, str(path)):
        assert (pixels(given) == array).all()


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'gif', 'bmp', 'tiff'])
@pytest.mark.parametrize('share', [0, 0.1, 0.5, 0.9])
def test_truncated(tmp_path, suffix, share, input_error):
    path = truncate(save(noise(64, 64, 3), tmp_path / f'my picture.{suffix}'), share)
    with input_error('my picture'):
        load_image(path)


@pytest.mark.parametrize('path, match', [
    ('note.jpg', 'note.jpg.*not an image'), ('empty.jpg', 'empty.jpg.*not an image'), ('', 'is a folder'),
    ('no.png', 'no.png does not exist'), ('note.jpg/b.png', 'cannot be read')])
def test_what_is_no_image(tmp_path, path, match, input_error):
    (tmp_path / 'note.jpg').write_text('This is a note.\n')
    (tmp_path / 'empty.jpg').touch()
    with input_error(match):
        load_image(tmp_path / path)


@pytest.mark.filterwarnings('error')
def test_far_too_large(tmp_path, monkeypatch, input_error):
    path = save(noise(64, 64, 3), tmp_path / 'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with input_error('a.png cannot be read'):
        load_image(path)


def encoded(suffix):
    """Bytes of an image with everything that a decoder may trip over."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0132] = 6, 'a maker', '2020:06:08 12:00:00'
    buffer = io.BytesIO()
    options = {'jpg': {'exif': exif}, 'png': {'exif': exif, 'transparency': 3}, 'webp': {'exif': exif}}
    mode = 'P' if suffix in ('png', 'gif') else 'RGB'
    Image.fromarray(noise(16, 12, 3)).convert(mode).save(
        buffer, {'jpg': 'jpeg'}.get(suffix, suffix), **options.get(suffix, {}))
    return buffer.getvalue()


def outcomes(path, contents):
    """What becomes of files: sizes of images, and errors."""
    counts = Counter()
    for content in contents:
        path.write_bytes(content)
        try:
            image = load_image(path)
            assert image.mode == 'RGB'
            counts[image.size] += 1
        except InputError as e:
            counts['InputError' if '\n' not in str(e) else str(e)] += 1
        except Exception as e:
            counts[f'{type(e).__name__}: {e}'] += 1
    return counts


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('suffix', ['jpg', 'webp'])
def test_damaged_exif_gives_an_image_or_an_input_error(tmp_path, suffix):
    good = encoded(suffix)
    start = good.index(b'*\0') if b'*\0' in good else good.index(b'\0*')  # of the TIFF header that EXIF begins with
    found = outcomes(tmp_path / f'a.{suffix}', (
        good[:position] + bytes([value]) + good[position + 1:]
        for position in range(start, min(start + 80, len(good))) for value in (0, 1, 4, 255)))
    assert {(16, 12), (12, 16)} <= set(found) <= {(16, 12), (12, 16), 'InputError'}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'gif', 'bmp', pytest.param('avif', marks=pytest.mark.skipif(
    not features.check('avif'), reason='this Pillow reads no AVIF'))])
def test_damaged_bytes_give_an_image_or_an_input_error(tmp_path, suffix):
    rng, good = random.Random(0), encoded(suffix)

    def damaged():
        for _ in range(400):
            data = bytearray(good)
            for _ in range(rng.choice([1, 1, 2, 8])):
                data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
            yield data

    found = outcomes(tmp_path / f'a.{suffix}', damaged())
    assert 'InputError' in found and len(found) > 1
    assert {outcome for outcome in found if isinstance(outcome, str)} == {'InputError'}


def test_dataset(tmp_path):
    array = noise(5, 7, 3)
    path = str(save(array, tmp_path / 'a.png'))
    dataset = ImageFolder([(path, 4)])
    image, target = dataset[0]
    assert (len(dataset), target) == (1, 4)
    assert (np.asarray(image) == array).all()
    assert ImageFolder([(path, 4)], transform=lambda image: image.size)[0] == ((7, 5), 4)
