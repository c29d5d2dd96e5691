"""The inference form that timm's `reparameterize_model` makes: norms folded into maps."""
import copy
from collections import Counter
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
from helpers import (
    COMBINED,
    SINGLE,
    TINY,
    TOLERANCE,
    assert_equal,
    build,
    calibrated,
    calibrated_segmenter,
    images,
    name,
    norms_of,
    outputs,
    small_segmenter,
    stir,
)
from safetensors.torch import load_file, save_file
from timm.layers import freeze_batch_norm_2d
from timm.utils import reparameterize_model
from torch.utils._python_dispatch import TorchDispatchMode

from vt_zoo.analysis.cost import count_multiply_adds
from vt_zoo.inference import fold_neck
from vt_zoo.inference.stage import GroupedTokenMap, fold_maps
from vt_zoo.layers.linear import GroupedTokenLinear, PixelLinear, TokenLinear

BATCH_STATISTICS = partial(nn.BatchNorm2d, track_running_stats=False)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('cls,options,kept', [
    (PixelLinear, {}, nn.Conv2d), (PixelLinear, {'norm_layer': partial(nn.BatchNorm2d, affine=False)}, nn.Conv2d),
    (TokenLinear, {}, nn.Linear), (GroupedTokenLinear, {'groups': 2}, GroupedTokenMap)])
def test_norm_folds_into_its_map(cls, options, kept, dtype):
    linear = build(cls, 6, 8, **options, dtype=dtype)
    x = torch.randn(2, 6, 3, 5) if cls is PixelLinear else torch.randn(2, 5, 6)
    model = fold_maps(copy.deepcopy(linear))
    assert type(model) is kept
    assert not norms_of(model)
    assert_equal(outputs(model, x.to(dtype)), outputs(linear, x.to(dtype)))


@pytest.mark.parametrize('cls', [PixelLinear, TokenLinear])
@pytest.mark.parametrize('norm_layer', ['groupnorm1', BATCH_STATISTICS], ids=['group norm', 'batch statistics'])
def test_other_norms_are_kept(cls, norm_layer):
    linear = build(cls, 6, 8, norm_layer=norm_layer)
    x = torch.randn(2, 6, 3, 5).double() if cls is PixelLinear else torch.randn(2, 5, 6).double()
    model = fold_maps(copy.deepcopy(linear))
    assert type(model) is cls and len(norms_of(model)) == 1
    assert torch.equal(outputs(model, x), outputs(linear, x))


@pytest.mark.parametrize('options,dtype', [
    pytest.param(o, dtype, marks=[] if dtype == torch.float64 or o in ({}, COMBINED[0]) else pytest.mark.slow)
    for o in [*SINGLE, *COMBINED, {'norm_layer': 'groupnorm1'}] for dtype in TOLERANCE],
    ids=lambda v: name(v) if isinstance(v, dict) else str(v))
def test_vt_resnet(options, dtype):
    model = calibrated(**options).to(dtype)
    once = reparameterize_model(model)
    twice = reparameterize_model(once)
    x = images(dtype=dtype)
    expected = outputs(model, x)
    for result, reference in (
        (outputs(once, x), expected),
        (outputs(once.forward_features, x), outputs(model.forward_features, x)),
        (outputs(once.forward_head, outputs(once.forward_features, x)), expected),
        *zip(outputs(once.forward_intermediates, x)[1], outputs(model.forward_intermediates, x)[1], strict=True),
    ):
        assert_equal(result, reference)
    assert torch.equal(outputs(twice, x), outputs(once, x))
    assert once.state_dict().keys() == twice.state_dict().keys()
    folds = 'norm_layer' not in options
    clusters = options.get('tokenizer') == 'clustering'  # whose logits have no weights that could take a norm
    assert len(norms_of(once)) == (len(norms_of(model)) if not folds else 1 if clusters else 0)
    assert count_multiply_adds(once, (3, 64, 64)) == count_multiply_adds(model, (3, 64, 64))
    assert torch.equal(outputs(model, x), expected), 'the model itself is left as it was'


class Kernels(TorchDispatchMode):
    """Counts the kernels that run, and those of them that write as many numbers as a map has; views are none."""

    def __init__(self, map_size):
        super().__init__()
        self.map_size = map_size
        self.counts, self.of_maps = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.overloadpacket not in (torch.ops.aten._unsafe_view, torch.ops.aten.as_strided_):
            self.counts[func.overloadpacket.__name__] += 1
            result = func(*args, **(kwargs or {}))
            self.of_maps[func.overloadpacket.__name__] += result.numel() >= self.map_size
            return result
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('name,maps', [('vt_resnet18', 2), ('vt_resnet50', 2)])
@pytest.mark.parametrize('batch', [1, 16])
def test_kernels_of_a_stage(name, maps, batch):
    """A guard of the speed that needs no clock: few kernels, and few feature maps are written (skips, projections)."""
    model = reparameterize_model(timm.create_model(name).eval(), inplace=True)
    chs = model.feature_info[3]['num_chs']
    x = torch.randn(batch, chs, 14, 14).to(memory_format=torch.channels_last)
    with Kernels(x.numel()) as kernels, torch.no_grad():
        tokens = model.vt_stage(x)[1]
    assert tokens.shape == (batch, 16, 1024)
    assert sum(kernels.counts.values()) <= 32 * len(model.vt_stage), kernels.counts
    assert kernels.of_maps.total() <= maps, kernels.of_maps


@pytest.mark.parametrize('kind', [
    'frozen', 'synchronised', 'features', 'other pooling', 'no classes', 'checkpointing', 'pruned'])
def test_other_forms_of_the_model(kind):
    model = calibrated(last_projector=True).double()
    if kind == 'frozen':
        model = freeze_batch_norm_2d(model)
    elif kind == 'synchronised':
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif kind == 'features':
        features = timm.create_model('test_vt_resnet', features_only=True, **TINY).double().eval()
        features.model.load_state_dict(model.state_dict(), strict=False)
        model = features
    elif kind == 'other pooling':
        model.reset_classifier(7, 'max')
        model.double()
    elif kind == 'no classes':
        model.reset_classifier(0)
    elif kind == 'pruned':
        model.prune_intermediate_layers([2])
    else:
        model.set_grad_checkpointing()
    once = reparameterize_model(model)
    x = images().double()
    expected, result = outputs(model, x), outputs(once, x)
    for a, b in zip(result, expected, strict=True) if kind == 'features' else [(result, expected)]:
        assert_equal(a, b)
    assert not norms_of(once) and not any('running_mean' in key for key in once.state_dict())


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float16, 0.02), (torch.bfloat16, 0.1)], ids=str)
@pytest.mark.parametrize('batch', [2, 40])
@pytest.mark.parametrize('scale', [1, 1e4])
def test_half_precision(dtype, tolerance, batch, scale):
    """As near to float64 as the model itself is asked to be, with logits beyond float16's range too."""
    model = calibrated().double()
    x = images(batch).double()
    with torch.no_grad():
        for module in model.vt_stage:
            module.tokenizer.logit_norm.weight *= scale
    expected = outputs(model, x)
    result = outputs(reparameterize_model(model).to(dtype), x.to(dtype))
    assert result.isfinite().all()
    if scale == 1:
        assert (result.double() - expected).norm() < tolerance * expected.norm()


def test_classifier_after_the_reduction():
    model = calibrated()
    once = reparameterize_model(model)
    for m in (model, once):
        torch.manual_seed(0)
        m.reset_classifier(3, 'max')
    assert_equal(outputs(once, images()), outputs(model, images()))


@pytest.mark.parametrize('options', [{}, {'num_heads': 4}], ids=name)
def test_state_of_the_reduced_form_is_saved_and_loaded(options, tmp_path):
    model = reparameterize_model(calibrated(**options))
    save_file(model.state_dict(), tmp_path / 'reduced.safetensors')
    other = calibrated(**options)
    nn.init.normal_(other.fc.weight)
    other = reparameterize_model(other)
    other.load_state_dict(load_file(tmp_path / 'reduced.safetensors'))
    assert torch.equal(outputs(other, images()), outputs(model, images()))


@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning', 'ignore:.*torch.jit:DeprecationWarning')
def test_reduced_form_is_scripted_compiled_and_exported():
    model = reparameterize_model(calibrated())
    expected = outputs(model, images())
    assert_equal(outputs(torch.jit.script(model), images()), expected)
    assert_equal(outputs(torch.fx.symbolic_trace(model), images()), expected)
    torch._dynamo.reset()
    assert_equal(outputs(torch.compile(model, backend='aot_eager', fullgraph=True), images()), expected)
    batch = torch.export.Dim('batch', min=2, max=64)
    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},)).module()
    assert_equal(outputs(exported, images()), expected)
    assert_equal(outputs(exported, images(7)), outputs(model, images(7)))


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('norm_layer', ['batchnorm2d', 'groupnorm1'])
def test_vt_fpn(dtype, norm_layer, tmp_path):
    pytest.importorskip('segmentation_models_pytorch')
    from vt_zoo.models.vt_fpn import VTFPN

    plain = norm_layer == 'batchnorm2d'
    model = (calibrated_segmenter() if plain else stir(small_segmenter(norm_layer=norm_layer))).to(dtype)
    projectors = model.decoder.neck.projectors
    assert not any((projector.value.norm.weight == 0).any() for projector in projectors)
    once = reparameterize_model(model)
    x = images(2, 33, 47, dtype=dtype)
    assert_equal(outputs(once, x), outputs(model, x))
    assert torch.equal(outputs(reparameterize_model(once), x), outputs(once, x))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in once.modules())

    save_file(once.state_dict(), tmp_path / 'reduced.safetensors')
    other = reparameterize_model(small_segmenter(VTFPN, norm_layer=norm_layer).eval()).to(dtype)
    other.load_state_dict(load_file(tmp_path / 'reduced.safetensors'))
    assert torch.equal(outputs(other, x), outputs(once, x))


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning', 'ignore:.*torch.jit:DeprecationWarning')
def test_reduced_vt_fpn_is_scripted_compiled_and_exported():
    pytest.importorskip('segmentation_models_pytorch')
    from vt_zoo.models.vt_fpn import VTFPN

    torch.manual_seed(0)
    model = stir(VTFPN('tu-resnet18', classes=5, pyramid_channels=32, token_dim=64, head_channels=32)).double()
    once = reparameterize_model(model)
    x = images(2, 64, 96, dtype=torch.float64)
    expected = outputs(model, x)
    assert_equal(outputs(once, x), expected)
    assert_equal(outputs(torch.jit.script(once), x), expected)
    torch._dynamo.reset()
    assert_equal(outputs(torch.compile(once, backend='aot_eager', fullgraph=True), x), expected)
    batch = torch.export.Dim('batch', min=2, max=64)
    exported = torch.export.export(once, (x,), dynamic_shapes=({0: batch},)).module()
    x = images(5, 64, 96, dtype=torch.float64)
    assert_equal(outputs(exported, x), outputs(model, x))


@pytest.mark.parametrize('encoder', ['repvgg_a0', 'mobileone_s0', 'fastvit_t8'])
def test_encoder_that_has_an_inference_form_of_its_own(encoder):
    pytest.importorskip('segmentation_models_pytorch')
    from vt_zoo.models.vt_fpn import VTFPN

    torch.manual_seed(0)
    model = VTFPN(
        f'tu-{encoder}', encoder_weights=None, classes=3, pyramid_channels=32, token_dim=64, head_channels=32)
    model = model.double().eval()
    x = images(2, 64, 64, dtype=torch.float64)
    expected = outputs(model, x)
    once = reparameterize_model(model)
    assert sum(p.numel() for p in once.parameters()) < sum(p.numel() for p in model.parameters())
    assert_equal(outputs(once, x), expected)
    once.reparameterize()
    assert_equal(outputs(once, x), expected)


def test_statistics_of_the_batch_in_the_neck():
    pytest.importorskip('segmentation_models_pytorch')
    from vt_zoo.models.vt_fpn import VTNeck

    torch.manual_seed(0)
    neck = stir(VTNeck((4, 6), 16, 3, 20, norm_layer=BATCH_STATISTICS))
    maps = [torch.randn(2, 4, 6, 8), torch.randn(2, 6, 3, 4)]
    once = fold_neck(neck)
    assert len(norms_of(once)) == len(norms_of(neck))
    for result, expected in zip(outputs(once, maps), outputs(copy.deepcopy(neck), maps), strict=True):
        assert torch.equal(result, expected)


def test_encoder_that_cannot_be_traced_keeps_its_norms():
    pytest.importorskip('segmentation_models_pytorch')

    class Sorted(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, x):
            return self.encoder(x if x.sum() > 0 else -x)

    model = calibrated_segmenter()
    norms = len([m for m in model.encoder.modules() if isinstance(m, nn.BatchNorm2d)])
    model.encoder = Sorted(model.encoder)
    once = reparameterize_model(model)
    assert len([m for m in once.modules() if isinstance(m, nn.BatchNorm2d)]) == norms > 0
    assert_equal(outputs(once, images()), outputs(model, images()))
