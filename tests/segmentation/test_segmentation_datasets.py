"""Images and masks in the published layouts of COCO-stuff, COCO panoptic and LIP, and in plain folders."""
import json
import tracemalloc

import numpy as np
import pytest
import torch
from helpers import noise
from PIL import Image, ImageOps

from vt_zoo.segmentation.datasets import FORMATS, SegmentationDataset, load_dataset

NAMES = ['000000000139', '000000000285']
LIP_NAMES = ['100034_483681', '10005_205677']

def save(pixels, path, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **kwargs)


def make_folder(root, height=6, width=8):
    for split in 'train', 'val':
        for i, name in enumerate(['a', 'b']):
            save(noise(height, width, 3, seed=i), root / 'images' / split / f'{name}.png')
            save(noise(height, width, high=3, seed=i), root / 'masks' / split / f'{name}.png')
    (root / 'classes.txt').write_text('sky\nsea\nthe shore\n')
    return root


def make_coco_stuff(root):
    for split in 'train2017', 'val2017':
        for i, name in enumerate(NAMES):
            save(noise(6, 8, 3, seed=i), root / 'images' / split / f'{name}.jpg')
            labels = noise(6, 8, high=182, seed=i)
            labels[0, :4] = 0, 90, 91, 181
            labels[1] = 255
            save(labels, root / 'annotations' / split / f'{name}.png')
    return root


def make_panoptic(root, images='', masks='annotations'):
    """Two images a split of 4x6 pixels: void, two people, a banner, the sea; in the second the sea alone."""
    categories = [
        {'supercategory': 'water', 'isthing': 0, 'id': 155, 'name': 'sea'},  # not in the order of ids
        {'supercategory': 'person', 'isthing': 1, 'id': 1, 'name': 'person'},
        {'supercategory': 'textile', 'isthing': 0, 'id': 92, 'name': 'banner'},
    ]
    segments = [[(7, 1), (256 * 7, 1), (65536 * 200 + 256 * 3 + 1, 92), (5, 155)], [(5, 155)]]
    numbers = np.zeros((2, 4, 6), dtype=np.int64)
    numbers[0, :, 1], numbers[0, :, 2], numbers[0, :, 3], numbers[0, :, 4:] = 7, 256 * 7, 65536 * 200 + 256 * 3 + 1, 5
    numbers[1] = 5
    for split in 'train2017', 'val2017':
        annotations = []
        for i, name in enumerate(NAMES):
            save(noise(4, 6, 3, seed=i), root / images / split / f'{name}.jpg')
            colours = np.stack([numbers[i] % 256, numbers[i] // 256 % 256, numbers[i] // 65536], axis=-1)
            save(colours.astype(np.uint8), root / masks / f'panoptic_{split}' / f'{name}.png')
            annotations.append({
                'segments_info': [
                    {'id': s, 'category_id': c, 'iscrowd': 0, 'bbox': [0, 0, 1, 1], 'area': 4} for s, c in segments[i]],
                'file_name': f'{name}.png',
                'image_id': int(name),
            })
        (root / 'annotations').mkdir(exist_ok=True)
        (root / 'annotations' / f'panoptic_{split}.json').write_text(json.dumps({
            'info': {'year': 2017},
            'licenses': [{'id': 1, 'name': 'a licence'}],
            'images': [{'id': int(n), 'file_name': f'{n}.jpg', 'height': 4, 'width': 6} for n in NAMES],
            'annotations': annotations,
            'categories': categories,
        }))
    return root


def make_lip(root, images='TrainVal_images', masks='TrainVal_parsing_annotations'):
    for split in 'train', 'val':
        for i, name in enumerate(LIP_NAMES):
            save(noise(6, 8, 3, seed=i), root / images / f'{split}_images' / f'{name}.jpg')
            save(noise(6, 8, high=20, seed=i), root / masks / f'{split}_segmentations' / f'{name}.png')
    return root


MAKERS = {'folder': make_folder, 'coco_stuff': make_coco_stuff, 'coco_panoptic_stuff': make_panoptic, 'lip': make_lip}


def test_every_format_is_made_here():
    assert set(MAKERS) == set(FORMATS)


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('name', MAKERS)
def test_every_item(tmp_path, name, split):
    dataset = load_dataset(name, str(MAKERS[name](tmp_path)), split)
    assert isinstance(dataset, SegmentationDataset)
    assert len(dataset) == len(dataset.samples) == 2
    for (image_path, mask_path), (image, mask) in zip(dataset.samples, (dataset[i] for i in range(2))):
        assert split in str(image_path.relative_to(tmp_path)) and split in str(mask_path.relative_to(tmp_path))
        assert image_path.stem == mask_path.stem
        assert (np.asarray(image) == np.asarray(Image.open(image_path).convert('RGB'))).all()
        assert mask.dtype == np.int64
        assert mask.shape[::-1] == image.size
        assert ((mask >= 0) & (mask < len(dataset.classes)) | (mask == dataset.ignore_index)).all()


def test_transform_may_be_set_later(tmp_path):
    dataset = load_dataset('folder', make_folder(tmp_path), 'train')
    assert dataset.transform is None
    image, mask = dataset[1]
    dataset.transform = lambda image, mask: (mask, image)
    assert (dataset[1][0] == mask).all() and dataset[1][1].size == image.size
    assert load_dataset('folder', tmp_path, 'train', transform=lambda image, mask: mask.sum())[1] == mask.sum()


def test_items_from_processes(tmp_path):
    dataset = load_dataset('coco_panoptic_stuff', make_panoptic(tmp_path), 'val', transform=lambda _, mask: mask)
    items = list(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1))
    assert all((item.numpy() == dataset[i]).all() for i, item in enumerate(items))


# the plain folder

def test_folder_classes_and_labels(tmp_path):
    dataset = load_dataset('folder', make_folder(tmp_path), 'train')
    assert dataset.classes == ['sky', 'sea', 'the shore']
    assert dataset.flip_pairs == ()
    assert (dataset[0][1] == noise(6, 8, high=3, seed=0)).all()


def test_folder_takes_grey_palette_and_16_bits(tmp_path):
    make_folder(tmp_path)
    labels = noise(6, 8, high=3)
    labels[0, 0] = 255
    palette = Image.fromarray(labels, mode='L').copy()
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 200] + 253 * [7, 7, 7])
    assert palette.mode == 'P'
    for mask in palette, Image.fromarray(labels), Image.fromarray(labels.astype(np.uint16)):
        save(mask, tmp_path / 'masks' / 'train' / 'a.png')
        assert (load_dataset('folder', tmp_path, 'train')[0][1] == labels).all()


def test_folder_may_hold_other_files(tmp_path):
    make_folder(tmp_path)
    (tmp_path / 'images' / 'train' / 'Thumbs.db').write_bytes(b'')
    save(noise(6, 8, 3), tmp_path / 'images' / 'train' / 'C.JPG')
    save(noise(6, 8, 3), tmp_path / 'images' / 'train' / 'd.tif')
    (tmp_path / 'images' / 'train' / '._a.png').write_bytes(b'\0\5\26\7')
    for name in ('C', 'd'):
        save(noise(6, 8, high=3), tmp_path / 'masks' / 'train' / f'{name}.png')
    save(noise(6, 8, high=3), tmp_path / 'masks' / 'train' / 'without_image.png')
    assert sorted(image.name for image, _ in load_dataset('folder', tmp_path, 'train').samples) == [
        'C.JPG', 'a.png', 'b.png', 'd.tif']


@pytest.mark.parametrize('text, match', [
    (None, 'classes.txt does not exist'),
    (b'', 'classes.txt is empty'),
    (b'\n\n', 'classes.txt is empty'),
    (b'sky\n\nsea\n', 'classes.txt has an empty line'),
    (b'sky\nsea\nsky\n', 'classes.txt has sky twice'),
    (b'\xff\xfe\xfd', 'classes.txt cannot be read'),
    (b''.join(b'%d\n' % i for i in range(256)), '256 classes'),
])
def test_folder_with_wrong_classes(tmp_path, input_error, text, match):
    path = make_folder(tmp_path) / 'classes.txt'
    path.unlink() if text is None else path.write_bytes(text)
    with input_error(match):
        load_dataset('folder', tmp_path, 'train')


# COCO-stuff

def test_coco_stuff_classes(tmp_path):
    dataset = load_dataset('coco_stuff', make_coco_stuff(tmp_path), 'train')
    assert len(dataset.classes) == len(set(dataset.classes)) == 91
    names = {92: 'banner', 96: 'building-other', 124: 'grass', 149: 'road', 157: 'sky-other', 169: 'tree', 182: 'wood'}
    assert {i: dataset.classes[i - 92] for i in names} == names
    assert dataset.classes == sorted(dataset.classes)
    assert dataset.flip_pairs == ()


def test_coco_stuff_ignores_things(tmp_path):
    for image, mask in (load_dataset('coco_stuff', make_coco_stuff(tmp_path), 'val')[i] for i in range(2)):
        assert mask[0, :4].tolist() == [255, 255, 0, 90]
        assert (mask[1] == 255).all()
        assert image.size == (8, 6)
    stored = noise(6, 8, high=182, seed=1).astype(int)
    assert (mask[2:] == np.where(stored >= 91, stored - 91, 255)[2:]).all()


def test_coco_stuff_label_out_of_range(tmp_path, input_error):
    make_coco_stuff(tmp_path)
    save(np.full((6, 8), 182, dtype=np.uint8), tmp_path / 'annotations' / 'val2017' / f'{NAMES[0]}.png')
    with input_error(rf'{NAMES[0]}\.png has the label 182, allowed are 0 to 181 and 255'):
        load_dataset('coco_stuff', tmp_path, 'val')[0]


# the stuff of COCO's panoptic annotations

@pytest.mark.parametrize('layout', [{}, {'images': 'images'}, {'masks': ''}])
def test_panoptic_stuff(tmp_path, layout):
    dataset = load_dataset('coco_panoptic_stuff', make_panoptic(tmp_path, **layout), 'val')
    assert dataset.classes == ['things', 'banner', 'sea']
    assert dataset[0][1].tolist() == [[255, 0, 0, 1, 2, 2]] * 4
    assert dataset[1][1].tolist() == [[2] * 6] * 4


def test_panoptic_segment_that_is_not_listed(tmp_path, input_error):
    make_panoptic(tmp_path)
    colours = np.full((4, 6, 3), (5, 0, 0), dtype=np.uint8)
    colours[2, 2] = 1, 1, 0
    save(colours, tmp_path / 'annotations' / 'panoptic_val2017' / f'{NAMES[1]}.png')
    dataset = load_dataset('coco_panoptic_stuff', tmp_path, 'val')
    with input_error(rf'{NAMES[1]}\.png has the segment 257, allowed are 0 .* 1 segments that .*val2017\.json'):
        dataset[1]


def test_panoptic_mask_that_is_grey(tmp_path, input_error):
    make_panoptic(tmp_path)
    save(np.full((4, 6), 5, dtype=np.uint8), tmp_path / 'annotations' / 'panoptic_val2017' / f'{NAMES[1]}.png')
    with input_error(rf"{NAMES[1]}\.png is an image of mode 'L', needed is RGB"):
        load_dataset('coco_panoptic_stuff', tmp_path, 'val')[1]


def changed(change):
    return lambda path: path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize('change, match', [
    (lambda path: path.unlink(), r'panoptic_val2017\.json does not exist'),
    (lambda path: path.write_bytes(b'{"annotations": ['), r'panoptic_val2017\.json cannot be read'),
    (lambda path: path.write_bytes(b'\xff' * 10_000), r'panoptic_val2017\.json cannot be read'),
    (changed(lambda content: []), r'panoptic_val2017\.json cannot be read'),
    (changed(lambda content: {'annotations': content['annotations']}), r'panoptic_val2017\.json cannot be read'),
    (changed(lambda content: content | {'annotations': [{'id': 1, 'image_id': 2, 'category_id': 3}]}),
     r'panoptic_val2017\.json cannot be read'),
    (changed(lambda content: content | {'categories': content['categories'][1:]}),
     r'panoptic_val2017\.json has a segment of category 155'),
    (changed(lambda content: content | {'annotations': content['annotations'][1:]}),
     rf'panoptic_val2017\.json has no segments for {NAMES[0]}\.png'),
])
def test_panoptic_json(tmp_path, input_error, change, match):
    make_panoptic(tmp_path)
    change(tmp_path / 'annotations' / 'panoptic_val2017.json')
    with input_error(match):
        load_dataset('coco_panoptic_stuff', tmp_path, 'val')


def test_panoptic_json_takes_little_memory(tmp_path):
    make_panoptic(tmp_path)
    path = tmp_path / 'annotations' / 'panoptic_val2017.json'
    content = json.loads(path.read_text())
    others = [content['annotations'][0] | {'file_name': f'{i}.png'} for i in range(3000)]
    path.write_text(json.dumps(content | {'annotations': content['annotations'] + others}))

    tracemalloc.start()
    plain = json.loads(path.read_text())
    plain_kept, plain_peak = tracemalloc.get_traced_memory()
    del plain
    tracemalloc.stop()
    tracemalloc.start()
    dataset = load_dataset('coco_panoptic_stuff', tmp_path, 'val')
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == 2
    assert kept < plain_kept / 20
    assert peak < 0.7 * plain_peak


# LIP

@pytest.mark.parametrize('layout', [
    {},
    {'images': 'TrainVal_images/TrainVal_images'},
    {'masks': 'TrainVal_parsing_annotations/TrainVal_parsing_annotations'},
])
def test_lip(tmp_path, layout):
    dataset = load_dataset('lip', make_lip(tmp_path, **layout), 'train')
    assert len(dataset.classes) == 20
    assert (dataset[1][1] == noise(6, 8, high=20, seed=1)).all()


def test_lip_mirror_pairs_are_left_and_right(tmp_path):
    dataset = load_dataset('lip', make_lip(tmp_path), 'train')
    swapped = {dataset.classes[left]: dataset.classes[right] for left, right in dataset.flip_pairs}
    assert swapped == {'Left-arm': 'Right-arm', 'Left-leg': 'Right-leg', 'Left-shoe': 'Right-shoe'}
    assert sum('Left' in name or 'Right' in name for name in dataset.classes) == 6


@pytest.mark.parametrize('images', ['TrainVal_images', 'TrainVal_images/TrainVal_images'])
def test_lip_ids(tmp_path, input_error, images):
    make_lip(tmp_path, images)
    (tmp_path / images / 'train_id.txt').write_text(LIP_NAMES[1] + '\n')
    dataset = load_dataset('lip', tmp_path, 'train')
    assert [(image.stem, mask.stem) for image, mask in dataset.samples] == [(LIP_NAMES[1],) * 2]
    assert len(load_dataset('lip', tmp_path, 'val')) == 2
    (tmp_path / images / 'train_id.txt').write_text('10_20\n')
    with input_error(r'train_id\.txt lists 10_20, but .*10_20\.jpg does not exist'):
        load_dataset('lip', tmp_path, 'train')


# what may be wrong in any of them

def test_unknown_format_and_split(tmp_path, input_error):
    with input_error("format 'voc' is unknown, allowed are folder, coco_stuff, coco_panoptic_stuff, lip"):
        load_dataset('voc', tmp_path, 'train')
    with input_error("split 'holdout' is unknown, allowed are train, val, test"):
        load_dataset('folder', tmp_path, 'holdout')


def test_missing_root(tmp_path, input_error):
    with input_error('data folder .*nowhere does not exist'):
        load_dataset('folder', tmp_path / 'nowhere', 'train')
    (tmp_path / 'file').touch()
    with input_error('data folder .*file is not a folder'):
        load_dataset('folder', tmp_path / 'file', 'train')


@pytest.mark.parametrize('name, side', [(name, side) for name in MAKERS for side in (0, 1)])
def test_missing_folder(tmp_path, input_error, name, side):
    folder = load_dataset(name, MAKERS[name](tmp_path), 'val').samples[0][side].parent
    folder.rename(tmp_path / 'elsewhere')
    with input_error(f'data folder {folder} does not exist'):
        load_dataset(name, tmp_path, 'val')


@pytest.mark.parametrize('name', MAKERS)
def test_folder_without_images(tmp_path, input_error, name):
    samples = load_dataset(name, MAKERS[name](tmp_path), 'val').samples
    for image, _ in samples:
        image.unlink()
    with input_error(f'data folder {samples[0][0].parent} holds no images'):
        load_dataset(name, tmp_path, 'val')


@pytest.mark.parametrize('name', MAKERS)
def test_missing_mask(tmp_path, input_error, name):
    image, mask = load_dataset(name, MAKERS[name](tmp_path), 'val').samples[1]
    mask.unlink()
    with input_error(f'image {image} has no mask, {mask} does not exist'):
        load_dataset(name, tmp_path, 'val')


def wrong(mask, **kwargs):
    return lambda path: save(mask, path, **kwargs)


@pytest.mark.parametrize('spoil, match', [
    (wrong(noise(8, 6, high=3)), r'b\.png is 6x8 pixels, but image .*b\.png is 8x6'),
    (wrong(np.full((6, 8), 3, np.uint8)), r'b\.png has the label 3, allowed are 0 to 2 and 255'),
    (wrong(np.full((6, 8), 254, np.uint8)), r'b\.png has the label 254'),
    (wrong(np.full((6, 8), 65535, np.uint16)), r'b\.png has the label 65535'),
    (wrong(np.full((6, 8), 511, np.uint16)), r'b\.png has the label 511'),
    (wrong(noise(6, 8, 3)), r"b\.png is an image of mode 'RGB', needed is grey or palette of class indices"),
    (wrong(noise(6, 8, 4)), r"b\.png is an image of mode 'RGBA'"),
    (lambda path: path.write_bytes(path.read_bytes()[:50]), r'b\.png cannot be read'),
    (lambda path: path.write_bytes(b'text'), r'b\.png cannot be read: it is not an image'),
    (lambda path: path.write_bytes(b''), r'b\.png cannot be read'),
])
def test_wrong_mask(tmp_path, input_error, spoil, match):
    dataset = load_dataset('folder', make_folder(tmp_path), 'train')
    spoil(tmp_path / 'masks' / 'train' / 'b.png')
    dataset[0]
    with input_error('mask .*' + match):
        dataset[1]


def test_image_that_cannot_be_read(tmp_path, input_error):
    dataset = load_dataset('folder', make_folder(tmp_path), 'train')
    (tmp_path / 'images' / 'train' / 'b.png').write_bytes(b'text')
    with input_error(r'image .*b\.png cannot be read'):
        dataset[1]


# EXIF orientation

def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize('orientation', range(1, 9))
def test_mask_is_turned_with_its_image(tmp_path, orientation):
    make_folder(tmp_path)
    labels = noise(6, 8, high=3)
    labels[0, 0] = 255
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), *[(0, 0, 0)] * 252, (9, 9, 9)], dtype=np.uint8)
    save(colours[labels], tmp_path / 'images' / 'train' / 'a.png', exif=exif(orientation))
    save(labels, tmp_path / 'masks' / 'train' / 'a.png')
    image, mask = load_dataset('folder', tmp_path, 'train')[0]
    assert (np.asarray(image) == ImageOps.exif_transpose(Image.open(tmp_path / 'images' / 'train' / 'a.png'))).all()
    assert (np.asarray(image) == colours[mask]).all()


def test_exif_of_the_mask_means_nothing(tmp_path):
    make_folder(tmp_path)
    labels = noise(6, 8, high=3)
    save(labels, tmp_path / 'masks' / 'train' / 'a.png', exif=exif(6))
    assert (load_dataset('folder', tmp_path, 'train')[0][1] == labels).all()


def test_mask_of_the_upright_image(tmp_path, input_error):
    make_folder(tmp_path)
    save(noise(6, 8, 3), tmp_path / 'images' / 'train' / 'a.png', exif=exif(6))
    save(noise(8, 6, high=3), tmp_path / 'masks' / 'train' / 'a.png')
    with input_error(r'is 6x8 pixels, but image .*a\.png is 8x6 before its EXIF orientation 6 turns it'):
        load_dataset('folder', tmp_path, 'train')[0]
