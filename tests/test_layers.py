"""Parts of a VT module against the paper's equations (1) to (5), written out in NumPy with float64."""
import copy
from functools import partial

import numpy as np
import pytest
import timm.layers
import torch
import torch.nn as nn
from timm.layers import GroupNorm, LayerNorm2d

from vt_zoo.layers import FilterTokenizer, Projector, RecurrentTokenizer, TokenTransformer, VTModule
from vt_zoo.layers.linear import PixelLinear, TokenLinear, TokenNorm, create_logit_norm, pixel_groups

# in_chs, out_chs, token_dim, num_tokens, height, width
SHAPES = [
    (20, 28, 9, 1, 3, 5),  # odd token_dim, one token
    (130, 200, 12, 7, 4, 2),  # two groups in the value map, channels not multiples of 64
    (192, 384, 6, 16, 3, 4),  # three and six groups, odd width of the keys
    (24, 24, 24, 7, 5, 3),  # embed, value and skip are identities
    (24, 32, 24, 16, 2, 6),  # embed is an identity
    (16, 24, 24, 7, 6, 2),  # value is an identity
    (24, 24, 16, 1, 3, 7),  # skip is an identity
    (5, 3, 1, 3, 1, 8),  # less channels than pixels, one channel in a token
    (8, 4, 3, 16, 1, 1),  # one pixel
]
NORMS = {
    'groupnorm': partial(GroupNorm, num_groups=4),
    'groupnorm1': 'groupnorm1',
    'layernorm2d': LayerNorm2d,
}


def array(tensor):
    return tensor.detach().double().numpy()


def pixels(image):
    return image.reshape(image.shape[0], -1).T  # (C, H, W) -> (H*W, C)


def softmax(logits, axis):
    exp = np.exp(logits - logits.max(axis, keepdims=True))
    return exp / exp.sum(axis, keepdims=True)


def matrix(conv):
    """Weights of a map, which may be a grouped point-wise convolution, as one block matrix (C_in, C_out)."""
    if isinstance(conv, nn.Linear):
        return array(conv.weight).T
    weight = array(conv.weight)[:, :, 0, 0]
    rows, columns = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    full = np.zeros((conv.in_channels, conv.out_channels))
    for g in range(conv.groups):
        for i in range(rows):
            for o in range(columns):
                full[g * rows + i, g * columns + o] = weight[g * columns + o, i]
    return full


def normed(norm, x):
    """Norm of the positions of one image (P, C)."""
    if isinstance(norm, nn.Identity):
        return x
    if isinstance(norm, nn.BatchNorm2d):
        mean, var = array(norm.running_mean), array(norm.running_var)
    elif isinstance(norm, nn.GroupNorm):
        mean, var = np.zeros(x.shape[1]), np.zeros(x.shape[1])
        for group in np.split(np.arange(x.shape[1]), norm.num_groups):
            mean[group], var[group] = x[:, group].mean(), x[:, group].var()
    else:
        assert isinstance(norm, LayerNorm2d)
        mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    return (x - mean) / np.sqrt(var + norm.eps) * array(norm.weight) + array(norm.bias)


def mapped(linear, x):
    if linear is None or isinstance(linear, nn.Identity):
        return x
    return normed(linear.norm, x @ matrix(linear.conv) if hasattr(linear, 'conv') else x)


def filter_reference(m, x):
    a = softmax(normed(m.logit_norm, x @ matrix(m.filters)), 0)
    return a.T @ mapped(m.value, x)


def recurrent_reference(m, x, tokens):
    w_r = (mapped(m.query, tokens) + array(m.filters.weight)).T
    logits = (x @ matrix(m.key.conv).T) @ w_r / np.sqrt(x.shape[1])
    a = softmax(normed(m.logit_norm, logits), 0)
    return a.T @ mapped(m.value, x)


def transformer_reference(m, tokens):
    key, query = mapped(m.key, tokens), mapped(m.query, tokens)
    relation = softmax(key @ query.T / np.sqrt(key.shape[1]), 1)
    tokens = tokens + normed(m.norm.norm, relation @ tokens)
    return tokens + mapped(m.fc2, np.maximum(mapped(m.fc1, tokens), 0))


def projector_reference(m, x, tokens):
    query, key = x @ matrix(m.query.conv).T, mapped(m.key, tokens)
    a = softmax(query @ key.T / np.sqrt(query.shape[1]), 1)
    return mapped(m.skip, x) + a @ mapped(m.value, tokens)


def module_reference(m, x, tokens=None):
    if isinstance(m.tokenizer, FilterTokenizer):
        tokens = filter_reference(m.tokenizer, x)
    else:
        tokens = recurrent_reference(m.tokenizer, x, tokens)
    tokens = transformer_reference(m.transformer, mapped(m.embed, tokens))
    return x if m.projector is None else projector_reference(m.projector, x, tokens), tokens


def batched(reference, module, *inputs):
    """Reference of each image of a batch; the inputs are maps (B, C, H, W) and tokens (B, L, C)."""
    arrays = [array(x) for x in inputs]
    return np.stack([
        reference(module, *[pixels(a[b]) if a.ndim == 4 else a[b] for a in arrays]) for b in range(len(inputs[0]))])


def assert_close(tensor, expected, tol=1e-9):
    result = array(tensor)
    if result.ndim == 4:
        assert expected.shape == (result.shape[0], result.shape[2] * result.shape[3], result.shape[1])
        result = np.stack([pixels(r) for r in result])
    np.testing.assert_allclose(result, expected, rtol=tol, atol=tol)


def stir(module, seed=0):
    """Give norms random affine values and running statistics, so that each of them matters; set eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for m in module.modules():
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            value = getattr(m, name, None)
            if value is not None and value.ndim == 1:
                low, high = (-0.5, 0.5) if name in ('bias', 'running_mean') else (0.5, 1.5)
                random = torch.rand(value.shape, generator=generator) * (high - low) + low
                value.data.copy_(random)
    return module.eval()


def build(cls, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    kwargs.setdefault('dtype', torch.float64)
    return stir(cls(*args, **kwargs), seed)


def build_all(shape, **kwargs):
    """The parts and modules of one shape, with inputs for each."""
    in_chs, out_chs, token_dim, num_tokens, height, width = shape
    parts = {
        'filter': build(FilterTokenizer, in_chs, token_dim, num_tokens, **kwargs),
        'recurrent': build(RecurrentTokenizer, in_chs, token_dim, num_tokens, **kwargs),
        'transformer': build(TokenTransformer, token_dim, **kwargs),
        'projector': build(Projector, in_chs, out_chs, token_dim, **kwargs),
        'first': build(VTModule, in_chs, out_chs, token_dim, num_tokens, **kwargs),
        'middle': build(VTModule, in_chs, out_chs, token_dim, num_tokens, tokenizer=RecurrentTokenizer, **kwargs),
    }
    torch.manual_seed(1)
    x = torch.randn(3, in_chs, height, width, dtype=torch.float64)
    tokens = torch.randn(3, num_tokens, token_dim, dtype=torch.float64)
    inputs = {name: (x, tokens) for name in parts}
    inputs.update(filter=(x,), transformer=(tokens,), first=(x,))
    return parts, inputs


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def permuted(x, permutation):
    return x.flatten(2)[:, :, permutation].reshape(x.shape)


PARTS = ['filter', 'recurrent', 'transformer', 'projector', 'first', 'middle']
SHAPE = (130, 132, 20, 7, 4, 5)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_filter_tokenizer_is_equation_1(shape):
    in_chs, _, token_dim, num_tokens, height, width = shape
    tokenizer = build(FilterTokenizer, in_chs, token_dim, num_tokens)
    x = torch.randn(2, in_chs, height, width, dtype=torch.float64)
    tokens = tokenizer(x)
    assert tokens.shape == (2, num_tokens, in_chs)
    assert_close(tokens, batched(filter_reference, tokenizer, x))


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_recurrent_tokenizer_is_equation_2(shape):
    in_chs, _, token_dim, num_tokens, height, width = shape
    tokenizer = build(RecurrentTokenizer, in_chs, token_dim, num_tokens)
    x = torch.randn(2, in_chs, height, width, dtype=torch.float64)
    tokens_in = torch.randn(2, num_tokens, token_dim, dtype=torch.float64)
    tokens = tokenizer(x, tokens_in)
    assert tokens.shape == (2, num_tokens, in_chs)
    assert_close(tokens, batched(recurrent_reference, tokenizer, x, tokens_in))


@pytest.mark.parametrize('num_tokens', [1, 3, 8])
def test_recurrent_tokenizer_takes_as_many_tokens_as_it_makes(num_tokens):
    tokenizer = build(RecurrentTokenizer, 5, 6, 4)
    x, tokens = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((5, 3, 3), (num_tokens, 6)))
    with pytest.raises(RuntimeError, match='size'):
        tokenizer(x, tokens)


@pytest.mark.parametrize('dim,num_tokens', [(1, 1), (2, 7), (3, 16), (6, 1), (9, 7), (64, 16), (130, 3)])
def test_transformer_is_equations_3_and_4(dim, num_tokens):
    transformer = build(TokenTransformer, dim)
    tokens = torch.randn(2, num_tokens, dim, dtype=torch.float64)
    assert_close(transformer(tokens), batched(transformer_reference, transformer, tokens))


def test_transformer_keys_have_half_of_the_channels_in_two_groups():
    transformer = TokenTransformer(128)
    assert transformer.key.conv.weight.shape == transformer.query.conv.weight.shape == (64, 64, 1, 1)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_projector_is_equation_5(shape):
    in_chs, out_chs, token_dim, num_tokens, height, width = shape
    projector = build(Projector, in_chs, out_chs, token_dim)
    x = torch.randn(2, in_chs, height, width, dtype=torch.float64)
    tokens = torch.randn(2, num_tokens, token_dim, dtype=torch.float64)
    x_out = projector(x, tokens)
    assert x_out.shape == (2, out_chs, height, width)
    assert_close(x_out, batched(projector_reference, projector, x, tokens))


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_modules_chain_the_equations(shape):
    in_chs, out_chs, token_dim, num_tokens, height, width = shape
    first = build(VTModule, in_chs, out_chs, token_dim, num_tokens, seed=0)
    middle = build(VTModule, out_chs, out_chs, token_dim, num_tokens, tokenizer=RecurrentTokenizer, seed=1)
    last = build(
        VTModule, out_chs, out_chs, token_dim, num_tokens, tokenizer=RecurrentTokenizer, projector=False, seed=2)
    x = torch.randn(2, in_chs, height, width, dtype=torch.float64)

    tokens, x_out = None, x
    for module in (first, middle, last):
        x_out, tokens = module(x_out, tokens)

    for b in range(2):
        expected_tokens, expected_x = None, pixels(array(x[b]))
        for module in (first, middle, last):
            expected_x, expected_tokens = module_reference(module, expected_x, expected_tokens)
        assert_close(tokens[b:b + 1], expected_tokens[None], tol=1e-8)
        assert_close(x_out[b:b + 1], expected_x[None], tol=1e-8)


@pytest.mark.parametrize('name', PARTS)
def test_float32_agrees_with_the_equations(name):
    parts, inputs = build_all(SHAPE, dtype=torch.float32)
    references = {
        'filter': filter_reference, 'recurrent': recurrent_reference, 'transformer': transformer_reference,
        'projector': projector_reference,
        'first': lambda m, *a: module_reference(m, *a)[0], 'middle': lambda m, *a: module_reference(m, *a)[0],
    }
    args = [a.float() for a in inputs[name]]
    assert_close(outputs(parts[name](*args))[0], batched(references[name], parts[name], *args), tol=2e-4)


def test_maps_are_identities_only_where_channels_agree():
    for in_chs, out_chs, token_dim in [(8, 8, 8), (8, 8, 4), (8, 4, 8), (4, 8, 8), (2, 4, 8)]:
        module = VTModule(in_chs, out_chs, token_dim, 3)
        assert isinstance(module.embed, TokenNorm) == (in_chs == token_dim)
        assert isinstance(module.projector.value, TokenNorm) == (token_dim == out_chs)
        assert isinstance(module.projector.skip, nn.Identity) == (in_chs == out_chs)


@pytest.mark.parametrize('in_chs,out_chs', [
    (1, 1), (63, 64), (64, 64), (128, 128), (96, 128), (256, 256), (256, 512), (1024, 1024), (192, 320), (96, 200),
    (100, 200), (320, 384), (1000, 1000)])
def test_pixel_groups_is_the_largest_divisor(in_chs, out_chs):
    expected = max(g for g in range(1, max(out_chs // 64, 1) + 1) if in_chs % g == 0 and out_chs % g == 0)
    assert pixel_groups(in_chs, out_chs) == expected


def test_training_statistics_are_over_images_and_tokens():
    torch.manual_seed(0)
    tokens = torch.randn(3, 5, 6, dtype=torch.float64) * 2 + 1
    norm = TokenNorm(6, dtype=torch.float64)
    flat = array(tokens).reshape(15, 6)
    expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + norm.norm.eps)
    assert_close(norm(tokens), expected.reshape(3, 5, 6))
    assert_close(norm.norm.running_mean, 0.1 * flat.mean(0))
    assert_close(norm.norm.running_var, 0.9 + 0.1 * flat.var(0, ddof=1))


def test_training_statistics_of_logits_are_per_token():
    torch.manual_seed(0)
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    tokens = torch.randn(3, 6, 4, dtype=torch.float64)
    tokenizer = RecurrentTokenizer(8, 4, 6, dtype=torch.float64)
    tokenizer(x, tokens)
    assert tokenizer.logit_norm.running_mean.shape == (6,)
    assert (tokenizer.logit_norm.running_var != 1).all()
    tokenizer = FilterTokenizer(8, 4, 6, dtype=torch.float64)
    tokenizer(x)
    logits = np.concatenate([pixels(image) for image in array(x)]) @ matrix(tokenizer.filters)
    assert_close(tokenizer.logit_norm.running_mean, 0.1 * logits.mean(0))


@pytest.mark.parametrize('name', ['filter', 'recurrent', 'first', 'middle'])
def test_permuted_pixels_give_the_same_tokens(name):
    parts, inputs = build_all(SHAPE)
    x, *tokens = inputs[name]
    permutation = torch.randperm(x.shape[2] * x.shape[3], generator=torch.Generator().manual_seed(0))
    expected = outputs(parts[name](x, *tokens))[-1]
    result = outputs(parts[name](permuted(x, permutation), *tokens))[-1]
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', ['projector', 'first', 'middle'])
def test_permuted_pixels_give_a_permuted_map(name):
    parts, inputs = build_all(SHAPE)
    x, *tokens = inputs[name]
    permutation = torch.randperm(x.shape[2] * x.shape[3], generator=torch.Generator().manual_seed(0))
    expected = permuted(outputs(parts[name](x, *tokens))[0], permutation)
    result = outputs(parts[name](permuted(x, permutation), *tokens))[0]
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_permuted_tokens_permute_through_the_transformer_and_not_in_the_map():
    parts, inputs = build_all(SHAPE)
    x, tokens = inputs['projector']
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    torch.testing.assert_close(parts['transformer'](tokens[:, order]), parts['transformer'](tokens)[:, order])
    torch.testing.assert_close(parts['projector'](x, tokens[:, order]), parts['projector'](x, tokens))


@pytest.mark.parametrize('name', PARTS)
def test_an_image_does_not_depend_on_its_batch(name):
    parts, inputs = build_all(SHAPE)
    expected = outputs(parts[name](*inputs[name]))
    others = [torch.cat([a[:1], a[1:] * 50 + 3]) for a in inputs[name]]
    for exp, alone, batch in zip(
            expected, outputs(parts[name](*[a[:1] for a in inputs[name]])), outputs(parts[name](*others)), strict=True):
        torch.testing.assert_close(alone, exp[:1], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(batch[:1], exp[:1], rtol=1e-10, atol=1e-10)
        assert not torch.allclose(batch[1:], exp[1:])


def test_filter_tokenizer_ignores_tokens():
    parts, inputs = build_all(SHAPE)
    x, tokens = inputs['recurrent']
    assert torch.equal(parts['filter'](x, tokens), parts['filter'](x))


def test_shift_of_logits_cancels():
    parts, inputs = build_all(SHAPE)
    for name in ('filter', 'recurrent'):
        expected = parts[name](*inputs[name])
        parts[name].logit_norm.bias.data += 3
        torch.testing.assert_close(parts[name](*inputs[name]), expected)
        parts[name].logit_norm.weight.data *= 3
        assert not torch.allclose(parts[name](*inputs[name]), expected)


@pytest.mark.parametrize('cls', [RecurrentTokenizer, partial(VTModule, 8, tokenizer=RecurrentTokenizer)])
def test_recurrent_tokenizer_needs_tokens(cls):
    module = cls(8, 4, 3)
    with pytest.raises(ValueError, match=r'tokens .*None'):
        module(torch.randn(1, 8, 2, 2))


def test_module_without_projector_returns_its_map():
    module = build(VTModule, 8, 12, 4, 3, projector=False)
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    x_out, tokens = module(x)
    assert x_out is x and tokens.shape == (2, 3, 4)
    assert module.projector is None and not any('projector' in name for name in module.state_dict())


@pytest.mark.parametrize('norm_layer', [nn.BatchNorm2d, *NORMS.values()])
@pytest.mark.parametrize('mode', [True, False])
def test_zero_init_last_makes_branches_identities(norm_layer, mode):
    torch.manual_seed(0)
    tokens = torch.randn(2, 5, 8)
    transformer = TokenTransformer(8, norm_layer=norm_layer).train(mode)
    assert not torch.allclose(transformer(tokens), tokens)
    transformer.zero_init_last()
    assert torch.equal(transformer(tokens), tokens)

    for in_chs, out_chs, token_dim in [(12, 12, 8), (12, 8, 8), (8, 12, 4)]:
        x = torch.randn(2, in_chs, 3, 4)
        projector = Projector(in_chs, out_chs, token_dim, norm_layer).train(mode)
        assert not torch.allclose(projector(x, tokens[..., :token_dim]), projector.skip(x))
        projector.zero_init_last()
        assert torch.equal(projector(x, tokens[..., :token_dim]), projector.skip(x))
        assert in_chs != out_chs or torch.equal(projector.skip(x), x)


@pytest.mark.parametrize('norm_layer', NORMS.values(), ids=NORMS)
def test_other_norms(norm_layer):
    shape = in_chs, _, token_dim, num_tokens, height, width = (24, 32, 16, 7, 5, 3)
    parts, _ = build_all(shape, norm_layer=norm_layer)
    x = torch.randn(2, in_chs, height, width, dtype=torch.float64)
    tokens = torch.randn(2, num_tokens, token_dim, dtype=torch.float64)
    assert isinstance(parts['filter'].logit_norm, nn.Identity)
    assert isinstance(parts['recurrent'].logit_norm, nn.Identity)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for p in parts.values() for m in p.modules())
    assert_close(parts['filter'](x), batched(filter_reference, parts['filter'], x))
    assert_close(parts['recurrent'](x, tokens), batched(recurrent_reference, parts['recurrent'], x, tokens))
    assert_close(parts['transformer'](tokens), batched(transformer_reference, parts['transformer'], tokens))
    assert_close(parts['projector'](x, tokens), batched(projector_reference, parts['projector'], x, tokens))


def test_logit_norm_is_a_batch_norm_or_nothing():
    assert isinstance(create_logit_norm(5), nn.BatchNorm2d)
    assert isinstance(create_logit_norm(5, 'batchnorm2d'), nn.BatchNorm2d)
    assert isinstance(create_logit_norm(5, nn.SyncBatchNorm), nn.SyncBatchNorm)
    assert create_logit_norm(5, partial(nn.BatchNorm2d, eps=0.25)).eps == 0.25
    assert isinstance(create_logit_norm(5, 'layernorm2d'), nn.Identity)
    assert isinstance(create_logit_norm(5, partial(GroupNorm, num_groups=1)), nn.Identity)


@pytest.mark.parametrize('convert', [
    nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm], ids=['torch', 'timm'])
@pytest.mark.parametrize('name', PARTS)
def test_sync_batch_norm_conversion_keeps_outputs(name, convert):
    parts, inputs = build_all(SHAPE)
    expected = outputs(parts[name](*inputs[name]))
    converted = convert(copy.deepcopy(parts[name]))
    norms = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    for result, exp in zip(outputs(converted(*inputs[name])), expected, strict=True):
        torch.testing.assert_close(result, exp, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', PARTS)
@pytest.mark.parametrize('precision', ['float16', 'bfloat16', 'autocast'])
@pytest.mark.parametrize('scale', [1, 10])
def test_low_precision(name, precision, scale):
    parts, inputs = build_all((192, 128, 96, 16, 6, 7), dtype=torch.float32)
    part = parts[name]
    for m in part.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
            m.reset_running_stats()
    part.train()(*[a.float() for a in inputs[name]])
    part.eval()

    args = [a.float() * scale for a in inputs[name]]
    with torch.no_grad():
        expected = outputs(copy.deepcopy(part).double()(*[a.double() for a in args]))
        if precision == 'autocast':
            with torch.autocast('cpu', torch.bfloat16):
                results = outputs(part(*args))
        else:
            dtype = getattr(torch, precision)
            results = outputs(part.to(dtype)(*[a.to(dtype) for a in args]))
            assert all(r.dtype == dtype for r in results)
    # logits grow with the activations, so that sharp softmaxes magnify the rounding of inputs and weights
    tolerance = 0.005 if scale == 1 else 0.2 if name in ('first', 'middle') else 0.06
    if precision != 'float16':
        tolerance *= 5 if scale == 1 else 3
    for result, exp in zip(results, expected, strict=True):
        assert result.isfinite().all()
        assert (result.double() - exp).norm() < tolerance * exp.norm()


@pytest.mark.parametrize('name', ['transformer', 'projector'])
def test_drop_path_drops_branches_of_whole_images(name):
    torch.manual_seed(0)
    part = stir(TokenTransformer(8, drop_path=0.5) if name == 'transformer' else Projector(6, 6, 8, drop_path=0.5))
    x, tokens = torch.randn(64, 6, 3, 4), torch.randn(64, 5, 8)
    args = (tokens,) if name == 'transformer' else (x, tokens)
    evaluated = part(*args)
    assert torch.equal(evaluated, part(*args))
    kept = (part.train()(*args) != args[0]).flatten(1)
    kept = kept.any(1)
    assert kept.any() and not kept.all()
    part.drop_path.drop_prob = 1.
    assert torch.equal(part(*args), args[0])
    assert not torch.allclose(evaluated, args[0])


def test_every_parameter_gets_a_gradient():
    first = build(VTModule, 12, 8, 6, 5)
    second = build(VTModule, 8, 8, 6, 5, tokenizer=RecurrentTokenizer)
    x, tokens = second(*first(torch.randn(2, 12, 3, 4, dtype=torch.float64)))
    (x.square().sum() + tokens.square().sum()).backward()
    # these shift logits by what is constant along their softmax
    cancelling = ('logit_norm.bias', 'transformer.query.norm.bias', 'projector.key.norm.bias')
    for name, p in [*first.named_parameters(), *second.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert name.endswith(cancelling) or p.grad.abs().max() > 1e-9, name


def test_activation_is_used():
    silu, relu = build(TokenTransformer, 8, act_layer='silu'), build(TokenTransformer, 8)
    silu.load_state_dict(relu.state_dict())
    tokens = torch.randn(2, 5, 8, dtype=torch.float64)
    assert isinstance(silu.act, nn.SiLU) and isinstance(relu.act, nn.ReLU)
    assert not torch.allclose(silu(tokens), relu(tokens))


@pytest.mark.parametrize('cls,args', [
    (PixelLinear, (4, 6)), (TokenLinear, (4, 6)), (TokenNorm, (4,)), (FilterTokenizer, (4, 6, 3)),
    (RecurrentTokenizer, (4, 6, 3)), (TokenTransformer, (6,)), (Projector, (4, 5, 6)), (VTModule, (4, 5, 6, 3))])
def test_device_and_dtype_reach_everything(cls, args):
    module = cls(*args, device='meta', dtype=torch.bfloat16)
    tensors = [t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()]
    assert tensors and all(t.is_meta and t.dtype == torch.bfloat16 for t in tensors)
