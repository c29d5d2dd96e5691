"""VT-FPN and the panoptic FPN: against NumPy with float64, and as models of segmentation_models_pytorch."""
import copy
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import calibrated_segmenter as calibrated
from helpers import check_sync_batch_norms, run_in_precision, stir, sync_batch_norm_conversions
from helpers import small_segmenter as small
from reference import (
    array,
    assert_close,
    bilinear,
    mapped,
    pixels,
    projector_reference,
    tokenizer_reference,
    transformer_reference,
)

pytest.importorskip('segmentation_models_pytorch')

import timm.layers
import torch
import torch.nn as nn
from hub_server import hub_server
from paper_order import in_paper_order
from safetensors.torch import load_file, save_file

from vt_zoo.analysis.cost import count_multiply_adds
from vt_zoo.layers import FilterTokenizer, Projector, TokenTransformer
from vt_zoo.models.vt_fpn import VTFPN, FPNNeck, PanopticFPN, VTNeck

MODELS = [VTFPN, PanopticFPN]
NECKS = [VTNeck, FPNNeck]
CHS = (6, 5, 8, 7)
SIZES = [(9, 12), (5, 6), (3, 3), (2, 2)]  # of the maps of an image of 33x47


def images(batch=2, height=64, width=96, in_channels=3, seed=0):
    return torch.randn(batch, in_channels, height, width, generator=torch.Generator().manual_seed(seed))


def maps(batch=2, chs=CHS, sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, *size, dtype=torch.float64, generator=generator) for c, size in zip(chs, sizes)]


def small_neck(cls, chs=CHS):
    torch.manual_seed(0)
    neck = VTNeck(chs, 32, num_tokens=3, token_dim=20) if cls is VTNeck else FPNNeck(chs, 32)
    return stir(neck.double())


def close(result, expected, tol=1e-4):
    torch.testing.assert_close(result, expected, rtol=tol, atol=tol)


def relative_error(result, expected):
    """Of each image, the largest of a batch."""
    difference = (result.double() - expected).flatten(1).norm(dim=1) / expected.double().flatten(1).norm(dim=1)
    return difference.max().item()


# --- references: maps are (C, H, W), levels go from fine to coarse


def conv_reference(conv, x):
    weight = array(conv.weight)
    pad = weight.shape[2] // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    height, width = x.shape[1:]
    out = np.zeros((len(weight), height, width))
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            out += np.tensordot(weight[:, :, i, j], padded[:, i:i + height, j:j + width], axes=1)
    return out if conv.bias is None else out + array(conv.bias)[:, None, None]


def nearest(x, height, width):
    rows = [i * x.shape[1] // height for i in range(height)]
    columns = [j * x.shape[2] // width for j in range(width)]
    return x[:, rows][:, :, columns]


def resized(x, size):
    return np.stack([bilinear(plane, *size) for plane in x])


def fpn_neck_reference(neck, features):
    laterals = [conv_reference(conv, x) for conv, x in zip(neck.laterals, features)]
    merged = laterals[-1:]
    for x in laterals[-2::-1]:
        merged.insert(0, x + nearest(merged[0], *x.shape[1:]))
    return [conv_reference(conv, x) for conv, x in zip(neck.outputs, merged)]


def vt_neck_reference(neck, features):
    """Equation (1) at each level, (3) and (4) over the tokens of all levels, (5) at each level."""
    laterals = [conv_reference(conv, x) for conv, x in zip(neck.laterals, features)]
    tokens = np.concatenate([
        mapped(embed, tokenizer_reference(tokenizer, 'filter', x))
        for embed, tokenizer, x in zip(neck.embeds, neck.tokenizers, laterals)])
    tokens = np.split(transformer_reference(neck.transformer, tokens), len(laterals))
    return [
        projector_reference(projector, pixels(x), t).T.reshape(x.shape)
        for projector, x, t in zip(neck.projectors, laterals, tokens)]


def head_reference(decoder, levels):
    out = 0
    for level, (x, blocks) in enumerate(zip(levels, decoder.heads)):
        for i, (conv, norm, _) in enumerate(blocks):
            x = conv_reference(conv, x)
            groups = x.reshape(32, -1)
            groups = (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + norm.eps)
            x = groups.reshape(x.shape) * array(norm.weight)[:, None, None] + array(norm.bias)[:, None, None]
            x = np.maximum(x, 0)
            if level > 0:
                x = resized(x, levels[level - 1 - i].shape[1:])
        out = out + x
    return out


NECK_REFERENCES = {VTNeck: vt_neck_reference, FPNNeck: fpn_neck_reference}


@pytest.mark.parametrize('cls', NECKS)
@pytest.mark.parametrize('sizes', [SIZES, [(8, 16), (4, 8), (2, 4), (1, 2)], [(7, 5), (7, 5), (4, 3), (1, 1)]], ids=str)
def test_neck_is_its_equations(cls, sizes):
    neck, features = small_neck(cls), maps(sizes=sizes)
    levels = neck(features)
    references = [NECK_REFERENCES[cls](neck, [array(f[b]) for f in features]) for b in range(2)]
    for i, (level, size) in enumerate(zip(levels, sizes, strict=True)):
        assert level.shape == (2, 32, *size)
        assert_close(level, np.stack([pixels(r[i]) for r in references]))


@pytest.mark.parametrize('cls', MODELS)
@pytest.mark.parametrize('size', [(33, 47), (64, 40)], ids=str)
def test_model_is_its_equations(cls, size):
    model = stir(small(cls).double())
    x = images(2, *size).double()
    with torch.no_grad():
        result, features = model(x), model.encoder(x)[-4:]
    for b in range(2):
        levels = NECK_REFERENCES[type(model.decoder.neck)](model.decoder.neck, [array(f[b]) for f in features])
        expected = conv_reference(model.segmentation_head[0], head_reference(model.decoder, levels))
        np.testing.assert_allclose(array(result[b]), resized(expected, size), rtol=1e-9, atol=1e-9)


def test_necks_begin_as_their_laterals():
    torch.manual_seed(0)
    neck, features = VTNeck(CHS, 32, 3, 20).double().train(), maps()
    for level, lateral, x in zip(neck(features), neck.laterals, features, strict=True):
        assert torch.equal(level, lateral(x))


# --- arguments


@pytest.mark.parametrize('cls', MODELS)
@pytest.mark.parametrize('size', [(33, 47), (64, 64), (100, 65), (473, 473)], ids=str)
def test_logits_have_the_size_of_the_image(cls, size):
    with torch.no_grad():
        logits = calibrated(cls)(images(1, *size))
    assert logits.shape == (1, 5, *size)
    assert logits.isfinite().all()


@pytest.mark.parametrize('encoder', [
    'tu-test_resnet', 'tu-test_vt_resnet', 'tu-test_convnext', 'tu-test_efficientnet', 'tu-vgg11', 'resnet18',
    'mit_b0'])
def test_encoders(encoder):
    model = small(encoder_name=encoder).eval()
    with torch.no_grad():
        assert model(images(1, 66, 47)).shape == (1, 5, 66, 47)
        levels = model.decoder.neck(model.encoder(images(1, 64, 96))[-4:])
    assert [level.shape[1:] for level in levels] == [(32, 64 // s, 96 // s) for s in (4, 8, 16, 32)]


def test_encoders_take_their_arguments():
    model = small(encoder_name='tu-test_vt_resnet', tokenizer='pooling', output_stride=16).eval()
    assert type(model.encoder.model.model.vt_stage[0].tokenizer).__name__ == 'PoolingTokenizer'
    with torch.no_grad():
        assert [f.shape[-1] for f in model.encoder(images(1, 64, 64))[-4:]] == [16, 8, 4, 4]
        assert model(images(1, 64, 64)).shape == (1, 5, 64, 64)


def test_widths():
    model = small(num_tokens=3, token_dim=20, pyramid_channels=48, head_channels=64).eval()
    seen = {}
    model.decoder.neck.transformer.register_forward_hook(lambda m, args, out: seen.update(tokens=out))
    model.decoder.register_forward_hook(lambda m, args, out: seen.update(decoded=out))
    model(images(2, 64, 96))
    assert seen['tokens'].shape == (2, 12, 20)
    assert seen['decoded'].shape == (2, 64, 16, 24)
    assert [lateral.out_channels for lateral in model.decoder.neck.laterals] == [48] * 4


def test_norm_layer_is_the_necks():
    model = small(norm_layer='layernorm2d')
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.decoder.modules())
    assert any(isinstance(m, timm.layers.LayerNorm2d) for m in model.decoder.neck.modules())
    assert model.eval()(images()).isfinite().all()


BAD = [
    ('in_channels', 0), ('in_channels', 2.5), ('classes', 0), ('classes', -1), ('classes', True),
    ('pyramid_channels', 0), ('pyramid_channels', '256'), ('head_channels', 0), ('head_channels', 48),
    ('encoder_depth', 4), ('activation', 'sigmiod')]
BAD_OF_TOKENS = [
    ('num_tokens', 0), ('num_tokens', 1.5), ('token_dim', 0), ('token_dim', None), ('norm_layer', 'batchnrom'),
    ('norm_layer', None), ('norm_layer', nn.BatchNorm2d)]


@pytest.mark.parametrize('cls,name,value', [
    *((cls, *bad) for cls in MODELS for bad in BAD), *((VTFPN, *bad) for bad in BAD_OF_TOKENS)])
def test_bad_arguments(cls, name, value):
    with pytest.raises(ValueError) as error:
        small(cls, **{name: value})
    message = str(error.value)
    assert '\n' not in message and name in message.lower() and str(value) in message


# --- costs, on the meta device


def on_meta(cls, encoder, **kwargs):
    with torch.device('meta'):
        return cls(encoder, **kwargs).eval()


def stride_first(model):
    """Move the stride of the encoder's bottlenecks to their first convolution, where Detectron2's ResNets have it."""
    for block in model.encoder.modules():
        if isinstance(block, timm.models.resnet.Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    return model


@pytest.mark.parametrize('cls,encoder,size,classes,printed,timms', [
    (PanopticFPN, 'resnet50', (800, 1216), 54, 159, 163.62), (VTFPN, 'resnet50', (800, 1216), 54, 113, 117.11),
    (PanopticFPN, 'resnet101', (800, 1216), 54, 231, 235.59), (VTFPN, 'resnet101', (800, 1216), 54, 185, 189.08),
    (PanopticFPN, 'resnet101', (473, 473), 20, 54.4, 55.435), (VTFPN, 'resnet101', (473, 473), 20, 43.6, 44.655)])
def test_costs_of_models_are_tables_9_and_10(cls, encoder, size, classes, printed, timms):
    model = in_paper_order(on_meta(cls, f'tu-{encoder}', classes=classes))
    assert count_multiply_adds(model, (3, *size)) == pytest.approx(timms * 1e9, rel=1e-4)
    assert count_multiply_adds(stride_first(model), (3, *size)) == pytest.approx(printed * 1e9, rel=0.005)


# --- numerics


@pytest.mark.parametrize('cls', MODELS)
def test_an_image_does_not_depend_on_its_batch(cls):
    model = calibrated(cls).double()
    x = images(3).double()
    with torch.no_grad():
        expected, alone = model(x), model(x[:1])
        others = model(torch.cat([x[:1], x[1:] * 20 + 5]))
    close(alone, expected[:1], tol=1e-9)
    close(others[:1], expected[:1], tol=1e-9)
    assert (others[1:] - expected[1:]).abs().max() > 0.1


@pytest.mark.parametrize('cls', MODELS)
@pytest.mark.parametrize('precision', ['float16', 'bfloat16', 'autocast'])
@pytest.mark.parametrize('scale', [1, 10])
def test_low_precision(cls, precision, scale):
    model = calibrated(cls)
    x = images(2) * scale
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        result = run_in_precision(model, x, precision)
    assert result.isfinite().all()
    # logits grow with the activations, so that sharp softmaxes magnify the rounding of inputs and weights
    tolerance = (0.02, 0.15) if precision == 'float16' else (0.12, 0.3)
    assert relative_error(result, expected) < tolerance[scale > 1]


def scenes(chs, number=6):
    """Maps of 60,800 pixels: an object of 150 equal ones on a ground of equal ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(number, chs, 1, 1, dtype=torch.float64, generator=generator).repeat(1, 1, 200, 304)
    x[:, :, 100:110, 100:115] = torch.randn(number, chs, 1, 1, dtype=torch.float64, generator=generator)
    return x


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('seed', range(3))
def test_tokens_of_60800_pixels_in_half_precision(dtype, seed):
    # where an object takes most of the attention, the shares of the ground are so small that float16 would round them
    # all to the same wrong number (bfloat16 has the range of float32)
    torch.manual_seed(seed)
    tokenizer = stir(FilterTokenizer(16, 8, 8, value_map=False, dtype=torch.float64), seed)
    x = scenes(16)
    half = copy.deepcopy(tokenizer).to(dtype)
    with torch.no_grad():
        expected = tokenizer(x)
        of_rounded = copy.deepcopy(half).double()(x.to(dtype).double())
        result = half(x.to(dtype))
    assert result.dtype == dtype
    assert relative_error(result, expected) < 2.5 * relative_error(of_rounded, expected)


def test_logits_beyond_the_range_of_float16():
    x, tokens = torch.full((1, 4, 20, 30), 100).half(), torch.full((1, 3, 8), 1000).half()
    x[:, :, 0, 0] *= -1
    tokens[:, 0] *= -1
    tokenizer = stir(FilterTokenizer(4, 8, 2, value_map=False)).half()
    nn.init.constant_(tokenizer.filters.weight, 300)
    transformer, projector = stir(TokenTransformer(8)).half(), stir(Projector(4, 4, 8)).half()
    for linear in (transformer.key, transformer.query, projector.key, projector.query):
        nn.init.constant_(linear.conv.weight, 10)
    with torch.no_grad():
        logits = [
            tokenizer.filters(x), transformer.key(tokens) @ transformer.query(tokens).mT,
            projector.query(projector.key(tokens)) @ x.flatten(2)]
        results = [tokenizer(x), transformer(tokens), projector(x, tokens)]
    assert not any(x.isfinite().all() for x in logits)
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize('cls', MODELS)
@pytest.mark.parametrize('encoder', ['tu-test_resnet', 'tu-test_vt_resnet'])
def test_every_parameter_gets_a_gradient(cls, encoder):
    # in eval mode: norms in training subtract what a bias before them adds
    model = stir(small(cls, encoder_name=encoder)).double()
    model(images().double()).square().sum().backward()
    # these shift logits by what is constant along their softmax
    cancelling = ('logit_norm.bias', 'transformer.query.norm.bias', 'key.norm.bias')
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert name.endswith(cancelling) or p.grad.any(), name


def test_channels_last():
    for cls in MODELS:
        model = calibrated(cls)
        with torch.no_grad():
            expected = model(images())
            model = model.to(memory_format=torch.channels_last)
            result = model(images().contiguous(memory_format=torch.channels_last))
        close(result, expected)


@sync_batch_norm_conversions
def test_sync_batch_norm_conversion_keeps_outputs(convert):
    check_sync_batch_norms(calibrated(), convert, 'decoder.neck.tokenizers.0.logit_norm', images())


# --- compilers


@pytest.mark.parametrize('cls', [VTFPN, pytest.param(PanopticFPN, marks=pytest.mark.slow)])
def test_torch_compile(cls):
    torch._dynamo.reset()
    model = calibrated(cls)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        close(compiled(images(1, 33, 47)), model(images(1, 33, 47)))


def test_torch_compile_training():
    torch._dynamo.reset()
    model = calibrated()
    decoder, features = model.decoder.train(), [f.detach() for f in model.encoder(images())]
    reference = copy.deepcopy(decoder)
    torch.compile(decoder, backend='aot_eager', fullgraph=True)(features).square().mean().backward()
    reference(features).square().mean().backward()
    for (name, p), expected in zip(decoder.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad - expected.grad).norm() < 1e-3 * expected.grad.norm() + 1e-4, name


# --- saving and loading


@pytest.mark.parametrize('cls', MODELS)
def test_saved_model_loads(cls, tmp_path):
    options = {'encoder_name': 'tu-test_vt_resnet', 'num_heads': 2, 'in_channels': 1, 'classes': 3}
    model = calibrated(cls, **options)
    model.save_pretrained(tmp_path)
    assert {'config.json', 'model.safetensors'} <= {path.name for path in tmp_path.iterdir()}
    config = json.loads((tmp_path / 'config.json').read_text())
    assert {name: config[name] for name in options} == options
    loaded = cls.from_pretrained(tmp_path)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(images(in_channels=1)), model(images(in_channels=1)))
    loaded.save_pretrained(tmp_path / 'again')
    again = json.loads((tmp_path / 'again' / 'config.json').read_text())
    assert {name: again[name] for name in options} == options


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Folder of a saved model. Not to be changed."""
    folder = tmp_path_factory.mktemp('saved')
    calibrated().save_pretrained(folder)
    return folder


@pytest.fixture
def my_saved(saved, tmp_path):
    """A copy of saved to change."""
    return Path(shutil.copytree(saved, tmp_path / 'model'))


@pytest.mark.filterwarnings('ignore:(?s).*Mismatched keys')
@pytest.mark.parametrize('change', ['missing', 'unexpected', 'of another shape'])
def test_weights_that_are_not_the_models_are_refused(my_saved, change):
    weights = load_file(my_saved / 'model.safetensors')
    name = 'decoder.neck.laterals.0.bias'
    if change == 'missing':
        del weights[name]
    elif change == 'unexpected':
        name = 'other'
        weights[name] = torch.zeros(1)
    else:
        weights[name] = weights[name][:1].clone()
    save_file(weights, my_saved / 'model.safetensors')
    with pytest.raises(RuntimeError, match=name):
        VTFPN.from_pretrained(my_saved)


@pytest.mark.filterwarnings('ignore:(?s).*Mismatched keys')
def test_arguments_replace_saved_ones(saved):
    assert VTFPN.from_pretrained(saved, activation='sigmoid')(images()).max() <= 1
    with pytest.raises(RuntimeError, match=r'segmentation_head\.0\.weight'):
        VTFPN.from_pretrained(saved, classes=7)


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def pickle_weights(folder, trap):
    """Replace the weights in a folder by a pickle, named as other libraries do."""
    (folder / 'model.safetensors').unlink()
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps(Trap(trap)))


def test_pickle_in_a_folder_is_not_read(my_saved, tmp_path):
    pickle_weights(my_saved, tmp_path / 'unpickled')
    with pytest.raises(FileNotFoundError, match=r'model\.safetensors'):
        VTFPN.from_pretrained(my_saved)
    assert not (tmp_path / 'unpickled').exists()


def test_loading_from_the_hub_asks_for_nothing_but_the_model(saved, hub_client, tmp_path):
    """Whatever it says of the encoder's weights; what is no safetensors is refused."""
    hub = tmp_path / 'hub'
    for name, weights in (('true', True), ('name', 'imagenet'), ('pickle', None)):
        model = shutil.copytree(saved, hub / 'me' / name)
        config = json.loads((model / 'config.json').read_text())
        (model / 'config.json').write_text(json.dumps({**config, 'encoder_weights': weights}))
    pickle_weights(hub / 'me' / 'pickle', tmp_path / 'unpickled')
    with hub_server(hub) as server, torch.no_grad():
        hub_client(server.url)
        for name in ('true', 'name'):
            assert torch.equal(VTFPN.from_pretrained(f'me/{name}')(images()), calibrated()(images()))
        assert {path for _, path in server.requests if '/resolve/' in path} == {
            f'/me/{name}/resolve/main/{file}' for name in ('true', 'name')
            for file in ('config.json', 'model.safetensors')}
        with pytest.raises(ValueError, match=r'must be safetensors, the repository holds pytorch_model\.bin'):
            VTFPN.from_pretrained('me/pickle')
    assert not (tmp_path / 'unpickled').exists()
