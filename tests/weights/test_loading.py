"""`vt_zoo.load`: both tasks, from names, folders of runs and releases, and the hub."""
import shutil

import pytest
import timm
import torch
from helpers import change_config
from hub_server import hub_server
from safetensors.torch import load_file, save_file

import vt_zoo
from vt_zoo.weights.publish import write_release


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_name():
    loaded = vt_zoo.load('test_vt_resnet')
    assert (loaded.task, loaded.classes, loaded.input_size) == ('classification', list('0123456789'), (3, 64, 64))
    assert not loaded.model.training
    assert same(loaded.model, timm.create_model('test_vt_resnet', pretrained=True))


def test_run_of_a_classifier(tiny_run, few_digits):
    loaded = vt_zoo.load(tiny_run.out)
    assert (loaded.task, loaded.classes, loaded.input_size) == ('classification', ['0', '1', '2'], (3, 32, 32))
    assert same(loaded.model, vt_zoo.load(tiny_run.out / 'model').model)
    assert same(loaded.model, vt_zoo.load(f'local-dir:{tiny_run.out / "model"}').model)


def test_release(tiny_run, tmp_path):
    write_release(tiny_run.out, tmp_path / 'release', 'someone/digits')
    assert same(vt_zoo.load(tmp_path / 'release').model, vt_zoo.load(tiny_run.out).model)


def test_run_of_a_segmenter(segment_run, tmp_path):
    """Its last model, not its best."""
    out = shutil.copytree(segment_run.out, tmp_path / 'run')
    best = load_file(out / 'best' / 'model.safetensors')
    save_file({name: tensor + 1 for name, tensor in best.items()}, out / 'best' / 'model.safetensors')
    loaded = vt_zoo.load(out)
    assert (loaded.task, len(loaded.classes), loaded.input_size) == ('segmentation', 11, (3, None, None))
    assert same(loaded.model, vt_zoo.load(out / 'last').model)
    assert not same(loaded.model, vt_zoo.load(out / 'best').model)


def test_a_models_own_folder_comes_before_folders_in_it(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run.out / 'model', tmp_path / 'folder')
    shutil.copytree(tiny_run.out / 'model', folder / 'model')
    (folder / 'model' / 'model.safetensors').unlink()
    assert same(vt_zoo.load(folder).model, vt_zoo.load(tiny_run.out).model)


@pytest.mark.parametrize('kind', ['classification', 'segmentation'])
def test_hub(kind, tiny_run, segment_run, hub_client, tmp_path):
    folder = {'classification': tiny_run.out / 'model', 'segmentation': segment_run.out / 'last'}[kind]
    shutil.copytree(folder, tmp_path / 'hub' / 'someone' / 'model')
    with hub_server(tmp_path / 'hub') as server:
        hub_client(server.url)
        loaded = vt_zoo.load('hf-hub:someone/model')
    assert loaded.task == kind
    assert same(loaded.model, vt_zoo.load(folder).model)


def test_hub_that_gives_no_such_model_or_other_weights(segment_run, hub_client, tmp_path, input_error):
    folder = shutil.copytree(segment_run.out / 'last', tmp_path / 'hub' / 'someone' / 'model')
    change_config(folder, token_dim=64)
    with hub_server(tmp_path / 'hub') as server:
        hub_client(server.url)
        with input_error('its weights are those of another model'):
            vt_zoo.load('hf-hub:someone/model')
        with input_error('model hf-hub:someone/other cannot be loaded: '):
            vt_zoo.load('hf-hub:someone/other')


@pytest.mark.parametrize('task, needed', [('classification', 'a classifier'), ('segmentation', 'a segmenter')])
def test_other_task(task, needed, tiny_run, segment_run, input_error):
    out = tiny_run.out if task == 'segmentation' else segment_run.out
    with input_error(f'model {out} is a (classifier|segmenter), but {needed} is needed'):
        vt_zoo.load(out, task)


@pytest.mark.parametrize('name', ['no_such_model', '/no/such/folder', 'vt_resnet18.untrained'])
def test_what_is_not_there(name, input_error):
    with input_error(name):
        vt_zoo.load(name)


def test_number_of_classes(tiny_run, tmp_path, input_error):
    folder = shutil.copytree(tiny_run.out / 'model', tmp_path / 'model')
    change_config(folder, label_names=['a', 'b'])
    with input_error(f'model {folder} has 3 classes, its config.json names 2'):
        vt_zoo.load(folder)
