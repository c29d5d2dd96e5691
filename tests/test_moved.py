"""What could be imported from vt_zoo 0.1 still can, with a DeprecationWarning that says where it is."""
import importlib

import pytest

import vt_zoo
from vt_zoo import _moved

IMPORTS = [  # old module, old name, where it is, its name there
    ('vt_zoo.checkpoint', 'load_model', 'vt_zoo.weights', 'load_model'),
    ('vt_zoo.checkpoint', 'whole', 'vt_zoo.files', 'whole'),
    ('vt_zoo.checkpoint', 'write_model', 'vt_zoo.weights', 'write_model'),
    ('vt_zoo.convert', 'convert', 'vt_zoo.weights', 'convert'),
    ('vt_zoo.digits', 'write_digits', 'vt_zoo.data', 'write_digits'),
    ('vt_zoo.finetune', 'finetune', 'vt_zoo.classification', 'finetune'),
    ('vt_zoo.images', 'load_image', 'vt_zoo.data', 'load_image'),
    ('vt_zoo.publish', 'upload', 'vt_zoo.weights', 'upload'),
    ('vt_zoo.quantize', 'quantize', 'vt_zoo.export', 'quantize'),
    ('vt_zoo.analysis.capture', 'capture', 'vt_zoo.analysis', 'capture_tokens'),
    ('vt_zoo.analysis.subject', 'load_subject', 'vt_zoo', 'load'),
    ('vt_zoo.segmentation.model_files', 'load_segmentation_model', 'vt_zoo', 'load'),
    ('vt_zoo.segmentation.train', 'train', 'vt_zoo.segmentation', 'train_segmenter'),
    ('vt_zoo.segmentation.composed_digits', 'write_composed_digits', 'vt_zoo.data', 'write_composed_digits'),
    ('vt_zoo.layers', 'TokenNorm', 'vt_zoo.layers.linear', 'TokenNorm'),
    ('vt_zoo.layers', 'PixelLinear', 'vt_zoo.layers.linear', 'PixelLinear'),
    ('vt_zoo.layers', 'KMeans', 'vt_zoo.layers.kmeans', 'KMeans'),
    ('vt_zoo.layers', 'split_heads', 'vt_zoo.layers.attention', 'split_heads'),
    ('vt_zoo.layers', 'token_grid', 'vt_zoo.layers.tokenizer', 'token_grid'),
]


@pytest.mark.parametrize('old, name, new, new_name', IMPORTS)
def test_old_import(old, name, new, new_name):
    with pytest.warns(DeprecationWarning, match=f'{new_name} since vt_zoo 0.2'):
        found = getattr(importlib.import_module(old), name)
    assert found is getattr(importlib.import_module(new), new_name)


@pytest.mark.parametrize('old', _moved.MODULES)
def test_old_module_has_its_public_names(old):
    module, new = importlib.import_module(old), importlib.import_module(_moved.MODULES[old][0])
    for name in getattr(new, '__all__', ()):
        with pytest.warns(DeprecationWarning):
            assert getattr(module, name) is getattr(new, name)


def test_new_import_warns_of_nothing(recwarn):
    assert vt_zoo.load('test_vt_resnet.digits').task == 'classification'
    assert vt_zoo.export.export is importlib.import_module('vt_zoo.export').export
    assert [w for w in recwarn if issubclass(w.category, DeprecationWarning) and 'vt_zoo' in str(w.message)] == []


@pytest.mark.parametrize('module', ['vt_zoo', 'vt_zoo.checkpoint', 'vt_zoo.layers', 'vt_zoo.weights'])
def test_unknown_name(module):
    with pytest.raises(AttributeError, match='no_such_name'):
        _ = importlib.import_module(module).no_such_name
