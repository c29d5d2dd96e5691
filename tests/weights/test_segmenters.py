"""Segmentation models as files: exact, complete, safetensors only, and one sentence for each that cannot be used."""
import json
import os
import pickle
import re
import shutil

import pytest
import timm
import torch
from helpers import as_in_version_0_1
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from timm.models import save_for_hf

from vt_zoo.models.vt_fpn import VTFPN, PanopticFPN
from vt_zoo.segmentation.settings import SegmentSettings
from vt_zoo.segmentation.train import create_segmenter, encoder_statistics, train_segmenter
from vt_zoo.weights import load
from vt_zoo.weights.files import write_segmenter

CLASSES = ['sky', 'sea', 'the shore, "wet"', 'Düne']
TINY = {'encoder_name': 'tu-test_resnet', 'token_dim': 32, 'pyramid_channels': 32, 'head_channels': 64}


def create(**changes):
    return create_segmenter(SegmentSettings(**{**TINY, **changes}), len(CLASSES)).eval()


def save(path, model=None, eval_size=None):
    write_segmenter(
        path, model or create(), CLASSES, (0.1, 0.2, 0.3), (1., 0.5, 1 / 3), eval_size, dataset='some images',
        metrics={'mIoU': '12.34 %'})


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Folder of a model that was not trained. Not to be changed."""
    path = tmp_path_factory.mktemp('saved') / 'model'
    save(path)
    return path


@pytest.fixture
def my_saved(saved, tmp_path):
    """A copy of saved to change."""
    return shutil.copytree(saved, tmp_path / 'my_saved')


@pytest.mark.parametrize('arch, kind', [('vt_fpn', VTFPN), ('panoptic_fpn', PanopticFPN)])
@pytest.mark.parametrize('eval_size', [None, 40, (40, 36)])
def test_what_is_saved_is_loaded(tmp_path, arch, kind, eval_size):
    given = create(arch=arch, num_tokens=3)
    save(tmp_path / 'model', given, eval_size=eval_size)
    loaded = load(str(tmp_path / 'model'))
    assert type(loaded.model) is kind
    assert not loaded.model.training
    assert (loaded.task, loaded.classes, loaded.eval_size) == ('segmentation', CLASSES, eval_size)
    assert (loaded.preprocessing['mean'], loaded.preprocessing['std']) == ((0.1, 0.2, 0.3), (1., 0.5, 1 / 3))
    assert loaded.input_size == (3, *(eval_size if isinstance(eval_size, tuple) else (None, None)))
    state = loaded.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in given.state_dict().items())
    x = torch.randn(2, 3, 40, 50)
    assert torch.equal(loaded.model(x), given(x))


def test_folder_is_replaced(my_saved):
    (my_saved / 'old.txt').write_text('old')
    model = create()
    save(my_saved, model)
    assert sorted(os.listdir(my_saved)) == ['README.md', 'config.json', 'model.safetensors']
    assert torch.equal(
        load(str(my_saved)).model.decoder.neck.laterals[0].weight, model.decoder.neck.laterals[0].weight)


def test_loading_prints_nothing(saved, capfd):
    load(str(saved))
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('stated', [True, 'imagenet'])
def test_loading_never_fetches_weights_of_the_encoder(my_saved, tmp_path, monkeypatch, stated, input_error):
    def refuse(*args, **kwargs):
        raise ConnectionError('weights are fetched')

    monkeypatch.setattr('timm.models._builder.load_pretrained', refuse)
    with input_error("encoder 'tu-test_resnet.r160_in1k' cannot be made: weights are fetched"):
        create(encoder_name='tu-test_resnet.r160_in1k', encoder_weights=True)

    change_config(my_saved, encoder_weights=stated)
    save(tmp_path / 'again', load(str(my_saved)).model)
    assert json.loads((tmp_path / 'again' / 'config.json').read_text())['encoder_weights'] is None
    VTFPN.from_pretrained(my_saved)


def test_files_and_card(saved):
    assert sorted(os.listdir(saved)) == ['README.md', 'config.json', 'model.safetensors']
    assert os.listdir(saved.parent) == ['model']
    card = ModelCard.load(saved / 'README.md')
    assert card.data.library_name == 'vt_zoo'
    assert card.data.license == 'apache-2.0'
    assert card.data.pipeline_tag == 'image-segmentation'
    assert 'some images' in card.text
    assert '- mIoU: 12.34 %' in card.text


@pytest.mark.parametrize('arch', ['vt_fpn', 'panoptic_fpn'])
def test_code_of_the_card_runs(tmp_path, arch):
    given = create(arch=arch)
    save(tmp_path / 'model', given)
    code = re.search('```python\n(.*?)```', (tmp_path / 'model' / 'README.md').read_text(), re.DOTALL)[1]
    assert '<this repository or folder>' in code
    names = {}
    exec(code.replace('<this repository or folder>', str(tmp_path / 'model')), names)
    x = torch.randn(1, 3, 40, 40)
    assert torch.equal(names['model'](x), given(x))


def change_config(folder, **changes):
    config = json.loads((folder / 'config.json').read_text())
    config.update(changes)
    (folder / 'config.json').write_text(json.dumps({k: v for k, v in config.items() if v != 'remove'}))


def change_file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def half(folder):
    data = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(data[:len(data) // 2])


def weights_of(**changes):
    return lambda folder: save_file(create(**changes).state_dict(), folder / 'model.safetensors')


DAMAGES = {
    'no config': (lambda f: (f / 'config.json').unlink(), 'holds no config.json'),
    'no weights': (lambda f: (f / 'model.safetensors').unlink(), 'holds no model.safetensors'),
    'pickled weights instead': (
        lambda f: (f / 'model.safetensors').rename(f / 'pytorch_model.bin'), 'holds no model.safetensors'),
    'config is no JSON': (change_file('config.json', b'{'), 'cannot be loaded'),
    'config is a list': (change_file('config.json', b'[1]'), 'cannot be loaded'),
    'config is empty': (change_file('config.json', b''), 'cannot be loaded'),
    'another library\'s config': (change_file('config.json', b'{"mean": 0.5}'), "no '_model_class'"),
    'no classes': (lambda f: change_config(f, _classes='remove'), "has no '_classes'"),
    'no mean': (lambda f: change_config(f, _mean='remove'), "has no '_mean'"),
    'mean in words': (lambda f: change_config(f, _mean='half'), 'cannot be loaded'),
    'no number of classes': (lambda f: change_config(f, classes='remove'), 'weights are those of another model'),
    'another class': (lambda f: change_config(f, _model_class='Unet'), 'holds a Unet, allowed are VTFPN, PanopticFPN'),
    'the other class': (
        lambda f: change_config(f, _model_class='PanopticFPN'), 'holds|cannot be loaded'),
    'too few names': (lambda f: change_config(f, _classes=['sky']), 'has 4 classes, its config.json names 1'),
    'unknown encoder': (lambda f: change_config(f, encoder_name='tu-no_such'), 'cannot be loaded.*no_such'),
    'other channels': (lambda f: change_config(f, token_dim=64), 'weights are those of another model'),
    'head that cannot be': (lambda f: change_config(f, head_channels=40), 'cannot be loaded.*multiple of 32'),
    'weights of another encoder': (weights_of(encoder_name='tu-test_vt_resnet'), 'weights are those of another model'),
    'weights without a neck': (
        lambda f: save_file(timm.create_model('test_resnet').state_dict(), f / 'model.safetensors'),
        'weights are those of another model'),
    'weights of 0.1': (
        lambda f: save_file(as_in_version_0_1(create().state_dict()), f / 'model.safetensors'),
        'cannot be loaded: its weights are of vt_zoo 0.1'),
    'half of the weights': (half, 'cannot be loaded'),
    'pickle by another name': (change_file('model.safetensors', pickle.dumps({'a': 1})), 'cannot be loaded'),
    'empty weights': (change_file('model.safetensors', b''), 'cannot be loaded'),
}


@pytest.mark.parametrize('damage, words', DAMAGES.values(), ids=DAMAGES)
def test_damaged_folder(my_saved, damage, words, input_error):
    damage(my_saved)
    with input_error(f'model folder {my_saved}.*({words})'):
        load(str(my_saved), 'segmentation')


def test_what_is_no_folder(saved, tmp_path, input_error):
    with input_error(r'config\.json'):
        load(str(saved / 'config.json'), 'segmentation')
    with input_error('no_such_model does not exist'):
        load(str(tmp_path / 'no_such_model'), 'segmentation')


@pytest.fixture(scope='module')
def trunk(tmp_path_factory):
    """A classifier, and its folder as timm writes it. Not to be changed."""
    statistics = {'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6)}
    model = timm.create_model('test_resnet', num_classes=5, pretrained_cfg_overlay=statistics)
    folder = tmp_path_factory.mktemp('trunk')
    save_for_hf(model, folder, safe_serialization=True)
    return model, folder


def test_encoder_starts_from_a_classifier(trunk):
    model, folder = trunk
    settings = SegmentSettings(**TINY, encoder_weights=str(folder))
    state = create_segmenter(settings, 4).encoder.model.state_dict()
    assert state.keys() == {key for key in model.state_dict() if not key.startswith('fc.')}
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in state.items())
    assert encoder_statistics(settings) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize('encoder', ['tu-resnet18', 'tu-test_efficientnet', 'resnet18'])
def test_encoder_of_another_classifier(trunk, encoder, input_error):
    with input_error(f'encoder_weights {trunk[1]} holds test_resnet, but the encoder is {encoder}'):
        create(encoder_name=encoder, encoder_weights=str(trunk[1]))


@pytest.mark.parametrize('arguments', [{'act_layer': 'gelu'}, {'output_stride': 8}, {'channels': (8, 16, 24, 32)}])
def test_encoder_of_a_classifier_with_other_arguments(tmp_path, arguments, input_error):
    """Some of which have weights of the same shapes."""
    model = timm.create_model('test_resnet', **arguments)
    save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    with input_error(f'encoder_weights {tmp_path} holds test_resnet with other arguments, but the encoder is tu-test'):
        create(encoder_weights=str(tmp_path))


def test_encoder_of_no_classifier(saved, tmp_path, input_error):
    with input_error('is a segmenter, but a classifier is needed'):
        encoder_statistics(SegmentSettings(**TINY, encoder_weights=str(saved)))
    for name in (str(tmp_path / 'no_such_folder'), ''):
        with input_error('encoder_weights must be true, false or the folder of a classifier, got'):
            SegmentSettings(encoder_weights=name)
    assert SegmentSettings(encoder_weights=f'{tmp_path}/').encoder_weights == str(tmp_path)


def test_run_from_a_classifier_does_not_name_its_folder(trunk, composed, segment_settings, tmp_path):
    words = {**segment_settings, 'encoder_weights': str(trunk[1]), 'iterations': 1}
    train_segmenter(composed, tmp_path / 'run', SegmentSettings(**words), device='cpu', progress=False)
    config = (tmp_path / 'run' / 'last' / 'config.json').read_text()
    assert str(trunk[1]) not in config
    assert json.loads(config)['_training']['arguments']['encoder_weights'].startswith('a local folder, SHA-256 of')


@pytest.mark.parametrize('name', ['resnet50.a1_in1k', 'test_resnet', 'vt_resnet50'])
def test_statistics_of_timms_encoders(name):
    cfg = timm.create_model(name, device='meta').pretrained_cfg
    assert encoder_statistics(SegmentSettings(encoder_name=f'tu-{name}')) == (tuple(cfg['mean']), tuple(cfg['std']))


@pytest.mark.parametrize('name', ['resnet50', 'tu-no_such_encoder'])
def test_statistics_that_are_not_known_are_imagenets(name):
    assert encoder_statistics(SegmentSettings(encoder_name=name)) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
