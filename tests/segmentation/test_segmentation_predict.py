"""Segmenting image files: exact class indices, and a picture of them."""
import shutil

import numpy as np
import pytest
import torch
from helpers import noise, with_eval_size
from PIL import Image

from vt_zoo.data.image_stream import find_images
from vt_zoo.segmentation.predict import draw_overlay, palette, predict_classes
from vt_zoo.segmentation.predict import predict_files as stream
from vt_zoo.weights import load


def predict_files(loaded, paths, out, **kwargs):
    """The paths that are written for files of which none is refused."""
    results = list(stream(loaded, find_images(map(str, paths)), out, **kwargs))
    assert [(r.path, r.error) for r in results] == [(str(p), None) for p in paths]
    return [(r.overlay, r.classes) for r in results]


@pytest.fixture(scope='module')
def loaded(segment_model):
    """A trained model whose last layer is made to say more than background."""
    loaded = load(segment_model)
    torch.manual_seed(0)
    torch.nn.init.normal_(loaded.model.segmentation_head[0].weight)
    torch.nn.init.zeros_(loaded.model.segmentation_head[0].bias)
    return loaded


@pytest.fixture
def pictures(composed, tmp_path):
    folder = shutil.copytree(composed / 'images' / 'train', tmp_path / 'pictures')
    return sorted(folder.iterdir())


def expected_classes(loaded, pixels):
    x = (pixels / 255 - np.array(loaded.preprocessing['mean'])) / np.array(loaded.preprocessing['std'])
    with torch.inference_mode():
        return loaded.model(torch.tensor(x.transpose(2, 0, 1)[None], dtype=torch.float32))[0].argmax(0).numpy()


def read(path):
    with Image.open(path) as image:
        return image.mode, np.asarray(image), image.getpalette()


def test_class_indices_are_the_models(loaded, pictures, tmp_path):
    for (_, classes), path in zip(predict_files(loaded, pictures, tmp_path / 'out'), pictures):
        mode, indices, colours = read(classes)
        assert mode == 'P'
        expected = expected_classes(loaded, np.asarray(Image.open(path)))
        assert len(np.unique(expected)) > 1
        assert np.array_equal(indices, expected)
        assert [tuple(colours[3 * i:3 * i + 3]) for i in range(11)] == palette(11)


def test_files_are_replaced(loaded, pictures, tmp_path):
    (_, first), = predict_files(loaded, [pictures[0]], tmp_path / 'out')
    before = read(first)[1]
    shutil.copy(pictures[1], pictures[0])
    predict_files(loaded, [pictures[0]], tmp_path / 'out')
    assert not np.array_equal(read(first)[1], before)


def test_overlay_is_a_blend_with_the_colours(loaded, pictures):
    image = Image.open(pictures[0])
    classes = predict_classes(loaded, image)
    assert classes.dtype == np.uint8
    picture = draw_overlay(image, classes, loaded.classes)
    assert picture.mode == 'RGB'
    assert picture.width > image.width and picture.height >= image.height
    expected = 0.45 * np.asarray(image) + 0.55 * np.array(palette(11))[classes]
    np.testing.assert_allclose(np.asarray(picture)[:48, :48], expected, atol=1)


def test_legend_shows_the_classes_that_are_there():
    classes = np.zeros((40, 30), dtype=np.uint8)
    classes[:3] = 5
    picture = draw_overlay(Image.new('RGB', (30, 40)), classes, [str(i) for i in range(8)])
    legend = set(map(tuple, np.asarray(picture)[:, 30:].reshape(-1, 3).tolist()))
    assert [i for i, colour in enumerate(palette(8)) if colour in legend] == [0, 5]


def test_legend_of_many_classes_with_long_names():
    classes = np.arange(254, dtype=np.uint8).repeat(4).reshape(8, -1)
    names = [f'class number {i}, "Straße"' for i in range(254)]
    picture = draw_overlay(Image.new('RGB', classes.shape[::-1]), classes, names)
    assert picture.height > 254 * 10
    legend = set(map(tuple, np.asarray(picture)[:, classes.shape[1]:].reshape(-1, 3).tolist()))
    assert set(palette(254)) <= legend


@pytest.mark.parametrize('count', [1, 2, 11, 20, 54, 91, 254, 255])
def test_colours_are_distinct(count):
    colours = np.array(palette(count))
    assert colours.shape == (count, 3)
    assert colours.min() >= 0 and colours.max() <= 255
    distance = np.abs(colours[:, None] - colours[None]).max(-1) + 255 * np.eye(count, dtype=int)
    assert distance.min() >= (10 if count <= 91 else 2)


def test_colours_do_not_depend_on_the_number_of_classes():
    assert palette(254)[:20] == palette(20)


@pytest.mark.parametrize('height, width', [(1, 1), (1, 90), (33, 47), (64, 31)])
@pytest.mark.parametrize('eval_size', [None, 48, (40, 56)])
def test_any_size(loaded, tmp_path, height, width, eval_size):
    """Also of a width or height that the short side cannot keep in proportion with less than a pixel."""
    Image.fromarray(noise(height, width, 3)).save(tmp_path / 'image.png')
    loaded = with_eval_size(loaded, eval_size)
    (overlay, classes), = predict_files(loaded, [tmp_path / 'image.png'], tmp_path / 'out')
    assert read(classes)[1].shape == (height, width)
    assert read(overlay)[1].shape[0] >= height


def test_eval_size_is_used(loaded, pictures):
    image = Image.open(pictures[0])
    other = with_eval_size(loaded, 160)
    assert not np.array_equal(predict_classes(loaded, image), predict_classes(other, image))


def test_image_that_is_turned_by_exif(loaded, tmp_path):
    upright = Image.fromarray(noise(40, 60, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / 'upright.png')
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'turned.png', exif=exif)
    upright_files, turned_files = predict_files(
        loaded, [tmp_path / 'upright.png', tmp_path / 'turned.png'], tmp_path / 'out')
    for ours, theirs in zip(upright_files, turned_files):
        assert np.array_equal(read(ours)[1], read(theirs)[1])
    assert read(turned_files[1])[1].shape == (40, 60)


def test_transparent_and_grey_images(loaded, tmp_path):
    Image.new('RGB', (40, 40), 'white').save(tmp_path / 'white.png')
    Image.new('RGBA', (40, 40), (255, 0, 0, 0)).save(tmp_path / 'clear.png')
    grey = Image.fromarray(noise(40, 40))
    grey.save(tmp_path / 'grey.png')
    grey.convert('RGB').save(tmp_path / 'rgb.png')
    paths = [tmp_path / f'{name}.png' for name in ('white', 'clear', 'grey', 'rgb')]
    white, clear, grey, rgb = (read(classes)[1] for _, classes in predict_files(loaded, paths, tmp_path / 'out'))
    assert np.array_equal(white, clear)
    assert np.array_equal(grey, rgb)


@pytest.mark.parametrize('batch_size', [1, 3])
def test_two_images_of_one_name(loaded, pictures, tmp_path, batch_size):
    (tmp_path / 'other').mkdir()
    same = str(shutil.copy(pictures[1], tmp_path / 'other' / f'{pictures[0].stem}.jpg'))
    sources = find_images([*map(str, pictures[:2]), same])
    results = list(stream(loaded, sources, tmp_path / 'out', batch_size=batch_size))
    assert [r.error is None for r in results] == [True, True, False]
    assert results[2].error.startswith(f'image {same} would be written to the same name as an earlier one')
    assert np.array_equal(
        read(tmp_path / 'out' / f'{pictures[0].stem}_classes.png')[1], predict_classes(loaded, Image.open(pictures[0])))


def test_images_of_several_sizes_in_one_batch(loaded, pictures, tmp_path):
    Image.fromarray(noise(40, 60, 3)).save(tmp_path / 'wide.png')
    paths = [pictures[0], tmp_path / 'wide.png', *pictures[1:4]]
    one, many = (predict_files(loaded, paths, tmp_path / str(n), batch_size=n, workers=2) for n in (1, 5))
    for (_, first), (_, second) in zip(one, many):
        assert np.array_equal(read(first)[1], read(second)[1])


def test_folders_keep_their_subfolders(loaded, pictures, tmp_path):
    for name in ('a', 'b'):
        (tmp_path / 'in' / name).mkdir(parents=True)
        shutil.copy(pictures[0], tmp_path / 'in' / name / 'x.png')
    results = list(stream(loaded, find_images([str(tmp_path / 'in')]), tmp_path / 'out'))
    assert [r.overlay for r in results] == [tmp_path / 'out' / name / 'x_overlay.png' for name in ('a', 'b')]
