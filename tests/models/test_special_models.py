"""Models at the edge: trunks that torch.fx cannot trace, one token, maps of few rows, one module."""
import pytest
import timm
import torch
from helpers import norms_of
from timm.utils import reparameterize_model

from vt_zoo.export.formats import export
from vt_zoo.inference import fold
from vt_zoo.layers.kmeans import KMeans
from vt_zoo.weights.files import write_model

UNTRACED = [
    ({'avg_down': True, 'output_stride': 8}, 64, 0),
    ({'avg_down': True, 'output_stride': 8, 'stem_type': 'deep', 'replace_stem_pool': True}, 64, 0),
    ({'block_args': {'attn_layer': 'bat'}}, 112, 6),
    ({'block_args': {'attn_layer': 'halo'}}, 128, 0),
    ({'block_args': {'attn_layer': 'lambda'}}, 64, 6),
]


def trained(size=64, **options):
    torch.manual_seed(0)
    model = timm.create_model('test_vt_resnet', num_classes=3, **options).train()
    with torch.no_grad():
        model(torch.randn(4, 3, size, size))
    return model.eval()


@pytest.mark.parametrize('options,size,kept', UNTRACED)
@pytest.mark.parametrize('inplace', [False, True])
@torch.no_grad()
def test_what_cannot_be_traced_stays_and_the_rest_folds(options, size, kept, inplace):
    model = trained(size, **options)
    x = torch.randn(2, 3, size, size)
    expected = model(x)
    once = reparameterize_model(model, inplace=inplace)
    assert len(norms_of(once)) == kept
    assert (once(x) - expected).norm() < 1e-5 * expected.norm()


def test_nothing_is_converted_where_folding_fails(monkeypatch):
    model = trained()
    before = [(name, type(m)) for name, m in model.named_modules()]
    folded = iter(range(5))

    def fail(conv, scale, shift, scaled=fold.scaled):
        if next(folded, None) is None:
            raise MemoryError
        return scaled(conv, scale, shift)
    monkeypatch.setattr(fold, 'scaled', fail)
    with pytest.raises(MemoryError):
        reparameterize_model(model, inplace=True)
    assert [(name, type(m)) for name, m in model.named_modules()] == before


@pytest.mark.parametrize('file_format,suffix', [
    ('pt2', 'pt2'), pytest.param('onnx', 'onnx', marks=pytest.mark.slow)])
def test_such_a_trunk_is_exported(file_format, suffix, tmp_path):
    options, size, _ = UNTRACED[2]
    write_model(tmp_path / 'model', trained(size, **options), list('abc'), {'input_size': (3, size, size)})
    assert export(str(tmp_path / 'model'), file_format, tmp_path / f'model.{suffix}').difference < 1e-5


@pytest.mark.parametrize('num_tokens', [1, 2])
def test_equal_images_are_refused_in_training(num_tokens):
    model = timm.create_model('test_vt_resnet', num_classes=3, num_tokens=num_tokens)
    x = torch.randn(1, 3, 64, 64).repeat(4, 1, 1, 1)
    with pytest.raises(ValueError, match=f'num_tokens={num_tokens} cannot be trained on a batch of 4 equal images'):
        model.train()(x)
    assert model.eval()(x).isfinite().all()


@pytest.mark.parametrize('options', [
    {'num_tokens': 3}, {'num_tokens': 16}, {'num_tokens': 1, 'norm_layer': 'groupnorm1'}])
def test_equal_images_are_taken_where_the_tokens_differ_or_no_norm_asks_it(options):
    model = timm.create_model('test_vt_resnet', num_classes=3, **options).train()
    model(torch.randn(1, 3, 64, 64).repeat(4, 1, 1, 1)).logsumexp(1).sum().backward()
    assert all(p.grad.abs().max() < 1e3 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize('size', [(1, 32), (2, 32), (2, 2), (3, 8)])
@pytest.mark.parametrize('num_tokens', [9, 26, 36, 64])
@pytest.mark.parametrize('channels', [96, 1024])
def test_clusters_do_not_hang_on_rounding(channels, num_tokens, size):
    x = torch.randn(8, channels, *size, generator=torch.Generator().manual_seed(0))
    kmeans = KMeans(num_tokens)
    centroids = kmeans(x)
    assert (torch.cat([kmeans(image[None]) for image in x]) - centroids).abs().max() < 2e-6
    assert (kmeans(x.double()) - centroids).abs().max() < 2e-6
