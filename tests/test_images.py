"""Folders of images: what opens and how, and how a folder is split."""
import io
import logging
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from timm.data.readers.reader_image_folder import ReaderImageFolder

from vt_zoo.data.images import ImageFolder, find_split, load_image
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


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def over_white(colour, alpha):
    alpha = alpha[..., None] / 255
    return colour * alpha + 255 * (1 - alpha)


def make_images(folder, counts, seed=0):
    """A class folder for each name, with as many PNG files as `counts` says."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(folder / name / f'{i}.png')
    return folder


def truncate(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])
    return path


def test_rgb_is_unchanged(tmp_path):
    array = noise(5, 7, 3)
    assert (pixels(save(array, tmp_path / 'a.png')) == array).all()


def test_path_may_be_a_string(tmp_path):
    array = noise(5, 7, 3)
    assert (pixels(str(save(array, tmp_path / 'a.png'))) == array).all()


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


def test_palette(tmp_path):
    palette_image().save(tmp_path / 'a.png')
    assert pixels(tmp_path / 'a.png').tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 255]]]


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


def test_grey(tmp_path):
    array = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (pixels(save(array, tmp_path / 'a.png')) == array[..., None]).all()


def test_black_and_white(tmp_path):
    array = noise(5, 9) // 128 * 255
    assert (pixels(save(array, tmp_path / 'a.png', mode='1')) == array[..., None]).all()


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


def test_cmyk(tmp_path):
    for cmyk, rgb in [((0, 255, 255, 0), RED), ((0, 0, 0, 0), WHITE), ((0, 0, 0, 255), (0, 0, 0))]:
        Image.new('CMYK', (16, 16), cmyk).save(tmp_path / 'a.jpg', quality=95)
        assert np.abs(pixels(tmp_path / 'a.jpg') - rgb).max() <= 5


def test_webp(tmp_path):
    array = noise(8, 8, 3)
    assert (pixels(save(array, tmp_path / 'a.webp', lossless=True)) == array).all()


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'gif', 'bmp', 'tiff'])
@pytest.mark.parametrize('share', [0, 0.1, 0.5, 0.9])
def test_truncated(tmp_path, suffix, share, input_error):
    path = truncate(save(noise(64, 64, 3), tmp_path / f'my picture.{suffix}'), share)
    with input_error('my picture'):
        load_image(path)


def test_not_an_image(tmp_path, input_error):
    (tmp_path / 'a.jpg').write_text('This is a note.\n')
    with input_error('a.jpg.*not an image'):
        load_image(tmp_path / 'a.jpg')


def test_empty_file(tmp_path, input_error):
    (tmp_path / 'a.jpg').touch()
    with input_error('a.jpg.*not an image'):
        load_image(tmp_path / 'a.jpg')


def test_folder_is_no_image(tmp_path, input_error):
    with input_error('is a folder'):
        load_image(tmp_path)


def test_missing_image(tmp_path, input_error):
    with input_error('no.png does not exist'):
        load_image(tmp_path / 'no.png')


def test_below_a_file(tmp_path, input_error):
    with input_error('cannot be read'):
        load_image(save(noise(4, 4, 3), tmp_path / 'a.png') / 'b.png')


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


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('suffix', ['jpg', 'webp'])
def test_damaged_exif_gives_an_image_or_an_input_error(tmp_path, suffix):
    good = encoded(suffix)
    start = good.index(b'*\0') if b'*\0' in good else good.index(b'\0*')  # of the TIFF header that EXIF begins with
    outcomes = Counter()
    for position in range(start, min(start + 80, len(good))):
        for value in (0, 1, 4, 255):
            data = bytearray(good)
            data[position] = value
            (tmp_path / f'a.{suffix}').write_bytes(data)
            try:
                outcomes[load_image(tmp_path / f'a.{suffix}').size] += 1
            except InputError:
                outcomes['InputError'] += 1
            except Exception as e:
                outcomes[f'{type(e).__name__}: {e}'] += 1
    assert {(16, 12), (12, 16)} <= set(outcomes) <= {(16, 12), (12, 16), 'InputError'}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'gif', 'bmp', pytest.param('avif', marks=pytest.mark.skipif(
    not features.check('avif'), reason='this Pillow reads no AVIF'))])
def test_damaged_bytes_give_an_image_or_an_input_error(tmp_path, suffix):
    rng, good, path = random.Random(0), encoded(suffix), tmp_path / f'a.{suffix}'
    outcomes = Counter()
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            outcomes[load_image(path).mode] += 1
        except InputError as e:
            outcomes['InputError' if '\n' not in str(e) else str(e)] += 1
        except Exception as e:
            outcomes[f'{type(e).__name__}: {e}'] += 1
    assert set(outcomes) == {'RGB', 'InputError'}


def test_dataset(tmp_path):
    array = noise(5, 7, 3)
    path = str(save(array, tmp_path / 'a.png'))
    dataset = ImageFolder([(path, 4)])
    image, target = dataset[0]
    assert (len(dataset), target) == (1, 4)
    assert (np.asarray(image) == array).all()
    assert ImageFolder([(path, 4)], transform=lambda image: image.size)[0] == ((7, 5), 4)


def test_folder_with_train_and_val(tmp_path):
    make_images(tmp_path / 'train', {'cat': 3, 'dog': 4})
    make_images(tmp_path / 'val', {'cat': 1, 'dog': 2})
    split = find_split(tmp_path)
    assert split.classes == ['cat', 'dog']
    folders = [Counter((Path(path).parts[-3], Path(path).parts[-2], split.classes[target]) for path, target in samples)
               for samples in (split.train, split.val)]
    assert folders == [
        {('train', 'cat', 'cat'): 3, ('train', 'dog', 'dog'): 4}, {('val', 'cat', 'cat'): 1, ('val', 'dog', 'dog'): 2}]


def test_folder_named_validation(tmp_path):
    make_images(tmp_path / 'train', {'cat': 2, 'dog': 2})
    make_images(tmp_path / 'validation', {'cat': 1, 'dog': 1})
    assert [Path(path).parts[-3:] for path, _ in find_split(str(tmp_path)).val] == [
        ('validation', 'cat', '0.png'), ('validation', 'dog', '0.png')]


def test_val_may_lack_a_class(tmp_path):
    make_images(tmp_path / 'train', {'ant': 2, 'cat': 2, 'dog': 2})
    make_images(tmp_path / 'val', {'dog': 1, 'cat': 1})
    split = find_split(tmp_path)
    assert [(Path(path).parts[-2], target) for path, target in split.val] == [('cat', 1), ('dog', 2)]


@pytest.mark.parametrize('layout', ['train and val', 'class folders'])
def test_order_of_the_classes_is_that_of_timm(tmp_path, layout):
    names = ['10', '9', 'b', 'Zebra', 'a 2', 'a 10', 'ä']
    root = tmp_path / 'train' if layout == 'train and val' else tmp_path
    make_images(root, dict.fromkeys(names, 2))
    if layout == 'train and val':
        make_images(tmp_path / 'val', dict.fromkeys(names, 1))
    split = find_split(tmp_path)
    reader = ReaderImageFolder(str(root))
    assert dict(zip(split.classes, range(len(names)))) == reader.class_to_idx
    assert set(split.train) <= set(reader.samples)
    assert split.classes != sorted(split.classes)


def test_split_is_stratified(tmp_path):
    make_images(tmp_path, {'a': 20, 'b': 10, 'c': 2})
    split = find_split(tmp_path, val_fraction=0.2)
    assert Counter(target for _, target in split.val) == {0: 4, 1: 2, 2: 1}
    assert Counter(target for _, target in split.train) == {0: 16, 1: 8, 2: 1}
    assert len(set(split.train) | set(split.val)) == 32


@pytest.mark.parametrize('fraction', [0.01, 0.99])
def test_both_parts_have_each_class(tmp_path, fraction):
    make_images(tmp_path, {'a': 5, 'b': 3})
    split = find_split(tmp_path, fraction)
    assert {target for _, target in split.train} == {target for _, target in split.val} == {0, 1}


def test_split_depends_on_the_seed_alone(tmp_path):
    make_images(tmp_path, {'a': 20, 'b': 20})
    splits = []
    for seed in (0, 0, 1):
        random.seed(None)
        splits.append(find_split(tmp_path, seed=seed))
    assert splits[0] == splits[1]
    assert splits[0].val != splits[2].val


def test_unreadable_images_are_named_and_left_out(tmp_path, caplog):
    make_images(tmp_path, {'a': 5, 'b': 5})
    truncate(save(noise(64, 64, 3), tmp_path / 'a' / 'half.jpg'))
    (tmp_path / 'b' / 'note.png').write_text('This is a note.\n')
    os.symlink(tmp_path / 'nowhere.png', tmp_path / 'b' / 'link.png')
    with caplog.at_level(logging.WARNING, 'vt_zoo'):
        split = find_split(tmp_path)
    assert len(split.train) + len(split.val) == 10
    warnings = sorted(r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert len(warnings) == 3
    for message, name in zip(warnings, ('half.jpg', 'link.png', 'note.png')):
        assert name in message


def test_unreadable_images_in_val_are_left_out(tmp_path, caplog):
    make_images(tmp_path / 'train', {'a': 2, 'b': 2})
    make_images(tmp_path / 'val', {'a': 2, 'b': 2})
    truncate(tmp_path / 'val' / 'a' / '1.png')
    assert len(find_split(tmp_path).val) == 3
    assert '1.png' in caplog.text


def test_files_that_are_no_images_by_their_names_are_ignored(tmp_path, caplog):
    make_images(tmp_path, {'a': 2, 'b': 2})
    (tmp_path / 'a' / 'Thumbs.db').write_text('x')
    (tmp_path / 'README.txt').write_text('x')
    (tmp_path / 'empty').mkdir()
    split = find_split(tmp_path)
    assert (split.classes, len(split.train + split.val), caplog.text) == (['a', 'b'], 4, '')


def no_folder(root):
    return root / 'missing'


def empty(root):
    return root


def empty_class_folders(root):
    make_images(root, {'a': 0, 'b': 0})


def one_class(root):
    make_images(root, {'a': 3})


def one_class_in_train(root):
    make_images(root / 'train', {'a': 3})
    make_images(root / 'val', {'a': 1})


def a_file(root):
    return save(noise(4, 4, 3), root / 'a.png')


def images_without_class_folders(root):
    make_images(root, {'a': 2, 'b': 2})
    save(noise(4, 4, 3), root / 'loose.png')


def no_val(root):
    make_images(root / 'train', {'a': 2, 'b': 2})


def no_train(root):
    make_images(root / 'val', {'a': 2, 'b': 2})


def empty_val(root):
    make_images(root / 'train', {'a': 2, 'b': 2})
    (root / 'val').mkdir()


def empty_train(root):
    make_images(root / 'val', {'a': 2, 'b': 2})
    (root / 'train').mkdir()


def class_of_val_alone(root):
    make_images(root / 'train', {'a': 2, 'b': 2})
    make_images(root / 'val', {'a': 2, 'zoo': 2})


def one_image_to_split(root):
    make_images(root, {'a': 2, 'lonely': 1})


def all_of_a_class_unreadable(root):
    make_images(root, {'a': 4, 'bad': 2})
    for path in (root / 'bad').iterdir():
        truncate(path, 0.3)


def all_of_a_class_unreadable_in_train(root):
    make_images(root / 'train', {'a': 4, 'bad': 1})
    make_images(root / 'val', {'a': 4, 'bad': 1})
    truncate(root / 'train' / 'bad' / '0.png', 0.3)


def all_of_val_unreadable(root):
    make_images(root / 'train', {'a': 2, 'b': 2})
    make_images(root / 'val', {'a': 1})
    truncate(root / 'val' / 'a' / '0.png', 0.3)


@pytest.mark.parametrize('make, match', [
    (no_folder, 'missing does not exist'),
    (empty, 'holds no images'),
    (empty_class_folders, 'holds no images'),
    (one_class, "one class, 'a'"),
    (one_class_in_train, "one class, 'a'"),
    (a_file, 'a.png is not a folder'),
    (images_without_class_folders, 'outside of class folders'),
    (no_val, 'both train/ and val/'),
    (no_train, 'both train/ and val/'),
    (empty_val, 'val holds no images'),
    (empty_train, 'train holds no images'),
    (class_of_val_alone, "val has the class 'zoo'"),
    (one_image_to_split, 'lonely holds 1 readable image'),
    (all_of_a_class_unreadable, 'bad holds 0 readable images'),
    (all_of_a_class_unreadable_in_train, 'bad holds 0 readable images'),
    (all_of_val_unreadable, 'val holds no image that can be read'),
])
def test_folder_that_cannot_be_used(tmp_path, make, match, input_error):
    root = make(tmp_path) or tmp_path
    with input_error(match):
        find_split(root)
