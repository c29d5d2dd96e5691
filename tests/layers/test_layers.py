"""Parts of a VT stage against the paper's equations (1) to (5), written out in NumPy with float64."""
import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import build, ragged, run_in_precision, stir
from reference import (
    array,
    assert_close,
    assert_each,
    kmeans_reference,
    matrix,
    mixer_reference,
    pixels,
    pooling_reference,
    position_reference,
    projector_reference,
    stage_reference,
    tokenizer_reference,
    transformer_reference,
)
from timm.layers import GroupNorm, LayerNorm2d

from vt_zoo.layers import (
    ClusteringTokenizer,
    DynamicVTModule,
    FilterTokenizer,
    GraphMixer,
    LinearMixer,
    PoolingTokenizer,
    Projector,
    RecurrentTokenizer,
    TokenModule,
    TokenTransformer,
    VTModule,
    VTStage,
)
from vt_zoo.layers.kmeans import KMeans
from vt_zoo.layers.linear import PixelLinear, TokenLinear, TokenNorm, create_logit_norm, pixel_groups
from vt_zoo.layers.position_code import PositionCode
from vt_zoo.layers.tokenizer import token_grid

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
    'batchnorm2d': nn.BatchNorm2d,
    'groupnorm': partial(GroupNorm, num_groups=4),
    'groupnorm1': 'groupnorm1',
    'layernorm2d': LayerNorm2d,
}
MAPS = [(1, 1), (1, 5), (2, 2), (3, 4), (7, 5), (8, 8), (14, 14), (9, 21)]
TOKENIZERS = {'filter': FilterTokenizer, 'recurrent': RecurrentTokenizer, 'clustering': ClusteringTokenizer}


# --- equations


@pytest.mark.parametrize('position_code', [False, True])
@pytest.mark.parametrize('kind,shape', [
    (kind, shape) for kind in TOKENIZERS for shape in SHAPES
    if kind != 'clustering' or min(shape[4:]) > 1], ids=str)  # one row has the same cells twice: ties
def test_tokenizer(kind, shape, position_code):
    """The first kind and clusters ignore the tokens before."""
    in_chs, _, token_dim, num_tokens, height, width = shape
    tokenizer = build(TOKENIZERS[kind], in_chs, token_dim, num_tokens, position_code)
    x, tokens = ragged(2, in_chs, height, width), ragged(2, num_tokens, token_dim)
    assert tokenizer.out_chs == in_chs + 64 * position_code
    assert_each(tokenizer(x, tokens), lambda x, t: tokenizer_reference(tokenizer, kind, x, t), x, tokens)


@pytest.mark.parametrize('num_tokens', [1, 3, 8])
def test_recurrent_tokenizer_takes_as_many_tokens_as_it_makes(num_tokens):
    tokenizer = build(RecurrentTokenizer, 5, 6, 4)
    x, tokens = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((5, 3, 3), (num_tokens, 6)))
    with pytest.raises(RuntimeError, match='size'):
        tokenizer(x, tokens)


@pytest.mark.parametrize('num_tokens', [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize('height,width', MAPS)
def test_pooling_tokenizer(num_tokens, height, width):
    tokenizer = build(PoolingTokenizer, 5, 3, num_tokens)
    x = ragged(2, 5, height, width)
    tokens = tokenizer(x, ragged(2, num_tokens, 3))
    assert tokens.shape == (2, num_tokens, tokenizer.out_chs) and tokenizer.out_chs == 5
    assert_each(tokens, lambda x: pooling_reference(x, *token_grid(num_tokens)), x)
    assert list(tokenizer.parameters()) == []


def test_token_grid_is_the_squarest():
    grids = {}
    for num_tokens in range(1, 200):
        try:
            grids[num_tokens] = token_grid(num_tokens)
        except ValueError as e:
            assert 'num_tokens' in str(e) and str(e).endswith(f'got {num_tokens}')
            grids[num_tokens] = None
    for num_tokens, grid in grids.items():
        fitting = [(r, num_tokens // r) for r in range(1, 15) if num_tokens % r == 0 and r <= num_tokens // r <= 2 * r]
        assert grid == (fitting[-1] if fitting else None), num_tokens
    assert grids[16] == (4, 4) and grids[32] == (4, 8) and grids[64] == (8, 8) and grids[5] is grids[7] is None


@pytest.mark.parametrize('height,width', MAPS)
def test_position_code(height, width):
    code = build(PositionCode)
    attn = torch.softmax(ragged(2, 5, height * width), dim=-1).unflatten(2, (height, width))
    result = code(attn)
    assert result.shape == (2, 5, 64)
    assert_each(result, lambda a: position_reference(code, a), attn)


@pytest.mark.parametrize('values', [False, True])
@pytest.mark.parametrize('dim,num_heads,num_tokens', [
    (1, 1, 1), (2, 1, 7), (3, 1, 16), (9, 1, 7), (64, 1, 16), (130, 1, 3), (8, 2, 1), (8, 4, 7), (24, 3, 7), (64, 8, 7),
    (64, 32, 7)])
def test_transformer(dim, num_heads, num_tokens, values):
    transformer = build(TokenTransformer, dim, num_heads=num_heads, attention_values=values)
    tokens = ragged(2, num_tokens, dim)
    assert_each(transformer(tokens), lambda t: transformer_reference(transformer, t, num_heads), tokens)
    weights = {n: p.shape for n, p in transformer.named_parameters() if p.ndim > 1}
    assert weights.get('value.conv.weight') == ((dim, dim) if values else None)


def test_transformer_keys_have_half_of_the_channels_in_two_groups():
    transformer = TokenTransformer(128)
    assert transformer.key.conv.weight.shape == transformer.query.conv.weight.shape == (64, 64, 1, 1)


@pytest.mark.parametrize('cls,kind', [(GraphMixer, 'graph'), (LinearMixer, 'none')])
@pytest.mark.parametrize('dim,num_tokens', [(1, 1), (5, 7), (32, 16)])
def test_mixers(cls, kind, dim, num_tokens):
    mixer = build(cls, dim, num_tokens)
    tokens = ragged(3, num_tokens, dim)
    if kind == 'graph':
        assert torch.equal(mixer.adjacency, torch.eye(num_tokens, dtype=torch.float64))
        mixer.adjacency.data = ragged(num_tokens, num_tokens, seed=1)
    assert {n: tuple(p.shape) for n, p in mixer.named_parameters() if p.ndim > 1} == {
        'linear.conv.weight': (dim, dim), **({'adjacency': (num_tokens,) * 2} if kind == 'graph' else {})}
    assert_each(mixer(tokens), lambda t: mixer_reference(mixer, kind, t), tokens)


@pytest.mark.parametrize('values', [False, True])
@pytest.mark.parametrize('in_chs,out_chs,token_dim,num_heads', [
    *((*shape[:3], 1) for shape in SHAPES), (6, 6, 6, 3), (6, 8, 8, 4), (8, 8, 5, 2), (5, 8, 3, 8), (128, 192, 20, 6)])
def test_projector(in_chs, out_chs, token_dim, num_heads, values):
    projector = build(Projector, in_chs, out_chs, token_dim, num_heads=num_heads, attention_values=values)
    x, tokens = ragged(2, in_chs, 3, 4), ragged(2, 5, token_dim)
    assert_each(projector(x, tokens), lambda x, t: projector_reference(projector, pixels(x), t, num_heads), x, tokens)
    assert hasattr(projector.value, 'conv') == (values or token_dim != out_chs)


@pytest.mark.parametrize('shape,norm', [
    *((shape, 'batchnorm2d') for shape in SHAPES), *((SHAPES[4], norm) for norm in NORMS)], ids=str)
def test_stage_chains_the_equations(shape, norm):
    in_chs, out_chs, token_dim, num_tokens, height, width = shape
    stage = build(
        VTStage, in_chs, out_chs, depth=3, token_dim=token_dim, num_tokens=num_tokens, norm_layer=NORMS[norm],
        last_projector=False)
    x = ragged(2, in_chs, height, width)
    for i, result in enumerate(stage(x)):
        assert_each(result, lambda x, i=i: stage_reference(stage, x)[i], x, tol=1e-8)
    assert norm == 'batchnorm2d' or not any(isinstance(m, nn.BatchNorm2d) for m in stage.modules())


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


# --- training


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


@pytest.mark.parametrize('norm_layer', NORMS.values())
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


def test_logit_norm_is_a_batch_norm_or_nothing():
    assert isinstance(create_logit_norm(5), nn.BatchNorm2d)
    assert isinstance(create_logit_norm(5, 'batchnorm2d'), nn.BatchNorm2d)
    assert isinstance(create_logit_norm(5, nn.SyncBatchNorm), nn.SyncBatchNorm)
    assert create_logit_norm(5, partial(nn.BatchNorm2d, eps=0.25)).eps == 0.25
    assert isinstance(create_logit_norm(5, 'layernorm2d'), nn.Identity)
    assert isinstance(create_logit_norm(5, partial(GroupNorm, num_groups=1)), nn.Identity)


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


# --- precision, devices, what is refused


@pytest.mark.parametrize('name', ['filter', 'recurrent', 'transformer', 'projector', 'first', 'middle'])
@pytest.mark.parametrize('precision', ['float32', 'float16', 'bfloat16', 'autocast'])
@pytest.mark.parametrize('scale', [1, 10])
def test_precision(name, precision, scale):
    part = {
        'filter': partial(build, FilterTokenizer, 192, 96, 16),
        'recurrent': partial(build, RecurrentTokenizer, 192, 96, 16),
        'transformer': partial(build, TokenTransformer, 96),
        'projector': partial(build, Projector, 192, 128, 96),
        'first': partial(build, VTModule, 192, 128, 96, 16),
        'middle': partial(build, VTModule, 192, 128, 96, 16, tokenizer=RecurrentTokenizer),
    }[name](dtype=torch.float32)
    x, tokens = ragged(3, 192, 6, 7), ragged(3, 16, 96, seed=1)
    args = (tokens,) if name == 'transformer' else (x, tokens)
    for m in part.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
            m.reset_running_stats()
    part.train()(*[a.float() for a in args])
    part.eval()
    with torch.no_grad():
        expected = copy.deepcopy(part).double()(*[a * scale for a in args])
        results = run_in_precision(part, tuple(a.float() * scale for a in args), precision)
    # logits grow with the activations, so that sharp softmaxes magnify the rounding of inputs and weights
    tolerance = 0.005 if scale == 1 else 0.2 if name in ('first', 'middle') else 0.06
    tolerance *= {'float32': 1e-3, 'float16': 1}.get(precision, 5 if scale == 1 else 3)
    for result, exp in zip(*((r if isinstance(r, tuple) else (r,)) for r in (results, expected)), strict=True):
        assert result.isfinite().all()
        assert (result.double() - exp).norm() < tolerance * exp.norm()


@pytest.mark.parametrize('module', [
    RecurrentTokenizer(6, 8, 4), VTModule(6, 6, 8, 4, tokenizer=RecurrentTokenizer), TokenModule(8, 4),
    DynamicVTModule(6, 6, 8, 4, tokenizer=RecurrentTokenizer),
    DynamicVTModule(6, 6, 8, 4, tokenizer=FilterTokenizer)], ids=lambda m: type(m).__name__)
def test_modules_after_the_first_need_tokens(module):
    with pytest.raises(ValueError, match=r'tokens .*None'):
        module(torch.randn(1, 6, 2, 2))


@pytest.mark.parametrize('cls,args', [
    (PixelLinear, (4, 6)), (TokenLinear, (4, 6)), (TokenNorm, (4,)), (FilterTokenizer, (4, 6, 3, True)),
    (RecurrentTokenizer, (4, 6, 3)), (ClusteringTokenizer, (4, 6, 3)), (PositionCode, ()), (TokenTransformer, (6,)),
    (GraphMixer, (6, 3)), (LinearMixer, (6, 3)), (Projector, (4, 5, 6)), (VTModule, (4, 5, 6, 3)),
    (DynamicVTModule, (4, 5, 6, 4)), (TokenModule, (6, 3))])
def test_device_and_dtype_reach_everything(cls, args):
    module = cls(*args, device='meta', dtype=torch.bfloat16)
    tensors = [t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()]
    assert tensors and all(t.is_meta and t.dtype == torch.bfloat16 for t in tensors)


@pytest.mark.parametrize('word,make', [
    ('num_tokens', lambda: PoolingTokenizer(4, 8, 5)),
    ('position_code', lambda: PoolingTokenizer(4, 8, 4, position_code=True)),
    ('num_heads', lambda: TokenTransformer(8, num_heads=3)),
    ('num_heads', lambda: TokenTransformer(8, num_heads=8)),
    ('num_heads', lambda: Projector(6, 6, 8, num_heads=4)),
    ('num_heads', lambda: GraphMixer(8, 4, num_heads=2)),
    ('attention_values', lambda: LinearMixer(8, 4, attention_values=True)),
    ('num_tokens', lambda: DynamicVTModule(6, 6, 8, 5, tokenizer=RecurrentTokenizer)),
    ('num_heads', lambda: VTModule(6, 6, 8, 4, projector=partial(Projector, num_heads=4))),
    ('projector', lambda: VTModule(6, 6, 8, 4, projector=False)),
])
def test_illegal_parts(word, make):
    with pytest.raises(ValueError, match=word):
        make()


# --- k-means


def crossed_map():
    """A 4x4 map whose first cell is the mean of two kinds of pixels, each of which has a cell of its own."""
    e = torch.eye(4, dtype=torch.float64)
    quadrants = [[torch.stack([torch.stack([e[0], e[1]]), torch.stack([e[1], e[0]])]), e[0].expand(2, 2, 4)],
                 [e[1].expand(2, 2, 4), e[2].expand(2, 2, 4)]]
    rows = [torch.cat(row, dim=1) for row in quadrants]
    return torch.cat(rows).permute(2, 0, 1)[None]


def blobs():
    """A map whose quadrants hold four well separated kinds of pixels, so that rounding moves none."""
    kinds = torch.eye(4).reshape(4, 2, 2).repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    return (kinds + 0.05 * torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0)))[None]


@pytest.mark.parametrize('num_tokens', [1, 2, 3, 5, 7, 12, 16])
@pytest.mark.parametrize('height,width', [(3, 4), (7, 5), (14, 14)])
def test_kmeans_is_lloyds_algorithm(num_tokens, height, width):
    x = ragged(2, 6, height, width)
    for iterations in (0, 1, 5):
        centroids = KMeans(num_tokens, iterations)(x)
        assert_each(centroids, lambda x, i=iterations: kmeans_reference(x, num_tokens, i), x)
    assert_close(KMeans(num_tokens)(x.contiguous(memory_format=torch.channels_last)), array(centroids))


@pytest.mark.parametrize('num_tokens', range(1, 26))
def test_centroids_start_from_distinct_cells_of_the_map(num_tokens):
    side = math.ceil(math.sqrt(num_tokens))
    x = torch.nn.functional.normalize(ragged(1, 3, side, side), dim=1)
    started = KMeans(num_tokens, iterations=0)(x)[0]
    found = torch.cdist(started, x.flatten(2)[0].T) < 1e-6
    assert (found.sum(1) == 1).all() and (found.sum(0) <= 1).all()


@pytest.mark.parametrize('zero_pixel', [False, True])
def test_cluster_of_no_pixels_or_of_zeros_keeps_its_centroid(zero_pixel):
    x = crossed_map()
    x[..., 3, 3] *= not zero_pixel
    started, moved = KMeans(4, 0)(x)[0], KMeans(4)(x)[0]
    members = (started @ x[0].flatten(1)).argmax(0) == 0
    assert members.any() == zero_pixel and not x[0].flatten(1)[:, members].any()
    torch.testing.assert_close(moved, started)


@pytest.mark.parametrize('num_tokens', [4, 16])
def test_more_clusters_than_pixels(num_tokens):
    x = ragged(2, 3, 1, 2)
    centroids = KMeans(num_tokens)(x)
    torch.testing.assert_close(centroids.norm(dim=-1), torch.ones(2, num_tokens, dtype=torch.float64))
    nearness = (centroids @ torch.nn.functional.normalize(x.flatten(2), dim=1)).amax(1)
    torch.testing.assert_close(nearness, torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize('num_tokens', [1, 4, 7])
@pytest.mark.parametrize('kind', ['constant', 'zeros', 'zero pixels', 'zero half', 'cancelling'])
def test_degenerate_maps_give_no_nan(kind, num_tokens):
    x = ragged(2, 6, 6, 6).float()
    if kind == 'constant':
        x = x[..., :1, :1].expand_as(x).clone()
        expected = torch.nn.functional.normalize(x[:, :, 0, :1], dim=1).transpose(1, 2)
        torch.testing.assert_close(KMeans(num_tokens)(x), expected.expand(-1, num_tokens, -1))
    elif kind == 'zeros':
        x = torch.zeros_like(x)
        assert not KMeans(num_tokens)(x).any()
    elif kind == 'zero pixels':
        x[..., ::2, ::3] = 0
    elif kind == 'zero half':
        x[..., :3] = 0
    else:
        x[..., 3:] = -x[..., :3]
    assert KMeans(num_tokens)(x).isfinite().all()
    tokenizer = build(ClusteringTokenizer, 6, 8, num_tokens, dtype=torch.float32).train()
    x.requires_grad_()
    tokens = tokenizer(x)
    tokens.square().sum().backward()
    assert tokens.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in tokenizer.parameters())


def test_gradient_goes_through_the_logits_and_not_through_the_centroids():
    tokenizer = build(ClusteringTokenizer, 6, 8, 4)
    x = ragged(2, 6, 5, 4).requires_grad_()
    centroids = tokenizer.kmeans(x)
    assert not centroids.requires_grad

    def gradient(tokens):
        return torch.autograd.grad((tokens * ragged(*tokens.shape, seed=1)).sum(), x)[0]

    pixels = x.flatten(2).transpose(1, 2)
    logits = centroids @ pixels.transpose(1, 2)
    a = torch.softmax(tokenizer.logit_norm(logits.unsqueeze(2)).squeeze(2), dim=-1)
    expected = gradient(tokenizer.value(a @ pixels))
    result = gradient(tokenizer(x))
    assert result.abs().max() > 1e-3
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize('precision', ['autocast', 'bfloat16', 'float16'])
def test_kmeans_in_low_precision(precision):
    x = blobs()
    expected = KMeans(4)(x)
    assert (expected - torch.eye(4)).abs().max() < 0.1
    if precision == 'autocast':
        with torch.autocast('cpu', torch.bfloat16):
            result = KMeans(4)(x)
    else:
        result = KMeans(4)(x.to(getattr(torch, precision)))
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize('position_code', [False, True])
def test_clustering_tokenizer_trains_under_autocast(position_code):
    tokenizer = build(ClusteringTokenizer, 4, 8, 4, position_code, dtype=torch.float32)
    expected = tokenizer(blobs())
    with torch.autocast('cpu', torch.bfloat16):
        tokens = tokenizer(blobs())
        torch.testing.assert_close(tokens.float(), expected, rtol=0.1, atol=0.1)
        loss = tokenizer.train()(blobs().repeat(2, 1, 1, 1)).float().square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())


def test_clustering_tokenizer_compiles():
    torch._dynamo.reset()
    tokenizer = build(ClusteringTokenizer, 6, 8, 7)
    compiled = torch.compile(tokenizer, backend='aot_eager', fullgraph=True)
    x = ragged(2, 6, 7, 5).requires_grad_()
    tokens, expected = compiled(x), tokenizer(x)
    torch.testing.assert_close(tokens, expected)
    for result, exp in zip(*(torch.autograd.grad(t.square().sum(), [x, *tokenizer.parameters()], allow_unused=True)
                             for t in (tokens, expected)), strict=True):
        torch.testing.assert_close(result, exp)
