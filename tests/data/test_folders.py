"""Folders of pictures as people have them: what is a class, what is a part, in which order, how they are split."""
import logging
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torchvision
from helpers import noise, truncate
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder

from vt_zoo.data.folders import find_images
from vt_zoo.data.image_stream import find_images as find_sources
from vt_zoo.data.images import describe_split, find_split

TIES = ['a', 'A', '1', '01', 'b 2', 'B 02', 'b 10', 'É', 'é', '5²', '²']


def make(root, counts):
    """Pictures 0.png, 1.png, ... in folders, two of each name or as many as `counts` says; damaged ones if negative."""
    for name, count in (counts if isinstance(counts, dict) else dict.fromkeys(counts, 2)).items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(abs(count)):
            Image.fromarray(noise(4, 4, 3, seed=i)).save(root / name / f'{i}.png')
            if count < 0:
                truncate(root / name / f'{i}.png', 0.3)


def counted(samples, classes):
    return dict(Counter(classes[target] for _, target in samples))


def test_order_of_names_that_tie(tmp_path):
    """In timm it is that of a set, which is another in each process."""
    make(tmp_path, TIES)
    assert find_split(tmp_path).classes == ['01', '1', '5²', 'A', 'a', 'B 02', 'b 2', 'b 10', '²', 'É', 'é']


def test_order_does_not_depend_on_that_of_the_disk(tmp_path):
    for name, order in (('one', TIES), ('two', TIES[::-1])):
        make(tmp_path / name, order)
    one, two = (find_split(tmp_path / name) for name in ('one', 'two'))
    assert one.classes == two.classes
    for part in ('train', 'val'):
        assert [path.replace('/one/', '/two/') for path, _ in getattr(one, part)] == [
            path for path, _ in getattr(two, part)]


def test_order_is_that_of_timm_where_no_names_tie(tmp_path):
    make(tmp_path, ['Zebra', 'ant', '10', '9', 'a_b', 'a-b', 'ab', '٣', 'x1y10', 'x1y9'])
    split, reader = find_split(tmp_path), ReaderImageFolder(str(tmp_path))
    assert split.classes == list(reader.class_to_idx)
    assert find_images(tmp_path) == [path for path, _ in reader.samples]


def test_order_of_names_that_tie_is_given_to_timm(tmp_path):
    """By `--class-map`, as docs/training.md says."""
    names = [name for name in TIES if '²' not in name]  # which timm cannot sort at all
    make(tmp_path, names)
    classes = find_split(tmp_path).classes
    (tmp_path / 'classes.txt').write_text('\n'.join(classes), encoding='utf-8')
    reader = ReaderImageFolder(str(tmp_path), class_map='classes.txt')
    assert [reader.class_to_idx[name] for name in classes] == list(range(len(names)))
    assert {(Path(path).parent.name, target) for path, target in reader.samples} == set(reader.class_to_idx.items())


@pytest.mark.parametrize('train, val', [('train', 'val'), ('Training', 'VALID'), ('TRAIN', 'Validation')])
def test_first_level_is_the_class(tmp_path, train, val):
    for part in (train, val):
        make(tmp_path / part, ['cat/camera1', 'cat/camera2', 'dog/camera1', 'dog/camera2/day', 'dog'])
    split = find_split(tmp_path)
    assert split.classes == ['cat', 'dog']
    for part, samples in ((train, split.train), (val, split.val)):
        assert counted(samples, split.classes) == {'cat': 4, 'dog': 6}
        assert {Path(path).relative_to(tmp_path).parts[0] for path, _ in samples} == {part}


def test_classes_are_those_of_torchvision(tmp_path):
    make(tmp_path / 'train', ['cat', 'cat/augmented/2', 'dog/camera1', 'dog/camera2', 'ant/camera1'])
    theirs = torchvision.datasets.ImageFolder(str(tmp_path / 'train'))
    split = find_split(tmp_path / 'train')
    assert {(path, split.classes[target]) for path, target in split.train + split.val} == {
        (path, theirs.classes[target]) for path, target in theirs.samples}


def test_subfolders_of_class_folders(tmp_path):
    make(tmp_path, ['cat', 'cat/augmented', 'dog', 'dog/augmented', 'bird/sparrow', 'bird/wren'])
    split = find_split(tmp_path)
    assert counted(split.train + split.val, split.classes) == {'bird': 4, 'cat': 4, 'dog': 4}


def test_folder_that_is_called_train_holds_classes_alone(tmp_path):
    make(tmp_path / 'Train', ['cat/camera1', 'cat/camera2', 'dog/camera1', 'dog/camera2'])
    assert find_split(tmp_path / 'Train').classes == ['cat', 'dog']


@pytest.mark.parametrize('test', ['test', 'Testing', 'evaluation'])
def test_test_part_is_not_trained_on(tmp_path, test):
    for part in ('train', 'val', test):
        make(tmp_path / part, ['cat', 'dog'])
    make(tmp_path / test, ['zebra'])
    split = find_split(tmp_path)
    assert not [path for path, _ in split.train + split.val if f'/{test}/' in path]
    assert [(Path(path).parts[-3:-1], target) for path, target in split.test] == [
        ((test, name), target) for name, target in (('cat', 0), ('dog', 1), ('zebra', -1)) for _ in range(2)]


def test_test_part_beside_class_folders(tmp_path):
    make(tmp_path, ['cat', 'dog', 'test'])
    split = find_split(tmp_path)
    assert split.classes == ['cat', 'dog']
    assert (len(split.train), len(split.val), [target for _, target in split.test]) == (2, 2, [-1, -1])


def test_what_is_left_out_without_a_word(tmp_path, caplog):
    """What systems leave behind, and files that are no images by their names."""
    make(tmp_path, ['cat', 'dog', '.ipynb_checkpoints', 'cat/.thumbnails', '__MACOSX/cat', 'dog/@eaDir/0.png'])
    (tmp_path / 'cat' / '._0.png').write_bytes(b'\0\5\26\7')
    (tmp_path / 'cat' / 'Thumbs.db').write_text('x')
    (tmp_path / 'README.txt').write_text('x')
    (tmp_path / 'empty').mkdir()
    split = find_split(tmp_path)
    assert counted(split.train + split.val, split.classes) == {'cat': 2, 'dog': 2}
    assert not caplog.text


def test_val_may_lack_a_class(tmp_path):
    make(tmp_path / 'train', {'ant': 2, 'cat': 2, 'dog': 2})
    make(tmp_path / 'val', {'dog': 1, 'cat': 1})
    split = find_split(tmp_path)
    assert [(Path(path).parts[-2], target) for path, target in split.val] == [('cat', 1), ('dog', 2)]


def test_split_is_stratified(tmp_path):
    make(tmp_path, {'a': 20, 'b': 10, 'c': 2})
    split = find_split(tmp_path, val_fraction=0.2)
    assert Counter(target for _, target in split.val) == {0: 4, 1: 2, 2: 1}
    assert Counter(target for _, target in split.train) == {0: 16, 1: 8, 2: 1}
    assert len(set(split.train) | set(split.val)) == 32


@pytest.mark.parametrize('fraction', [0.01, 0.99])
def test_both_parts_have_each_class(tmp_path, fraction):
    make(tmp_path, {'a': 5, 'b': 3})
    split = find_split(tmp_path, fraction)
    assert {target for _, target in split.train} == {target for _, target in split.val} == {0, 1}


def test_split_depends_on_the_seed_alone(tmp_path):
    make(tmp_path, {'a': 20, 'b': 20})
    splits = []
    for seed in (0, 0, 1):
        random.seed(None)
        splits.append(find_split(tmp_path, seed=seed))
    assert splits[0] == splits[1]
    assert splits[0].val != splits[2].val


def test_unreadable_images_are_named_and_left_out(tmp_path, caplog):
    make(tmp_path, {'a': 5, 'b': 5})
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / 'a' / 'half.jpg')
    truncate(tmp_path / 'a' / 'half.jpg')
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
    make(tmp_path / 'train', {'a': 2, 'b': 2})
    make(tmp_path / 'val', {'a': 2, 'b': 2})
    truncate(tmp_path / 'val' / 'a' / '1.png')
    assert len(find_split(tmp_path).val) == 3
    assert '1.png' in caplog.text


@pytest.mark.parametrize('folders, match', [
    (['Training/cat', 'Training/dog', 'Testing/cat', 'Testing/dog'],
     'it holds Testing/ and Training/: give .*Training to hold out a share of it'),
    (['train/cat', 'train/dog', 'test/cat'], 'must hold both train/ and val/.*holds test/ and train/'),
    (['val/cat', 'val/dog', 'test/cat'], 'must hold both train/ and val/.*holds test/ and val/'),
    (['valid', 'invalid'], 'must hold both train/ and val/.*holds valid/'),
    (['train/a', 'train/b', 'val/a', 'Validation/b'], 'has both Validation/ and val/, one is needed'),
    (['fold1/cat', 'fold1/dog', 'fold2/cat', 'fold2/dog'], 'has cat/ in fold1/ and in fold2/: if these are parts'),
    (['x/deep/cat', 'x/deep/dog', 'y/cat', 'y/dog'], 'has cat/ in x/ and in y/: if these are parts'),
    (['seg_train/seg_train/sea', 'seg_train/seg_train/wood', 'seg_test/seg_test/sea'],
     'has seg_test/, which looks like a part of the data'),
    (['training_set/cats', 'training_set/dogs', 'test_set'], 'has test_set/, which looks like a part of the data'),
    (['cat', 'dog', 'Validation Images'], 'has Validation Images/, which looks like a part of the data'),
    (['archive/train/cat', 'archive/train/dog', 'archive/val/cat'], "one class, 'archive', .*; give .*archive if that"),
    (['cat/camera1', 'cat/camera2', 'dog/camera1'], 'has camera1/ in cat/ and in dog/.*call the data folder train/'),
    (['train/cat', 'train/dog', 'val/Cat', 'val/dog'], "val has the class 'Cat', which .*train does not have"),
    (['train/cat', 'train/dog', 'val'], 'val holds images outside of class folders'),
    (['test/cat', 'test/dog'], 'holds no images in class folders'),
    ({}, 'holds no images'),
    ({'a': 0, 'b': 0}, 'holds no images'),
    (['a'], "one class, 'a'"),
    (['train/a', 'val/a'], "one class, 'a'"),
    (['a', 'b', '.'], 'outside of class folders'),
    (['train/a', 'train/b'], 'both train/ and val/'),
    (['val/a', 'val/b'], 'both train/ and val/'),
    ({'train/a': 2, 'train/b': 2, 'val': 0}, 'val holds no images'),
    ({'val/a': 2, 'val/b': 2, 'train': 0}, 'train holds no images'),
    ({'a': 2, 'lonely': 1}, 'lonely holds 1 readable image'),
    ({'a': 4, 'bad': -2}, 'bad holds 0 readable images'),
    ({'train/a': 4, 'train/bad': -1, 'val/a': 4, 'val/bad': 1}, 'bad holds 0 readable images'),
    ({'train/a': 2, 'train/b': 2, 'val/a': -1}, 'val holds no image that can be read'),
])
def test_folders_that_cannot_be_used(tmp_path, folders, match, input_error):
    make(tmp_path, folders)
    with input_error(match):
        find_split(tmp_path)


@pytest.mark.parametrize('path, match', [('missing', 'missing does not exist'), ('a/0.png', 'a/0.png is not a folder')])
def test_what_is_no_folder(tmp_path, path, match, input_error):
    make(tmp_path, ['a'])
    with input_error(match):
        find_split(tmp_path / path)


@pytest.mark.parametrize('name', ['bullet train', 'test tube', 'data', 'setter', 'part 1', 'validated'])
def test_class_that_reads_only_somewhat_like_a_part(tmp_path, name):
    make(tmp_path, [name, 'cat'])
    assert name in find_split(tmp_path).classes


def test_description(tmp_path):
    for part in ('train', 'val'):
        make(tmp_path / part, ['cat'])
    make(tmp_path / 'train', {'dog': 3})
    make(tmp_path / 'test', ['cat', 'new'])
    assert describe_split(find_split(tmp_path)) == [
        'train      5 images of 2 classes: cat (2), dog (3)',
        'val        2 images of 2 classes: cat (2), dog (0)',
        'test       4 images of 2 classes: cat (2), dog (0), others (2); not used']


def test_description_of_many_classes(tmp_path):
    make(tmp_path, {**dict.fromkeys(map(str, range(21)), 4), '7': 3})
    train, val = describe_split(find_split(tmp_path, 0.25))
    assert train == 'train      62 images of 21 classes: the smallest is 7 (2)'
    assert val == 'val        21 images of 21 classes: the smallest is 0 (1)'


@pytest.mark.parametrize('suffix', ['.webp', '.tif', '.BMP', '.gif', '.ppm'])
def test_kinds_of_image_files(tmp_path, suffix):
    """The same files in a folder are images to train on and images to predict."""
    make(tmp_path, ['cat', 'dog'])
    (tmp_path / 'owl').mkdir()
    for i in range(2):
        Image.new('RGB', (4, 4), (i, 0, 0)).save(tmp_path / 'owl' / f'{i}{suffix}')
    split = find_split(tmp_path)
    assert counted(split.train + split.val, split.classes) == {'cat': 2, 'dog': 2, 'owl': 2}
    assert sorted(path for path, _ in split.train + split.val) == [s.path for s in find_sources([str(tmp_path)])]


def test_copies_of_systems_are_not_predicted(tmp_path):
    make(tmp_path, ['cat', '@eaDir/cat', '__MACOSX/cat', '.thumbnails'])
    assert [source.name for source in find_sources([str(tmp_path)])] == ['cat/0.png', 'cat/1.png']
