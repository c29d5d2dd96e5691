"""The registered VT-ResNets as timm models."""
import copy
import math
from functools import partial

import pytest
import timm
import timm.layers
import timm.optim
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import (
    calibrate,
    check_sync_batch_norms,
    exports_max_pooling_of_any_size,
    needs_timm_that_reads_folders,
    run_in_precision,
    sync_batch_norm_conversions,
)
from paper_order import in_paper_order
from timm.layers import BlurPool2d, DropPath, FrozenBatchNormAct2d
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch.utils.flop_counter import FlopCounterMode

import vt_zoo  # noqa: F401
from vt_zoo.layers.tokenizer import LearnedFilters

WEIGHTS = {'vt_resnet18': 11.638e6, 'vt_resnet34': 21.837e6, 'vt_resnet50': 22.07e6, 'vt_resnet101': 41.01e6}
MACS = {'vt_resnet18': 1578.9e6, 'vt_resnet34': 3299.0e6, 'vt_resnet50': 3595e6, 'vt_resnet101': 7307e6}
SIZES = [(64, 64), (32, 32), (33, 47), (65, 100)]
REDUCTIONS = {32: [2, 4, 8, 16, 32], 16: [2, 4, 8, 16, 16], 8: [2, 4, 8, 8, 8]}
BLOCKS = {'test_vt_resnet': 3, 'vt_resnet18': 6, 'vt_resnet50': 13}  # in the trunk


def create(name='test_vt_resnet', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def calibrated(**kwargs):
    """A test model of which each branch matters, in eval mode."""
    return calibrate(create(**kwargs))


def images(batch=2, height=64, width=64, in_chans=3, seed=0):
    return torch.randn(batch, in_chans, height, width, generator=torch.Generator().manual_seed(seed))


def pool(maps):
    return F.max_pool2d(maps, 3, stride=2, padding=1)


def assert_close(result, expected, tol=1e-4):
    torch.testing.assert_close(result, expected, rtol=tol, atol=tol)


# --- size and trunk


def trunk_state_dict(resnet):
    state_dict = resnet.state_dict()
    for key in [k for k in state_dict if k.startswith(('layer4.', 'fc.'))]:
        del state_dict[key]
    return state_dict


def macs(model, size=224):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, size, size, device='meta'))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize('name', WEIGHTS)
def test_counts_are_the_papers_rule(name):
    model = create(name, device='meta')
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    learned = sum(m.weight.numel() for m in model.modules() if isinstance(m, LearnedFilters))  # not in the paper
    assert weights - learned == pytest.approx(WEIGHTS[name], rel=1e-3)
    assert 0 < learned < 0.002 * WEIGHTS[name]
    runs = macs(model)
    assert macs(in_paper_order(model)) == pytest.approx(MACS[name], rel=1e-3)
    assert runs < 0.99 * MACS[name]


# --- constructor


@pytest.mark.parametrize('options', [
    {'stem_type': 'deep', 'stem_width': 16},
    {'stem_type': 'deep_tiered', 'stem_width': 24},
    {'stem_type': 'deep_tiered', 'stem_width': 32, 'avg_down': True, 'replace_stem_pool': True},
    {'avg_down': True},
    {'replace_stem_pool': True},
    {'down_kernel_size': 3, 'block_reduce_first': 2},
    {'aa_layer': BlurPool2d},
    {'aa_layer': nn.AvgPool2d},
    {'block_args': {'attn_layer': 'se'}},
    {'block': Bottleneck, 'cardinality': 4, 'base_width': 16},
    {'output_stride': 16},
    {'output_stride': 8},
    {'norm_layer': 'layernorm2d', 'act_layer': 'silu'},
], ids=str)
def test_trunk_options_are_timms(options):
    model = create(**options).eval()
    resnet = ResNet(**{'block': BasicBlock, **options}, layers=(1, 1, 1, 1), channels=(32, 48, 96, 16)).eval()
    loaded = model.load_state_dict(trunk_state_dict(resnet), strict=False)
    assert not loaded.unexpected_keys and {k.split('.')[0] for k in loaded.missing_keys} == {'vt_stage', 'fc'}
    x = images(2, 64, 96)
    with torch.no_grad():
        expected = resnet.forward_intermediates(x, indices=[0, 1, 2, 3], intermediates_only=True)
        result = model.forward_intermediates(x, indices=[0, 1, 2, 3], intermediates_only=True)
        assert model(x).shape == (2, 10)
    for r, e, info, expected_info in zip(result, expected, model.feature_info, resnet.feature_info, strict=False):
        assert_close(r, e)
        assert info == expected_info


@pytest.mark.parametrize('global_pool', ['avg', 'max', 'avgmax', 'catavgmax'])
def test_global_pool_is_over_tokens(global_pool):
    model = calibrated(global_pool=global_pool, num_classes=5)
    x = images()
    with torch.no_grad():
        tokens = model.forward_features(x)
        avg, top = tokens.mean(1), tokens.amax(1)
        pooled = {
            'avg': avg, 'max': top, 'avgmax': (avg + top) / 2, 'catavgmax': torch.cat([avg, top], 1)}[global_pool]
        assert model.head_hidden_size == pooled.shape[1]
        assert_close(model.forward_head(tokens, pre_logits=True), pooled)
        assert_close(model(x), F.linear(pooled, model.fc.weight, model.fc.bias))


def test_no_pooling_returns_tokens():
    model = calibrated(global_pool='', num_classes=0)
    with torch.no_grad():
        result, tokens = model(images()), model.forward_features(images())
    assert result.shape == (2, 16, 128)
    assert torch.equal(result, tokens)


def test_drop_rate_acts_in_training():
    x = images(8)
    model, dropless = calibrated(drop_rate=0.5), calibrated()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        assert torch.equal(model(x), dropless(x))
        assert not torch.allclose(model.train()(x), model(x))
        assert torch.equal(dropless.train()(x), dropless(x))
        dropped = model.forward_head(torch.ones(8, 16, 128), pre_logits=True)
    assert set(dropped.unique().tolist()) == {0., 2.}


@pytest.mark.parametrize('name', BLOCKS)
@pytest.mark.parametrize('rate', [0.1, 0.3])
def test_drop_path_rate_is_one_linear_ramp(name, rate):
    model = create(name, drop_path_rate=rate, device='meta', last_projector=True)
    blocks = [b for stage in (model.layer1, model.layer2, model.layer3) for b in stage]
    assert len(blocks) == BLOCKS[name]
    modules = [*blocks, *model.vt_stage]
    for i, module in enumerate(modules):
        rates = [m.drop_prob for m in module.modules() if isinstance(m, DropPath)]
        assert len(rates) == (0 if i == 0 else 1 if i < len(blocks) else 2)
        assert rates == pytest.approx([rate * i / (len(modules) - 1)] * len(rates))
    assert not any(isinstance(m, DropPath) for m in create(name, device='meta').modules())


@pytest.mark.parametrize('norm_layer,expected', [
    ('groupnorm', timm.layers.GroupNorm), ('layernorm2d', timm.layers.LayerNorm2d),
    ('rmsnorm2d', timm.layers.RmsNorm2d), (partial(nn.BatchNorm2d, eps=1e-3), nn.BatchNorm2d)])
def test_norm_layer_reaches_everything(norm_layer, expected):
    model = create(norm_layer=norm_layer, channels=(32, 64, 96)).eval()
    norms = [m for m in model.modules() if getattr(m, 'weight', None) is not None and m.weight.ndim == 1]
    assert len(norms) > 20 and all(type(m) is expected for m in norms)
    assert all(m.eps == 1e-3 for m in norms) or expected is not nn.BatchNorm2d
    identity = expected is not nn.BatchNorm2d
    assert all(isinstance(m.tokenizer.logit_norm, nn.Identity) == identity for m in model.vt_stage)
    assert model(images()).isfinite().all()
    model.train()(images()).sum().backward()


def test_frozen_norms():
    model = calibrated(num_classes=5)
    x = images()
    with torch.no_grad():
        expected = model(x)
        frozen = timm.layers.freeze_batch_norm_2d(copy.deepcopy(model)).train()
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in frozen.modules())
        assert_close(frozen(x), expected)
        built = create(norm_layer=partial(FrozenBatchNormAct2d, apply_act=False), num_classes=5).train()
        built.load_state_dict(model.state_dict(), strict=False)
        assert_close(built(x), expected)


def test_act_layer_reaches_trunk_and_vt_stage():
    model, relu = create(act_layer='silu').eval(), calibrated()
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())
    assert all(isinstance(m.transformer.act, nn.SiLU) for m in model.vt_stage)
    assert isinstance(model.act1, nn.SiLU) and isinstance(model.layer3[0].act2, nn.SiLU)

    model.load_state_dict(relu.state_dict())
    x = F.relu(torch.randn(2, 96, 4, 4))
    with torch.no_grad():
        assert not torch.allclose(model.vt_stage[0](x)[1], relu.vt_stage[0](x)[1])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_device_and_dtype(dtype):
    model = create(device='meta', dtype=dtype, stem_type='deep', stem_width=16, replace_stem_pool=True)
    tensors = [t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()]
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert all(t.dtype == dtype for t in tensors)
    assert create(dtype=dtype).eval()(images().to(dtype)).dtype == dtype


@pytest.mark.parametrize('num_modules,in_chans,num_classes', [(1, 1, 0), (2, 3, 5), (4, 4, 3)])
def test_sizes(num_modules, in_chans, num_classes):
    model = create(
        layers=(1, 1, 1, num_modules), in_chans=in_chans, num_classes=num_classes, num_tokens=5, token_dim=36,
        feature_dim=72).eval()
    tokens, maps = model.forward_intermediates(images(in_chans=in_chans))
    assert len(model.vt_stage) == num_modules and tokens.shape == (2, 5, 36)
    assert [m.shape[1] for m in maps] == [info['num_chs'] for info in model.feature_info]
    assert (model.num_classes, model.in_chans) == (num_classes, in_chans)
    assert model.num_features == model.head_hidden_size == 36
    assert isinstance(model.fc, nn.Linear if num_classes else nn.Identity)
    assert model(images(in_chans=in_chans)).shape == (2, num_classes or 36)


@pytest.mark.parametrize('kwargs', [{'tokenizers': 'filter'}, {'img_size': 64}, {'layers4': 1}])
def test_unknown_arguments(kwargs):
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        create(**kwargs)


@pytest.mark.parametrize('name,value', [
    ('tokenizer', 'fitler'), ('tokenizer', 'recurrent'), ('num_tokens', 0), ('num_tokens', -3), ('num_tokens', 2.5),
    ('num_tokens', True), ('token_dim', 0), ('feature_dim', -1), ('in_chans', 0), ('output_stride', 4),
    ('output_stride', 64), ('global_pool', 'mean'), ('layers', (1, 1, 1)), ('layers', (1, 1, 1, 0)),
    ('channels', (32, 48, 96, 128))])
def test_bad_arguments(name, value):
    with pytest.raises(ValueError) as error:
        create(**{name: value})
    assert name in str(error.value)
    assert repr(value) in str(error.value) or (name == 'layers' and 'got 0' in str(error.value))


@pytest.mark.parametrize('shape', [(2, 4, 64, 64), (2, 1, 64, 64), (2, 3, 31, 64), (2, 3, 64, 31), (3, 64, 64)])
@pytest.mark.parametrize('features_only', [False, True])
def test_bad_input(shape, features_only):
    model = create(features_only=features_only).eval()
    with pytest.raises(ValueError) as error:
        model(torch.randn(shape))
    assert str(error.value).startswith('x ') and str(list(shape)) in str(error.value)
    assert '3' in str(error.value) and '32' in str(error.value)


def test_zero_init_last():
    def zeros(model):
        return {k for k, v in model.state_dict().items() if k.endswith('weight') and v.ndim == 1 and not v.any()}

    trunk = {f'layer{i}.0.bn2.weight' for i in (1, 2, 3)}
    stage = {f'vt_stage.{i}.transformer.{name}.norm.weight' for i in (0, 1) for name in ('norm', 'fc2')}
    between = {'vt_stage.0.projector.value.norm.weight', 'vt_stage.1.tokenizer.query.norm.weight'}
    assert zeros(create()) == trunk | stage | between
    assert zeros(create(zero_init_last=False)) == set()


# --- features


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('output_stride', REDUCTIONS)
def test_features_only(output_stride, size):
    model = create(features_only=True, output_stride=output_stride).eval()
    maps = model(images(2, *size))
    assert model.feature_info.reduction() == REDUCTIONS[output_stride]
    assert model.feature_info.channels() == [64, 32, 48, 96, 128]
    for feature, chs, r in zip(maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        assert feature.shape == (2, chs, math.ceil(size[0] / r), math.ceil(size[1] / r))


@pytest.mark.parametrize('out_indices', [(0,), (1, 2, 3), (0, 1, 2, 3), (3, 4), (-1,)])
def test_out_indices(out_indices):
    model = create(features_only=True, out_indices=out_indices)
    full = create(features_only=True)
    full.load_state_dict(model.state_dict(), strict=False)
    maps, expected = model.eval()(images()), full.eval()(images())
    assert len(maps) == len(out_indices)
    for i, feature, chs in zip(out_indices, maps, model.feature_info.channels(), strict=True):
        assert_close(feature, expected[i])
        assert feature.shape[1] == chs
    uses_stage = max(i % 5 for i in out_indices) == 4
    assert any('vt_stage' in n for n, _ in model.named_parameters()) == uses_stage


def test_output_stride_only_pools_the_map():
    model, unpooled = calibrated(last_projector=True), create(last_projector=True, output_stride=16).eval()
    unpooled.load_state_dict(model.state_dict())
    x = images(2, 65, 100)
    with torch.no_grad():
        tokens, maps = model.forward_intermediates(x)
        same_tokens, whole_maps = unpooled.forward_intermediates(x)
        assert torch.equal(tokens, same_tokens)
        assert torch.equal(model(x), unpooled(x))
    assert all(torch.equal(a, b) for a, b in zip(maps[:4], whole_maps[:4], strict=True))
    assert torch.equal(maps[4], pool(whole_maps[4]))
    assert maps[3].shape[2:] == whole_maps[4].shape[2:]


@needs_timm_that_reads_folders
def test_saved_classifier_loads(tmp_path):
    model = calibrated(num_classes=7, num_tokens=5)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert (tmp_path / 'model.safetensors').exists()
    x = images()
    with torch.no_grad():
        loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        assert torch.equal(loaded(x), model(x))

        features = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True).eval()
        expected = model.forward_intermediates(x, intermediates_only=True)
        for result, exp in zip(features(x), expected, strict=True):
            assert torch.equal(result, exp)

        refined = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, last_projector=True).eval()
        tokens, maps = refined.forward_intermediates(x)
        assert torch.equal(refined.forward_head(tokens), model(x))
        assert torch.equal(maps[-1], expected[-1])

        other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3, in_chans=1).eval()
        assert other(x[:, :1]).shape == (2, 3)
        assert_close(other.conv1.weight, model.conv1.weight.sum(1, keepdim=True))
        assert torch.equal(other.vt_stage[1].embed.norm.running_mean, model.vt_stage[1].embed.norm.running_mean)


def test_forward_intermediates():
    model = calibrated()
    x = images()
    stage = []
    model.vt_stage[0].register_forward_hook(lambda *_: stage.append(1))
    with torch.no_grad():
        tokens, maps = model.forward_intermediates(x)
        assert torch.equal(tokens, model.forward_features(x))
        assert_close(model.forward_head(tokens), model(x))
        assert [m.shape[1:] for m in maps] == [(64, 32, 32), (32, 16, 16), (48, 8, 8), (96, 4, 4), (128, 2, 2)]
        for indices, taken in [(2, [3, 4]), (5, [0, 1, 2, 3, 4]), ([1, 3], [1, 3]), ([-1], [4]), ((0,), [0])]:
            for stop_early in (False, True):
                stage.clear()
                last, some = model.forward_intermediates(x, indices=indices, stop_early=stop_early)
                assert all(torch.equal(a, maps[i]) for a, i in zip(some, taken, strict=True))
                runs_stage = not stop_early or 4 in taken
                assert len(stage) == runs_stage
                assert torch.equal(last, tokens if runs_stage else maps[taken[-1]].flatten(2).transpose(1, 2))
                only = model.forward_intermediates(
                    x, indices=indices, stop_early=stop_early, intermediates_only=True)
                assert isinstance(only, list)
                assert all(torch.equal(a, b) for a, b in zip(only, some, strict=True))
    with pytest.raises(ValueError, match=r"output_fmt.*'NLC'"):
        model.forward_intermediates(x, output_fmt='NLC')


@pytest.mark.parametrize('index', range(5))
@pytest.mark.parametrize('last_projector', [False, True])
def test_prune_intermediate_layers(index, last_projector):
    model = calibrated(last_projector=last_projector, num_classes=5)
    x = images()
    expected = model.forward_intermediates(x, indices=[index], intermediates_only=True)[0].detach()
    chs = model.feature_info[index]['num_chs']
    assert model.prune_intermediate_layers([index]) == [index]

    tokens, maps = model.forward_intermediates(x, indices=[index])
    assert torch.equal(maps[0], expected)
    # tokens reach no map where the last module has no projector
    loss = maps[0].square().sum() + (0 if last_projector else tokens.square().sum())
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert isinstance(model.fc, nn.Identity) and model.num_classes == 0

    result = model(x)
    width = 128 if index == 4 else chs
    assert model.num_features == model.head_hidden_size == width
    assert result.shape == (2, 16 if index == 4 else expected.shape[2] * expected.shape[3], width)
    assert torch.equal(result, tokens)
    model.reset_classifier(3, 'avg')
    assert model(x).shape == (2, 3)


def test_prune_counts_from_the_end_and_may_keep_the_head():
    model = create(num_classes=5).eval()
    expected = model(images())
    assert model.prune_intermediate_layers(2, prune_head=False) == [3, 4]
    assert torch.equal(model(images()), expected)
    assert model.prune_intermediate_layers() == [4]
    assert isinstance(model.fc, nn.Identity)


# --- compilers


@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning', 'ignore:.*torch.jit:DeprecationWarning')
@pytest.mark.parametrize('kwargs', [
    {}, {'num_classes': 0, 'global_pool': ''}, {'drop_path_rate': 0.1, 'drop_rate': 0.1, 'norm_layer': 'layernorm2d'},
    {'layers': (1, 1, 1, 1)}, {'layers': (1, 1, 1, 3), 'global_pool': 'max', 'last_projector': True}], ids=str)
def test_torch_jit_script(kwargs):
    model = calibrated(**kwargs)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        for x in (images(), images(1, 33, 47), images(3, 65, 100)):
            assert_close(scripted(x), model(x))
    with pytest.raises(torch.jit.Error, match='at least 32'):
        scripted(images(1, 31, 64))


@pytest.mark.parametrize('kwargs', [{}, {'features_only': True}], ids=str)
def test_fx_symbolic_trace(kwargs):
    model = calibrated(**kwargs)
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        for x in (images(), images(1, 33, 47), images(3, 65, 100)):
            for result, expected in zip(traced(x), model(x), strict=True):
                assert_close(result, expected)
    with pytest.raises(ValueError, match='at least 32'):
        traced(images(1, 31, 64))


def test_torch_compile_training():
    torch._dynamo.reset()
    model = calibrated(num_classes=5).train()
    reference = copy.deepcopy(model)
    torch.compile(model, backend='aot_eager', fullgraph=True)(images()).square().sum().backward()
    reference(images()).square().sum().backward()
    for (name, p), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad - expected.grad).norm() < 1e-3 * expected.grad.norm() + 1e-4, name


@pytest.mark.slow
def test_torch_compile_inductor():
    torch._dynamo.reset()
    model = calibrated()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for x in (images(), images(3, 65, 100)):
            assert_close(compiled(x), model(x), tol=1e-3)


@pytest.mark.parametrize('features_only', [False, True])
def test_torch_export_with_dynamic_shape(features_only):
    if not exports_max_pooling_of_any_size():
        pytest.skip(f"torch {torch.__version__} refuses to export a ResNet's stem, 7x7 convolution and max pooling, "
                    'at any size')
    model = calibrated(features_only=features_only)
    # at 32 the last map is one pixel, and export takes sizes of 1 for constants; timm's ResNets are refused there too
    smallest = 33 if features_only else 32
    dynamic_shape = {
        0: torch.export.Dim('batch'),
        2: torch.export.Dim('height', min=smallest),
        3: torch.export.Dim('width', min=smallest),
    }
    exported = torch.export.export(model, (images(2, 80, 64),), dynamic_shapes=(dynamic_shape,)).module()
    with torch.no_grad():
        for x in (images(2, 80, 64), images(1, smallest, smallest), images(3, 33, 47), images(5, 65, 100)):
            result, expected = exported(x), model(x)
            for r, e in zip(result, expected, strict=True):
                assert_close(r, e)


@pytest.mark.parametrize('kwargs', [{}, {'features_only': True}, {'drop_rate': 0.3, 'drop_path_rate': 0.3}], ids=str)
def test_gradient_checkpointing_changes_nothing(kwargs):
    model = calibrated(**kwargs).train()
    checkpointed = copy.deepcopy(model)
    inner = getattr(checkpointed, 'model', checkpointed)
    inner.set_grad_checkpointing()
    calls = []
    parts = [*inner.vt_stage, *(b for stage in (inner.layer1, inner.layer2, inner.layer3) for b in stage)]
    for part in parts:
        part.register_forward_pre_hook(lambda m, _: calls.append(m))
    results = []
    for m in (model, checkpointed):
        torch.manual_seed(0)
        result = m(images())
        result = torch.cat([r.flatten() for r in result])
        result.square().sum().backward()
        results.append(result)
    assert all(calls.count(part) == 2 for part in parts)
    assert torch.equal(*results)
    for (name, p), q in zip(model.named_parameters(), checkpointed.named_parameters(), strict=True):
        torch.testing.assert_close(q[1].grad, p.grad, msg=lambda m, name=name: f'{name}: {m}')


def test_channels_last():
    model = calibrated()
    with torch.no_grad():
        expected = model(images())
        result = model.to(memory_format=torch.channels_last)(images().contiguous(memory_format=torch.channels_last))
    assert_close(result, expected)


# --- numerics


@sync_batch_norm_conversions
def test_sync_batch_norm_conversion_keeps_outputs(convert):
    check_sync_batch_norms(calibrated(), convert, 'vt_stage.0.tokenizer.logit_norm', images())


@pytest.mark.parametrize('precision', ['float16', 'bfloat16', 'autocast'])
@pytest.mark.parametrize('scale', [1, 10])
def test_low_precision(precision, scale):
    model = calibrated()
    x = images(4) * scale
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        result = run_in_precision(model, x, precision)
    assert result.isfinite().all()
    tolerance = (0.02 if scale == 1 else 0.1) * (1 if precision == 'float16' else 5)
    assert (result.double() - expected).norm() < tolerance * expected.norm()


# --- head and groups


def head(model):
    """What a classifier is like, but for the width of the model."""
    weight = getattr(model.fc, 'weight', None)
    return {
        'pool': model.global_pool.pool_type, 'training': (model.fc.training, model.global_pool.training),
        'kind': type(model.fc), 'num_classes': model.num_classes,
        'weight': weight is not None and (
            weight.shape[0], weight.shape[1] / model.num_features, weight.dtype, weight.device)}


@pytest.mark.parametrize('global_pool', ['avg', 'catavgmax'])
@pytest.mark.parametrize('kwargs', [{}, {'dtype': torch.bfloat16}, {'device': 'meta'}], ids=str)
def test_reset_classifier_is_that_of_timm(global_pool, kwargs):
    """Newer versions of timm keep pooling, type, device and mode, older ones take their defaults."""
    ours, theirs = (create(name, global_pool=global_pool, **kwargs) for name in ('test_vt_resnet', 'test_resnet'))
    for training in False, True:
        for words in (7,), (0,), (3, 'max'), (5, 'catavgmax'):
            for model in ours, theirs:
                model.train(training).reset_classifier(*words)
            assert head(ours) == head(theirs)
            assert ours.get_classifier() is ours.fc and ours.get_classifier(name_only=True) == 'fc'


@pytest.mark.parametrize('coarse', [False, True])
@pytest.mark.parametrize('kwargs', [
    {}, {'stem_type': 'deep', 'stem_width': 16, 'replace_stem_pool': True, 'layers': (2, 1, 2, 3)}], ids=str)
def test_group_matcher(coarse, kwargs):
    model = create(device='meta', **kwargs)
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
    names = [n for n, _ in model.named_parameters()]
    assert sorted(n for group in groups.values() for n in group) == sorted(names)

    def part(name):
        words = name.split('.')
        if words[0] in ('conv1', 'bn1', 'maxpool'):
            return 'stem'
        return words[0] if coarse or words[0] == 'fc' else '.'.join(words[:2])

    order = list(dict.fromkeys(part(n) for n in names))
    if kwargs:  # the parameters of the stem's pool come after its norm
        assert 'maxpool.0.weight' in groups[0]
    assert [{part(n) for n in groups[i]} for i in range(len(groups))] == [{p} for p in order]
    assert order[0] == 'stem' and order[-1] == 'fc' and len(order) == (6 if coarse else 2 + sum(
        kwargs.get('layers', (1, 1, 1, 2))))


def test_layer_decay_reaches_every_group():
    model = create()
    optimizer = timm.optim.create_optimizer_v2(model, opt='sgd', lr=0.1, layer_decay=0.5)
    scales = {id(p): group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    assert [scales[id(p)] for p in (model.fc.weight, model.vt_stage[1].embed.norm.weight, model.conv1.weight)] == [
        1., 0.5, 0.5 ** 6]
