"""VTNet: a VT stage on timm's convolutional models, whichever they are."""
import json

import huggingface_hub
import pytest
import timm
import torch
import torch.nn as nn
from helpers import assert_equal, images, norms_of, outputs, stir
from safetensors.torch import save_file
from timm.models._manipulate import group_parameters
from timm.utils import reparameterize_model

from vt_zoo._requirements import timm_is_at_least
from vt_zoo.analysis.cost import count_multiply_adds, count_weights
from vt_zoo.cli.main import main
from vt_zoo.models.trunk import create_trunk
from vt_zoo.weights.files import write_model
from vt_zoo.weights.loading import load_model

TRUNKS = [
    'test_resnet', 'test_convnext', 'test_efficientnet', 'test_byobnet', 'mobilenetv4_conv_small', 'regnety_002',
    'repvgg_a0', 'fastvit_t8', 'test_nfnet', 'cs3darknet_s', 'vgg11']
SMALL = {'token_dim': 32, 'num_tokens': 4, 'num_classes': 5}


def create(trunk, **kwargs):
    torch.manual_seed(0)
    return timm.create_model('vt_net', trunk=trunk, **{**SMALL, **kwargs})


@pytest.mark.parametrize('trunk', TRUNKS)
def test_trunk_is_timms_down_to_stride_16(trunk):
    """The same maps as timm's own, from the same weights, and nothing after them."""
    torch.manual_seed(0)
    whole = timm.create_model(trunk, features_only=True).eval()
    torch.manual_seed(0)
    cut = create_trunk(trunk).eval()
    weights = {k.replace('.', '_'): v for k, v in whole.state_dict().items()}
    cut.load_state_dict({k: weights[k.replace('.', '_')] for k in cut.state_dict()})
    strides = whole.feature_info.reduction()
    x = images(2, 96, 64)
    maps = cut(x)
    assert cut.feature_info.reduction() == strides[:strides.index(16) + 1]
    with torch.no_grad():
        for result, expected in zip(maps, whole(x)):
            assert torch.equal(result, expected)
    maps[-1].square().sum().backward()
    assert all(p.grad is not None for p in cut.parameters())


@pytest.mark.parametrize('trunk', TRUNKS)
def test_tokens_logits_and_features(trunk):
    model, x = create(trunk).eval(), images(2, 96, 64)
    features = create(trunk, features_only=True).eval()
    with torch.no_grad():
        assert model.forward_features(x).shape == (2, 4, 32) and model(x).shape == (2, 5)
        maps = features(x)
    strides, channels = features.feature_info.reduction(), features.feature_info.channels()
    assert strides[-2:] == [16, 32]
    assert [m.shape for m in maps] == [(2, c, 96 // s, 64 // s) for c, s in zip(channels, strides)]


@pytest.mark.parametrize('trunk', TRUNKS)
def test_gradient_checkpointing_changes_nothing(trunk):
    model, x = stir(create(trunk)).eval(), images(2, 64, 64)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing(True)
    for result, grad in zip(torch.autograd.grad(model(x).square().sum(), list(model.parameters())), expected):
        torch.testing.assert_close(result, grad)


@pytest.mark.parametrize('trunk', TRUNKS)
def test_inference_form(trunk):
    model = create(trunk).double().eval()
    stir(model.vt_stage)
    model.eval()
    x = images(2, 64, 64, dtype=torch.float64)
    once = reparameterize_model(model)
    assert len(norms_of(once)) < len(norms_of(model)) or not norms_of(model)
    assert_equal(outputs(once, x), outputs(model, x))
    once.reparameterize()
    assert_equal(outputs(once, x), outputs(model, x))


@pytest.mark.parametrize('trunk', [t for t in TRUNKS if t != 'cs3darknet_s'])
def test_scripted(trunk):
    model, x = create(trunk).eval(), images(2, 64, 64)
    assert torch.equal(outputs(torch.jit.script(model), x), outputs(model, x))


@pytest.mark.parametrize('trunk', TRUNKS)
def test_groups_of_layers_follow_the_depth(trunk):
    model = create(trunk)
    for coarse in (True, False):
        groups = group_parameters(model, model.group_matcher(coarse))
        names = [name for group in groups.values() for name in group]
        assert sorted(names) == sorted(n for n, _ in model.named_parameters())
        firsts = [group[0].split('.')[0] for group in groups.values()]
        assert firsts == sorted(firsts, key=['trunk', 'vt_stage', 'fc'].index)
        assert len(groups) >= 4


@pytest.mark.parametrize(('trunk', 'first', 'later'), [
    ('rexnet_100', 'features_1', 'features_10'), ('inception_v4', 'features_1', 'features_10'),
    pytest.param('visformer_tiny', 'pos_embed1', 'stage1', marks=pytest.mark.skipif(
        not timm_is_at_least('1.0.31'), reason='older ones do not cut it'))])
def test_layers_whose_names_begin_alike_are_in_groups_of_their_own(trunk, first, later):
    model = create(trunk)
    groups = group_parameters(model, model.group_matcher())
    of_first, of_later = (
        {key for key, group in groups.items() for n in group if f'.{name}.' in f'{n}.'}
        for name in (first, later))
    assert of_first and of_later and max(of_first) < min(of_later)


def test_stride_of_a_dilated_trunk():
    model = create('test_resnet', trunk_args={'output_stride': 8}, features_only=True).eval()
    maps = model(images(1, 64, 64))
    assert [64 // m.shape[-1] for m in maps] == model.feature_info.reduction()
    assert model.feature_info.reduction()[-2:] == [8, 16]


@pytest.mark.parametrize(('trunk', 'words'), [
    ('no_such_model', "must be the name of a model of timm, got 'no_such_model'"),
    ('vit_tiny_patch16_224', 'must be a convolutional model with a feature map of stride 16'),
    ('mixer_s16_224', 'must be a convolutional model with a feature map of stride 16'),
    ('swin_tiny_patch4_window7_224', r'must be a model that timm cuts at a map \(B, C, H, W\)'),
    ('hrnet_w18_small', r'must be a model that timm cuts at a map \(B, C, H, W\)')])
def test_trunk_that_has_no_such_map(trunk, words):
    with pytest.raises(ValueError, match=f'^trunk {words}'):
        create(trunk)


@pytest.mark.parametrize(('argument', 'value'), [
    ('output_stride', 8), ('global_pool', 'token'), ('in_chans', 0), ('depth', 0), ('drop_path_rate', 1.5)])
def test_arguments(argument, value):
    with pytest.raises((ValueError, AssertionError)):
        create('test_resnet', **{argument: value})


def test_preprocessing_is_the_trunks():
    cfg, own = timm.get_pretrained_cfg('fastvit_t8'), create('fastvit_t8').pretrained_cfg
    for name in ('input_size', 'crop_pct', 'interpolation', 'mean', 'std'):
        assert own[name] == getattr(cfg, name)
    assert isinstance(create('fastvit_t8').get_submodule(own['first_conv'][0]), nn.Conv2d)


@pytest.mark.parametrize(('trunk', 'in_chans'), [
    (trunk, in_chans) for trunk in TRUNKS for in_chans in (1, 3)
    if (trunk, in_chans) != ('test_nfnet', 1)])  # whose convolutions are standardised over the channels
def test_trunk_of_timms_weights(trunk, in_chans, tmp_path):
    """What a `trunk_*` tag does, with a file: timm's whole model in, its trunk kept, the rest new."""
    torch.manual_seed(1)
    whole = timm.create_model(trunk, num_classes=7).eval()
    save_file(whole.state_dict(), tmp_path / 'whole.safetensors')
    model = timm.create_model(
        'vt_net', pretrained=True, trunk=trunk, pretrained_cfg_overlay={'file': str(tmp_path / 'whole.safetensors')},
        in_chans=in_chans, **{**SMALL, 'num_classes': 1000}).eval()
    torch.manual_seed(1)
    maps = timm.create_model(trunk, features_only=True).eval()
    weights = {n.replace('.', '_'): w for n, w in whole.state_dict().items()}
    maps.load_state_dict({
        k: weights[k.removeprefix('model.').replace('.', '_')] for k in maps.state_dict()})
    grey = images(1, 64, 64).mean(1, keepdim=True)
    with torch.no_grad():
        for result, expected in zip(model.trunk(grey.expand(-1, in_chans, -1, -1)), maps(grey.expand(-1, 3, -1, -1))):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', timm.list_models(module='vt_net'))
def test_named_models_cost_less_than_what_they_are_cut_from(name):
    model = timm.create_model(name, device='meta').eval()
    whole = timm.create_model(name.removeprefix('vt_') if name != 'vt_net' else 'resnet50d', device='meta').eval()
    assert count_weights(model) < count_weights(whole)
    assert count_multiply_adds(model) < count_multiply_adds(whole)


def test_written_and_loaded(tmp_path):
    model = stir(create('test_convnext', num_classes=2)).eval()
    write_model(tmp_path / 'model', model, ['a', 'b'], {})
    x = images(1, 64, 64)
    assert torch.equal(outputs(load_model(str(tmp_path / 'model')), x), outputs(model, x))


@pytest.mark.parametrize('name', timm.list_models(module='vt_net', pretrained=True, include_tags=True))
def test_config_of_a_trunk_tag_is_that_of_timms_weights(name):
    trunk, _, tag = name.removeprefix('vt_').partition('.trunk_')
    timms = timm.get_pretrained_cfg(f'{trunk}.{tag}')
    assert timm.get_pretrained_cfg(name).hf_hub_id == f'timm/{trunk}.{tag}'
    assert timm.get_pretrained_cfg(name).license == timms.license
    cfg = timm.create_model(name, pretrained=False, device='meta').pretrained_cfg
    for key in ('mean', 'std', 'interpolation', 'crop_pct', 'input_size'):
        assert cfg[key] == getattr(timms, key), key


@pytest.mark.parametrize('name', timm.list_models(module='vt_net'))
def test_bare_name_has_no_weights(name):
    with pytest.raises(RuntimeError, match=f'No pretrained weights exist for {name}'):
        timm.create_model(name, pretrained=True)


def finetune(few_digits, out, *arguments):
    """`vt-zoo finetune --model vt_net` for an epoch, with arguments of the model; the exit code."""
    return main([
        'finetune', str(few_digits), '--model', 'vt_net', '--model-kwargs', 'token_dim=32', *arguments, '--epochs', '1',
        '--img-size', '64', '--workers', '0', '--device', 'cpu', '--out', str(out)])


@pytest.fixture(scope='module')
def trained(few_digits, tmp_path_factory):
    """Folder of a model that `vt-zoo finetune` trained."""
    out = tmp_path_factory.mktemp('vt_net') / 'run'
    assert finetune(few_digits, out, 'trunk=test_efficientnet') == 0
    return out / 'model'


def test_trained_model_keeps_its_preprocessing(trained):
    cfg, trunks = load_model(str(trained)).pretrained_cfg, timm.get_pretrained_cfg('test_efficientnet')
    assert tuple(cfg['input_size']) == (3, 64, 64)
    assert (tuple(cfg['mean']), cfg['interpolation']) == (trunks.mean, trunks.interpolation)


@pytest.mark.parametrize('form', ['onnx', 'torchscript', 'pt2'])
def test_exported(trained, form):
    """`vt-zoo export` compares the file with PyTorch and refuses one that differs."""
    assert main(['export', str(trained), '--format', form, '--overwrite']) == 0


def test_tokens_and_predictions(trained, few_digits, tmp_path, capsys):
    picture = str(next((few_digits / 'val').rglob('*.png')))
    assert main(['predict', picture, '--model', str(trained), '--json']) == 0
    assert len(json.loads(capsys.readouterr().out)[0]['top']) == 3
    assert main(['tokens', picture, '--model', str(trained), '--out', str(tmp_path / 'tokens')]) == 0
    assert 'module 2' in capsys.readouterr().out


@pytest.mark.parametrize(('arguments', 'words'), [
    (['trunk=vit_tiny_patch16_224'], 'trunk must be a convolutional model with a feature map of stride 16'),
    (['trunk=regnety_002', 'trunk_pretrained=True'], "model 'vt_net.untrained' cannot be trained here"),
    (['trunk'], "'trunk' is not of the form KEY=VALUE"), (['4=5'], "'4=5' is not of the form KEY=VALUE")])
def test_trunk_that_finetune_cannot_have(arguments, words, few_digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    try:
        code = finetune(few_digits, tmp_path / 'run', *arguments)
    except SystemExit as e:
        code = e.code
    assert code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()
