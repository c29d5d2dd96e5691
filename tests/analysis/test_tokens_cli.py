"""`vt-zoo tokens` and `vt-zoo locality`: the files that they write, the numbers in them, and what is refused."""
import json
import os

import numpy as np
import pytest
import timm
import torch
from helpers import check_refused
from PIL import Image
from timm.data import create_transform, resolve_data_config

from vt_zoo.analysis.metrics import attention_correlation, effective_rank, token_cosine
from vt_zoo.analysis.records import capture_tokens
from vt_zoo.data.images import load_image
from vt_zoo.models.vt_fpn import VTFPN
from vt_zoo.weights.files import write_model, write_segmenter


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    for name, size in (('wide', (90, 60)), ('square', (64, 64))):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f'{name}.png')
    (folder / 'broken.png').write_bytes(b'no image')
    return folder


@pytest.fixture(scope='module')
def segmenter(tmp_path_factory):
    folder = tmp_path_factory.mktemp('segmenter') / 'model'
    torch.manual_seed(0)
    model = VTFPN('tu-test_resnet', classes=2, num_tokens=4, token_dim=16, pyramid_channels=32, head_channels=32)
    write_segmenter(folder, model.eval(), ['a', 'b'], (0.5,) * 3, (0.25,) * 3)
    return folder


def literal_entropy(attention):
    return [-(m * np.log(m)).sum() for m in attention.double().numpy()]


def test_tokens(command, pictures, tmp_path):
    out = tmp_path / 'out'
    result = command(
        'tokens', pictures / 'wide.png', pictures / 'square.png', pictures / 'broken.png', '--model', 'test_vt_resnet',
        '--out', out)
    assert result.code == 0, result.stderr
    assert 'broken.png cannot be read' in result.stderr and 'left out' in result.stderr
    assert sorted(os.listdir(out)) == ['square_tokens.png', 'tokens.json', 'tokens.png', 'wide_tokens.png']
    assert all(Image.open(path).width > 500 for path in out.glob('*.png'))
    written = json.loads((out / 'tokens.json').read_text())
    assert [entry['image'] for entry in written['images']] == [str(pictures / f'{n}.png') for n in ('wide', 'square')]

    model = timm.create_model('test_vt_resnet', pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    for entry in written['images']:
        records = capture_tokens(model, transform(load_image(entry['image']))[None])
        assert len(records) == len(entry['modules'])
        for record, numbers in zip(records, entry['modules']):
            assert (numbers['height'], numbers['width']) == record.attention.shape[-2:]
            np.testing.assert_allclose(numbers['entropy'], literal_entropy(record.attention[0]), rtol=1e-3, atol=1e-5)
            assert all(0 <= v <= 1 for v in (*numbers['entropy_normalized'], *numbers['spread']))
            assert numbers['rank'] == pytest.approx(effective_rank(record.tokens).item(), rel=1e-3)
            assert numbers['cosine'] == pytest.approx(token_cosine(record.tokens).item(), abs=1e-3)
            assert numbers['correlation'] == pytest.approx(attention_correlation(record.attention).item(), abs=1e-3)
    for i in range(2):
        mean = np.mean([entry['modules'][i]['rank'] for entry in written['images']])
        assert f'effective rank {mean:.1f} of at most 15' in result.stdout.splitlines()[2 + i]
    for similarity in written['similarity']:
        similarity = np.array(similarity)
        assert similarity.shape == (16, 16)
        np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-3)
        np.testing.assert_allclose(similarity, similarity.T, atol=1e-3)


def test_dynamic_tokens(command, pictures, tmp_path):
    """The second module attends to pixels with half of its tokens; its relation is of all of them."""
    model = timm.create_model('test_vt_resnet', dynamic_tokens=True, num_classes=2)
    write_model(tmp_path / 'model', model, ['a', 'b'], {'input_size': (3, 64, 64)})
    result = command(
        'tokens', pictures / 'square.png', '--model', tmp_path / 'model', '--module', 2, '--out', tmp_path / 'out')
    assert result.code == 0, result.stderr
    assert result.stdout.count('of at most 15') == 2


@pytest.mark.parametrize(('options', 'attentions', 'left_out'), [
    ({'tokenizer': 'pooling'}, 0, ['no module of model']), ({'projector': False}, 1, []),
    ({'token_mixer': 'none'}, 2, [])])
def test_modules_without_an_attention(command, pictures, tmp_path, options, attentions, left_out):
    """What needs none is measured and printed nevertheless."""
    model = timm.create_model('test_vt_resnet', num_classes=2, **options)
    write_model(tmp_path / 'model', model, ['a', 'b'], {'input_size': (3, 64, 64)})
    result = command('tokens', pictures / 'square.png', '--model', tmp_path / 'model', '--out', tmp_path / 'out')
    assert result.code == 0, result.stderr
    assert all(words in result.stderr for words in left_out)
    assert result.stdout.count('cosine of two tokens') == result.stdout.count('effective rank') == 2
    assert result.stdout.count('correlates') == attentions
    modules = json.loads((tmp_path / 'out' / 'tokens.json').read_text())['images'][0]['modules']
    assert [m['tokens'] for m in modules] == [16, 16]
    assert ['entropy' in m for m in modules] == [i < attentions for i in range(2)]
    assert (tmp_path / 'out' / 'tokens.png').exists() == bool(attentions)


def test_tokens_that_are_not_finite(command, pictures, tmp_path):
    model = timm.create_model('test_vt_resnet', num_classes=2)
    torch.nn.init.constant_(model.vt_stage[0].embed.conv.weight if hasattr(model.vt_stage[0].embed, 'conv')
                            else model.vt_stage[0].embed.norm.weight, float('nan'))
    write_model(tmp_path / 'model', model, ['a', 'b'], {'input_size': (3, 64, 64)})
    result = command('tokens', pictures / 'square.png', '--model', tmp_path / 'model', '--out', tmp_path / 'out')
    assert result.code == 0, result.stderr
    modules = json.loads((tmp_path / 'out' / 'tokens.json').read_text())['images'][0]['modules']
    assert modules[0]['rank'] is None


def test_images_of_the_same_name(command, pictures, tmp_path):
    for folder in ('a', 'b/c'):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / '0.png').write_bytes((pictures / 'square.png').read_bytes())
    (tmp_path / 'b' / '1.png').write_bytes((pictures / 'square.png').read_bytes())
    result = command(
        'tokens', tmp_path / 'a', tmp_path / 'b', '--model', 'test_vt_resnet', '--out', tmp_path / 'out')
    assert result.code == 0, result.stderr
    assert sorted(os.listdir(tmp_path / 'out')) == [
        '1_tokens.png', 'a_0.png_tokens.png', 'b_c_0.png_tokens.png', 'tokens.json', 'tokens.png']


@pytest.mark.parametrize('module', [1, 4])
def test_tokens_of_a_segmenter(command, pictures, segmenter, tmp_path, module):
    """Images are seen at their own size; the module is the level."""
    result = command(
        'tokens', pictures / 'wide.png', '--model', segmenter, '--out', tmp_path / 'out', '--module', module,
        '--format', 'svg')
    assert result.code == 0, result.stderr
    assert sorted(os.listdir(tmp_path / 'out')) == ['tokens.json', 'tokens.svg', 'wide_tokens.svg']
    modules = json.loads((tmp_path / 'out' / 'tokens.json').read_text())['images'][0]['modules']
    assert [(m['height'], m['width']) for m in modules] == [(15, 23), (8, 12), (4, 6), (2, 3)]


def test_images_that_the_model_does_not_take(command, pictures, tmp_path):
    torch.manual_seed(0)
    vt_fpn = VTFPN('tu-test_convnext', classes=2, num_tokens=4, token_dim=16, pyramid_channels=32, head_channels=32)
    write_segmenter(tmp_path / 'model', vt_fpn.eval(), ['a', 'b'], (0.5,) * 3, (0.25,) * 3)
    Image.new('RGB', (3, 3)).save(tmp_path / 'tiny.png')
    tiny, model = tmp_path / 'tiny.png', tmp_path / 'model'
    result = command('tokens', tiny, pictures / 'square.png', '--model', model, '--out', tmp_path / 'out')
    assert result.code == 0, result.stderr
    assert 'tiny.png is left out: the model does not take images of 3x3 pixels' in result.stderr
    written = json.loads((tmp_path / 'out' / 'tokens.json').read_text())
    assert [entry['image'] for entry in written['images']] == [str(pictures / 'square.png')]
    result = command('tokens', tiny, '--model', model, '--out', tmp_path / 'other')
    check_refused(result, 'no image can be looked at', '3x3')
    assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize(('words', 'expected'), [
    (['wide.png', '--model', 'resnet18.a1_in1k.no'], 'resnet18'),
    (['wide.png', '--model', 'resnet'], 'has no tokens to look at'),
    (['wide.png', '--model', 'test_vt_resnet', '--module', '3'], 'module must be 1 or 2, got 3'),
    (['broken.png', '--model', 'test_vt_resnet'], 'there is no image that can be read'),
    (['empty', '--model', 'test_vt_resnet'], 'holds no images'),
    (['wide.png', 'wide.png', '--model', 'test_vt_resnet'], 'wide.png twice'),
    (['wide.png', '--model', 'test_vt_resnet', '--out', 'file'], 'out file is a file, a folder is needed'),
])
def test_tokens_refused(command, pictures, tmp_path, words, expected):
    timm.models.save_for_hf(timm.create_model('test_resnet'), tmp_path / 'resnet', safe_serialization=True)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').touch()
    words = [pictures / word if word.endswith('.png') else word for word in words]
    result = command('tokens', '--out', tmp_path / 'out', *words, cwd=tmp_path)
    check_refused(result)
    assert expected in result.stderr
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(('words', 'expected'), [
    (['--model', 'resnet18', '--random'], 'has no locality ratio'),
    (['--model', 'no_such_model', '--random'], "'no_such_model'"),
    (['--model', 'test_vit.no_such_tag', '--random'], 'no_such_tag'),
    (['--model', 'test_vit', '--random', '--out', 'figure.gif'], 'out must end in .png or .svg, got figure.gif'),
    (['--model', '.', '--random'], 'model must be a name with --random, got the folder .'),
])
def test_locality_refused(command, tmp_path, words, expected):
    check_refused(command('locality', '--out', tmp_path / 'figure.png', *words), expected)
    assert not list(tmp_path.iterdir())


def test_locality_does_not_take_the_place_of_a_folder(command, tmp_path):
    (tmp_path / 'figure.png').mkdir()
    words = ['locality', '--model', 'test_vit', '--random', '--out', tmp_path / 'figure.png']
    check_refused(command(*words), 'out must be a file, got the folder')


def test_locality(command, pictures, tmp_path):
    words = ['locality', '--model', 'test_vit', '--random', '--out', tmp_path / 'figure.svg']
    result = command(*words, pictures / 'wide.png')
    assert result.code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert 'random weights, 1 images' in lines[0]
    layers = [line.split() for line in lines[2:8]]
    assert [layer[0] for layer in layers] == list('123456')
    assert all(float(low) <= float(mean) <= float(high) for _, mean, low, _, high in layers)
    assert 'uniform attention has 0.0784' in result.stdout  # 10x10 patches
    assert '<svg' in (tmp_path / 'figure.svg').read_text()
    assert command(*words, pictures / 'wide.png').stdout == result.stdout
    assert 'one image of noise' in command(*words).stdout
