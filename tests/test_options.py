"""Options of the VT-ResNets: the paper's ablations and its first version, each part against NumPy with float64."""
import itertools
import json
import math
from functools import cache

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
from helpers import needs_timm_that_reads_folders
from paper_order import in_paper_order
from test_layers import array, assert_close, build, mapped, matrix, normed, pixels, softmax
from torch.utils.flop_counter import FlopCounterMode

import vt_zoo  # noqa: F401
from vt_zoo.analysis.records import capture_tokens
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
)
from vt_zoo.layers.kmeans import KMeans
from vt_zoo.layers.position_code import PositionCode
from vt_zoo.layers.tokenizer import LearnedFilters, token_grid

TINY = {
    'layers': (1, 1, 1, 3), 'channels': (8, 8, 16), 'feature_dim': 24, 'token_dim': 32, 'num_tokens': 4,
    'num_classes': 5}
MAPS = [(1, 1), (1, 5), (2, 2), (3, 4), (7, 5), (8, 8), (14, 14), (9, 21)]

SINGLE = [
    {}, {'tokenizer': 'pooling'}, {'tokenizer': 'clustering'}, {'recurrent': False}, {'token_mixer': 'graph'},
    {'token_mixer': 'none'}, {'num_tokens': 1}, {'num_tokens': 7}, {'projector': False}, {'last_projector': True},
    {'dynamic_tokens': True}, {'position_code': True}, {'num_heads': 4}, {'attention_values': True}]
COMBINED = [
    {'tokenizer': 'clustering', 'dynamic_tokens': True, 'position_code': True, 'num_heads': 2,
     'attention_values': True, 'last_projector': True, 'num_tokens': 6},
    {'recurrent': False, 'token_mixer': 'graph', 'position_code': True, 'last_projector': True},
    {'tokenizer': 'pooling', 'num_tokens': 8, 'num_heads': 2, 'attention_values': True},
    {'tokenizer': 'clustering', 'projector': False, 'token_mixer': 'none', 'position_code': True, 'num_tokens': 5},
    {'dynamic_tokens': True, 'token_mixer': 'graph', 'position_code': True, 'token_dim': 24},
]


def is_legal(o):
    """Whether the issue allows a combination."""
    return (
        (o['recurrent'] or o['tokenizer'] == 'filter')
        and not (o['tokenizer'] == 'pooling' and o['position_code'])
        and not (o['dynamic_tokens'] and (o['tokenizer'] == 'pooling' or not o['recurrent']))
        and not (not o['projector'] and (o['dynamic_tokens'] or not o['recurrent']))
        and not (o['token_mixer'] != 'transformer' and (o['num_heads'] > 1 or o['attention_values'])))


CHOICES = {
    'tokenizer': ['filter', 'pooling', 'clustering'],
    'recurrent': [True, False],
    'token_mixer': ['transformer', 'graph', 'none'],
    'projector': [True, False],
    'dynamic_tokens': [False, True],
    'position_code': [False, True],
    'num_heads': [1, 2],
    'attention_values': [False, True],
}
LEGAL = [o for o in (dict(zip(CHOICES, values)) for values in itertools.product(*CHOICES.values())) if is_legal(o)]
IN_PAIRS = LEGAL[2::3]  # have each pair of values that is legal


def name(options):
    return ','.join(f'{k}={v}' for k, v in options.items() if k not in CHOICES or v != CHOICES[k][0]) or 'base'


def images(batch=4, height=32, width=48, seed=0, dtype=torch.float32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ragged(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tiny(**options):
    """A model whose norms have random affine values, so that no branch is zero; one training pass sets statistics."""
    torch.manual_seed(0)
    model = timm.create_model('test_vt_resnet', **{**TINY, **options})
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.uniform_(-0.5, 0.5)
                m.momentum = None
    return model.train()


@cache
def _trained_state(options):
    model = tiny(**dict(options))
    with torch.no_grad():
        model(images(8, 64, 64, seed=1).to(next(model.parameters()).dtype))
    return model.state_dict()


def calibrated(**options):
    """`tiny` with statistics, in eval mode."""
    model = tiny(**options).eval()
    model.load_state_dict(_trained_state(tuple(options.items())))
    return model


# --- references


def bilinear(plane, rows, cols):
    """Bilinear interpolation of one channel (H, W), align_corners=False, without antialiasing."""
    height, width = plane.shape
    result = np.empty((rows, cols))
    for r in range(rows):
        y = max((r + 0.5) * height / rows - 0.5, 0)
        y0 = int(y)
        y1 = min(y0 + 1, height - 1)
        for c in range(cols):
            x = max((c + 0.5) * width / cols - 0.5, 0)
            x0 = int(x)
            x1 = min(x0 + 1, width - 1)
            top = plane[y0, x0] * (1 - x + x0) + plane[y0, x1] * (x - x0)
            bottom = plane[y1, x0] * (1 - x + x0) + plane[y1, x1] * (x - x0)
            result[r, c] = top * (1 - y + y0) + bottom * (y - y0)
    return result


def pooling_reference(x, rows, cols):
    """(C, H, W) -> (L, C)."""
    return np.stack([bilinear(plane, rows, cols).ravel() for plane in x], axis=1)


def unit(v):
    return v / max(np.linalg.norm(v), 1e-12)


def kmeans_reference(x, num_tokens, iterations=5):
    """Lloyd's algorithm on the unit pixels of (C, H, W) -> (L, C)."""
    side = math.ceil(math.sqrt(num_tokens))
    cells = pooling_reference(x, side, side)
    centroids = [unit(cells[i * side ** 2 // num_tokens]) for i in range(num_tokens)]
    points = [unit(p) for p in pixels(x)]
    for _ in range(iterations):
        clusters = [[] for _ in centroids]
        for p in points:
            clusters[int(np.argmax([p @ c for c in centroids]))].append(p)
        centroids = [unit(np.mean(members, axis=0)) if members else c for members, c in zip(clusters, centroids)]
    return np.stack(centroids)


def position_reference(m, coefficients):
    """Code of token coefficients (L, H, W) -> (L, 64)."""
    height, width = coefficients.shape[1:]
    cells = np.stack([bilinear(plane, 8, 8).ravel() for plane in coefficients]) * (height * width)
    return mapped(m.linear, cells)


def tokenizer_reference(m, kind, x, tokens=None):
    """(C, H, W) and (L, CT) -> (L, C), or (L, C + 64) with a position code."""
    p = pixels(x)
    if kind == 'pooling':
        return pooling_reference(x, *m.grid)
    if kind == 'filter':
        logits = p @ matrix(m.filters)
    elif kind == 'clustering':
        logits = p @ kmeans_reference(x, m.logit_norm.num_features).T
    else:
        w_r = mapped(m.query, tokens) + array(m.filters.weight)
        logits = (p @ matrix(m.key.conv).T) @ w_r.T / np.sqrt(p.shape[1])
    a = softmax(normed(m.logit_norm, logits), 0)
    result = a.T @ mapped(m.value, p)
    if m.position_code is None:
        return result
    return np.concatenate([result, position_reference(m.position_code, a.T.reshape(-1, *x.shape[1:]))], axis=1)


def attention_reference(query, key, value, num_heads):
    heads = zip(*(np.split(t, num_heads, axis=1) for t in (query, key, value)))
    return np.concatenate([softmax(q @ k.T / np.sqrt(q.shape[1]), 1) @ v for q, k, v in heads], axis=1)


def transformer_reference(m, tokens, num_heads=1):
    mixed = attention_reference(mapped(m.key, tokens), mapped(m.query, tokens), mapped(m.value, tokens), num_heads)
    tokens = tokens + normed(m.norm.norm, mixed)
    return tokens + mapped(m.fc2, np.maximum(mapped(m.fc1, tokens), 0))


def mixer_reference(m, kind, tokens, num_heads=1):
    if kind == 'transformer':
        return transformer_reference(m, tokens, num_heads)
    return mapped(m.linear, array(m.adjacency) @ tokens if kind == 'graph' else tokens)


def projector_reference(m, x, tokens, num_heads=1):
    """(C_in, H, W) -> (C_out, H, W)."""
    p = pixels(x)
    query = p @ matrix(m.query.conv).T
    projection = attention_reference(query, mapped(m.key, tokens), mapped(m.value, tokens), num_heads)
    return (mapped(m.skip, p) + projection).T.reshape(-1, *x.shape[1:])


def stage_reference(modules, x, tokenizer='filter', recurrent=True, token_mixer='transformer', projector=True,
                    last_projector=False, dynamic_tokens=False, num_heads=1, **_):
    """The whole VT stage on one map (C, H, W), by the options and not by the classes of the modules."""
    tokens = None
    for i, m in enumerate(modules):
        kind = tokenizer if i == 0 or tokenizer == 'pooling' else 'recurrent' if recurrent else 'filter'
        if i == 0 or projector:
            guide, kept = tokens, None
            if i > 0 and dynamic_tokens:
                guide, kept = np.split(tokens, 2)
            tokens = mapped(m.embed, tokenizer_reference(m.tokenizer, kind, x, guide))
            if kept is not None:
                tokens = np.concatenate([tokens, kept])
        tokens = mixer_reference(m.transformer, token_mixer, tokens, num_heads)
        if projector and (i < len(modules) - 1 or last_projector):
            x = projector_reference(m.projector, x, tokens, num_heads)
    return x, tokens


def assert_each(result, reference, *inputs):
    """Each image of a batch is its reference."""
    assert_close(result.flatten(2), np.stack([
        (lambda r: r.reshape(r.shape[0], -1) if r.ndim == 3 else r)(reference(*(array(t[b]) for t in inputs)))
        for b in range(len(inputs[0]))]))


# --- parts


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


@pytest.mark.parametrize('num_tokens', [1, 2, 3, 5, 7, 12, 16])
@pytest.mark.parametrize('height,width', [(3, 4), (7, 5), (14, 14)])
def test_kmeans_is_lloyds_algorithm(num_tokens, height, width):
    x = ragged(2, 6, height, width)
    for iterations in (0, 1, 5):
        centroids = KMeans(num_tokens, iterations)(x)
        assert_each(centroids, lambda x, i=iterations: kmeans_reference(x, num_tokens, i), x)
    assert_close(KMeans(num_tokens)(x), array(centroids))


@pytest.mark.parametrize('position_code', [False, True])
@pytest.mark.parametrize('num_tokens', [1, 4, 7])
@pytest.mark.parametrize('height,width', [m for m in MAPS if min(m) > 1])  # one row has the same cells twice: ties
def test_clustering_tokenizer(num_tokens, height, width, position_code):
    tokenizer = build(ClusteringTokenizer, 20, 9, num_tokens, position_code)
    x = ragged(2, 20, height, width)
    tokens = tokenizer(x, ragged(2, num_tokens, 9))
    assert tokens.shape == (2, num_tokens, tokenizer.out_chs) and tokenizer.out_chs == (84 if position_code else 20)
    assert_each(tokens, lambda x: tokenizer_reference(tokenizer, 'clustering', x), x)


@pytest.mark.parametrize('height,width', MAPS)
def test_position_code(height, width):
    code = build(PositionCode)
    attn = torch.softmax(ragged(2, 5, height * width), dim=-1).unflatten(2, (height, width))
    result = code(attn)
    assert result.shape == (2, 5, 64)
    assert_each(result, lambda a: position_reference(code, a), attn)


def test_position_code_of_uniform_coefficients_does_not_depend_on_the_size():
    code = build(PositionCode)
    results = [code(torch.full((1, 2, h, w), 1 / (h * w), dtype=torch.float64)) for h, w in MAPS]
    for result in results:
        assert_close(result, array(results[0]))
    corner = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    corner[:, 0, 0, 0] = corner[:, 1, 7, 7] = 1
    assert not torch.allclose(*code(corner)[0])


@pytest.mark.parametrize('cls,kind', [(FilterTokenizer, 'filter'), (RecurrentTokenizer, 'recurrent')])
@pytest.mark.parametrize('height,width', MAPS)
def test_position_code_is_appended(cls, kind, height, width):
    tokenizer = build(cls, 20, 9, 3, position_code=True)
    x, tokens = ragged(2, 20, height, width), ragged(2, 3, 9)
    result = tokenizer(x, tokens)
    assert result.shape == (2, 3, tokenizer.out_chs) and tokenizer.out_chs == 84
    assert_each(result, lambda x, t: tokenizer_reference(tokenizer, kind, x, t), x, tokens)


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
@pytest.mark.parametrize('dim,num_heads', [(1, 1), (9, 1), (8, 2), (8, 4), (24, 3), (64, 8), (64, 32)])
def test_transformer_with_heads_and_values(dim, num_heads, values):
    transformer = build(TokenTransformer, dim, num_heads=num_heads, attention_values=values)
    tokens = ragged(2, 7, dim)
    assert_each(transformer(tokens), lambda t: transformer_reference(transformer, t, num_heads), tokens)
    weights = {n for n, p in transformer.named_parameters() if p.ndim > 1}
    assert ('value.conv.weight' in weights) == values
    assert not values or transformer.value.conv.weight.shape == (dim, dim)


@pytest.mark.parametrize('values', [False, True])
@pytest.mark.parametrize('in_chs,out_chs,token_dim,num_heads', [
    (6, 6, 6, 1), (6, 6, 6, 3), (6, 8, 8, 4), (8, 8, 5, 2), (5, 8, 3, 8), (128, 192, 20, 6)])
def test_projector_with_heads_and_values(in_chs, out_chs, token_dim, num_heads, values):
    projector = build(Projector, in_chs, out_chs, token_dim, num_heads=num_heads, attention_values=values)
    x, tokens = ragged(2, in_chs, 3, 4), ragged(2, 5, token_dim)
    assert_each(projector(x, tokens), lambda x, t: projector_reference(projector, x, t, num_heads), x, tokens)
    assert hasattr(projector.value, 'conv') == (values or token_dim != out_chs)


@pytest.mark.parametrize('position_code', [False, True])
@pytest.mark.parametrize('projector', [False, True])
@pytest.mark.parametrize('num_tokens', [2, 6])
def test_dynamic_module(num_tokens, projector, position_code):
    module = build(
        DynamicVTModule, 20, 28, 9, num_tokens, tokenizer=RecurrentTokenizer, projector=projector,
        position_code=position_code)
    x, tokens = ragged(2, 20, 3, 4), ragged(2, num_tokens, 9)

    def reference(x, tokens):
        guide, kept = tokens[:num_tokens // 2], tokens[num_tokens // 2:]
        new = mapped(module.embed, tokenizer_reference(module.tokenizer, 'recurrent', x, guide))
        return transformer_reference(module.transformer, np.concatenate([new, kept]))

    x_out, tokens_out = module(x, tokens)
    assert_each(tokens_out, reference, x, tokens)
    if projector:
        assert_each(x_out, lambda x, t: projector_reference(module.projector, x, reference(x, t)), x, tokens)
    else:
        assert x_out is x
    assert module.tokenizer.logit_norm.num_features == num_tokens // 2


def test_dynamic_module_keeps_the_second_half():
    module = build(DynamicVTModule, 20, 28, 9, 6, tokenizer=RecurrentTokenizer)
    x, tokens = ragged(2, 20, 3, 4), ragged(2, 6, 9)
    made = module.tokenize(x, tokens)
    assert torch.equal(made[:, 3:], tokens[:, 3:])
    guided = module.tokenize(x, torch.cat([tokens[:, :3], tokens[:, 3:] + 1], 1))
    assert torch.equal(guided[:, :3], made[:, :3])
    assert not torch.allclose(module.tokenize(x, torch.cat([tokens[:, :3] + 1, tokens[:, 3:]], 1))[:, :3], made[:, :3])


@pytest.mark.parametrize('kind,cls', [('transformer', TokenTransformer), ('graph', GraphMixer), ('none', LinearMixer)])
def test_token_module(kind, cls):
    module = build(TokenModule, 8, 5, cls)
    x, tokens = ragged(2, 6, 3, 4), ragged(2, 5, 8)
    x_out, tokens_out = module(x, tokens)
    assert x_out is x and module.projector is None
    assert_each(tokens_out, lambda t: mixer_reference(module.transformer, kind, t), tokens)


@pytest.mark.parametrize('module', [
    TokenModule(8, 4), DynamicVTModule(6, 6, 8, 4, tokenizer=RecurrentTokenizer),
    DynamicVTModule(6, 6, 8, 4, tokenizer=FilterTokenizer)], ids=lambda m: type(m).__name__)
def test_modules_after_the_first_need_tokens(module):
    with pytest.raises(ValueError, match=r'tokens .*None'):
        module(torch.randn(1, 6, 2, 2))


@pytest.mark.parametrize('cls,args', [
    (ClusteringTokenizer, (4, 6, 3)), (FilterTokenizer, (4, 6, 3, True)), (PositionCode, ()), (GraphMixer, (6, 3)),
    (LinearMixer, (6, 3)), (DynamicVTModule, (4, 5, 6, 4)), (TokenModule, (6, 3))])
def test_device_and_dtype_reach_everything(cls, args):
    module = cls(*args, device='meta', dtype=torch.bfloat16)
    tensors = [t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()]
    assert tensors and all(t.is_meta and t.dtype == torch.bfloat16 for t in tensors)


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


def test_kmeans_is_deterministic():
    x = images(3, 12, 9)
    kmeans = KMeans(7)
    torch.manual_seed(0)
    expected = kmeans(x)
    torch.manual_seed(1)
    assert torch.equal(kmeans.eval()(x), expected)
    assert torch.equal(KMeans(7)(x.clone()), expected)
    assert len(kmeans.state_dict()) == 0


def test_kmeans_of_an_image_does_not_depend_on_its_batch():
    x = ragged(3, 6, 7, 5)
    expected = KMeans(5)(x)
    others = KMeans(5)(torch.cat([x[:1], x[1:].flip(1)]))
    assert_close(KMeans(5)(x[:1]), array(expected[:1]))
    assert_close(others[:1], array(expected[:1]))
    assert not torch.allclose(others[1:], expected[1:])


def test_kmeans_of_channels_last():
    x = ragged(2, 6, 7, 5)
    assert_close(KMeans(5)(x.contiguous(memory_format=torch.channels_last)), array(KMeans(5)(x)))


@pytest.mark.parametrize('num_tokens', [1, 2, 3, 5, 6, 7, 10, 16, 17])
def test_centroids_have_unit_length(num_tokens):
    x = images(2, 9, 7) * torch.tensor([1e-3, 1.])[:, None, None, None]
    for iterations in (0, 1, 5):
        centroids = KMeans(num_tokens, iterations)(x)
        assert centroids.shape == (2, num_tokens, 3)
        torch.testing.assert_close(centroids.norm(dim=-1), torch.ones(2, num_tokens))


@pytest.mark.parametrize('num_tokens', range(1, 26))
def test_centroids_start_from_distinct_cells_of_the_map(num_tokens):
    side = math.ceil(math.sqrt(num_tokens))
    x = torch.nn.functional.normalize(ragged(1, 3, side, side), dim=1)
    started = KMeans(num_tokens, iterations=0)(x)[0]
    found = torch.cdist(started, x.flatten(2)[0].T) < 1e-6
    assert (found.sum(1) == 1).all() and (found.sum(0) <= 1).all()


def test_kmeans_sees_directions_only():
    x = ragged(2, 6, 7, 5)
    assert_close(KMeans(5)(x * 1000), array(KMeans(5)(x)))
    assert not torch.allclose(KMeans(5)(x + 1), KMeans(5)(x))


def test_each_iteration_brings_centroids_nearer():
    x = ragged(2, 6, 14, 14)
    points = torch.nn.functional.normalize(x.flatten(2), dim=1)
    nearness = [(KMeans(9, i)(x) @ points).amax(1).mean().item() for i in range(8)]
    assert nearness == sorted(nearness) and nearness[5] > nearness[0] + 0.01


def test_empty_cluster_keeps_its_centroid():
    started, moved = KMeans(4, 0)(crossed_map())[0], KMeans(4)(crossed_map())[0]
    e = torch.eye(4, dtype=torch.float64)
    mean = (e[0] + e[1]) / math.sqrt(2)
    torch.testing.assert_close(started, torch.stack([mean, e[0], e[1], e[2]]))
    nearest = (started @ crossed_map()[0].flatten(1)).argmax(0)
    assert set(nearest.tolist()) == {1, 2, 3}
    torch.testing.assert_close(moved, started)


def test_cluster_of_nothing_but_zero_pixels_keeps_its_centroid():
    x = crossed_map()
    x[..., 3, 3] = 0
    started, moved = KMeans(4, 0)(x)[0], KMeans(4)(x)[0]
    members = (started @ x[0].flatten(1)).argmax(0) == 0
    assert members.any() and not x[0].flatten(1)[:, members].any()
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


@pytest.mark.slow
@pytest.mark.parametrize('options', [*SINGLE, *COMBINED], ids=name)
def test_models_compile(options):
    torch._dynamo.reset()
    model = calibrated(**options)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-4)


# --- whole models


def test_legal_combinations_are_many():
    assert len(LEGAL) == len({name(o) for o in LEGAL}) == 96
    for key, values in CHOICES.items():
        assert {o[key] for o in LEGAL} == set(values)
    pairs, all_pairs = (
        {pair for o in options for pair in itertools.combinations(o.items(), 2)} for options in (IN_PAIRS, LEGAL))
    assert pairs == all_pairs


@pytest.mark.parametrize('options', [
    pytest.param(o, marks=[] if o in IN_PAIRS else pytest.mark.slow) for o in LEGAL], ids=name)
def test_legal_combination(options):
    model = tiny(dtype=torch.float64, **options)
    model(images(dtype=torch.float64)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

    x = images(height=48, width=64, dtype=torch.float64)
    with torch.no_grad():
        expected = model.eval()(x)
        alone = model(x[1:2])
    assert expected.shape == (4, 5) and expected.isfinite().all() and expected.std(0).min() > 1e-3
    torch.testing.assert_close(alone, expected[1:2], rtol=1e-9, atol=1e-9)

    reloaded = timm.create_model('test_vt_resnet', dtype=torch.float64, **TINY, **options).eval()
    saved = safetensors.torch.save(model.state_dict())
    reloaded.load_state_dict(safetensors.torch.load(saved), strict=True)
    with torch.no_grad():
        assert torch.equal(reloaded(x), expected)


@pytest.mark.parametrize('options', [*SINGLE, *COMBINED], ids=name)
def test_stage_is_the_chain_of_references(options):
    model = calibrated(dtype=torch.float64, **options)
    for m in model.modules():
        if isinstance(m, GraphMixer):
            m.adjacency.data += 0.3 * ragged(*m.adjacency.shape)
    x = ragged(2, 16, 3, 4).relu()
    with torch.no_grad():
        x_out, tokens = model.vt_stage(x)
    for i, result in enumerate((x_out, tokens)):
        assert_each(result, lambda x, i=i: stage_reference(model.vt_stage, x, **options)[i], x)


@pytest.mark.parametrize('options', [*SINGLE, *COMBINED], ids=name)
def test_options_reach_every_module(options):
    model = timm.create_model('test_vt_resnet', drop_path_rate=0.4, **{**TINY, **options}).eval()
    stage = model.vt_stage
    codes = [n for n, m in stage.named_modules() if isinstance(m, PositionCode)]
    with_code = [i for i in range(3) if options.get('position_code') and (i == 0 or options.get('projector', True))]
    assert codes == [f'{i}.tokenizer.position_code' for i in with_code]
    if options.get('token_mixer', 'transformer') == 'transformer':
        heads = options.get('num_heads', 1)
        assert all(m.transformer.num_heads == heads for m in stage)
        assert all(m.projector is None or m.projector.num_heads == heads for m in stage)
        assert all(hasattr(m.transformer.value, 'conv') == options.get('attention_values', False) for m in stage)
        assert [m.transformer.drop_path.drop_prob for m in stage] == pytest.approx([0.24, 0.32, 0.4])
    x = images(2, 48, 64)
    with torch.no_grad():
        tokens, maps = model.forward_intermediates(x)
        assert torch.equal(model.forward_head(tokens), model(x))
    assert tokens.shape == (2, options.get('num_tokens', 4), options.get('token_dim', 32))
    assert maps[-1].shape == (2, 24 if options.get('projector', True) else 16, 2, 2)
    assert [m.shape[1] for m in maps] == [info['num_chs'] for info in model.feature_info]


@pytest.mark.parametrize('options', [*SINGLE, *COMBINED], ids=name)
def test_every_parameter_matters(options):
    model = calibrated(dtype=torch.float64, **options)
    tokens, maps = model.forward_intermediates(images(height=64, width=96, dtype=torch.float64))
    loss = model.forward_head(tokens).square().mean()
    if options.get('last_projector'):
        loss = loss + maps[-1].square().mean()
    loss.backward()
    # these shift logits by what is constant along their softmax
    cancelling = ('logit_norm.bias', 'transformer.query.norm.bias', 'projector.key.norm.bias')
    one_token = (
        '.transformer.query.', '.transformer.key.', '.projector.query.', '.projector.key.'
    ) if options.get('num_tokens') == 1 else ()
    for n, p in model.named_parameters():
        without = n.endswith(cancelling) or any(part in n for part in one_token)
        assert (p.grad.abs().max() > 1e-9) != without, n


@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning', 'ignore:.*torch.jit:DeprecationWarning')
@pytest.mark.parametrize('options', [
    *(pytest.param({'layers': (1, 1, 1, 2), **o}, marks=pytest.mark.slow) for o in SINGLE), *COMBINED], ids=name)
def test_script_and_trace_give_what_eager_gives(options):
    model = calibrated(**options)
    x = images(3, 65, 40)
    with torch.no_grad():
        expected = model(x)
        for compiled in (torch.fx.symbolic_trace(model), torch.jit.script(model)):
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('options', [
    o for o in [*SINGLE, *COMBINED] if o.get('projector', True)], ids=name)
def test_features_only(options):
    model = calibrated(features_only=True, output_stride=16, **options)
    with torch.no_grad():
        maps = model(images(2, 48, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 24, 32), (8, 12, 16), (8, 6, 8), (16, 3, 4), (24, 3, 4)]
    assert model.feature_info.channels() == [64, 8, 8, 16, 24]
    assert all(m.projector is not None for m in model.model.vt_stage)


@pytest.mark.parametrize('options', [{}, {'out_indices': (0, 1)}, {'tokenizer': 'pooling'}], ids=str)
def test_features_only_needs_a_projector(options):
    with pytest.raises(ValueError, match=r'features_only=True .*projector=False'):
        timm.create_model('test_vt_resnet', features_only=True, projector=False, **TINY, **options)


@needs_timm_that_reads_folders
@pytest.mark.parametrize('options', [
    *COMBINED, {'tokenizer': 'pooling', 'num_tokens': 6, 'token_mixer': 'graph'}], ids=name)
def test_saved_model_keeps_its_arguments(options, tmp_path):
    model = calibrated(**options)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    saved = json.loads((tmp_path / 'config.json').read_text())['model_args']
    assert {k: saved[k] for k in options} == options
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))


@pytest.mark.parametrize('num_tokens', [1, 2, 3, 5, 11, 16, 17])
@pytest.mark.parametrize('tokenizer', ['filter', 'clustering'])
def test_any_number_of_tokens(tokenizer, num_tokens):
    model = calibrated(tokenizer=tokenizer, num_tokens=num_tokens, token_mixer='graph')
    with torch.no_grad():
        assert model.forward_features(images()).shape == (4, num_tokens, 32)
        assert model(images()).isfinite().all()


# --- what is refused


@pytest.mark.parametrize('word,options', [
    ('token_mixer', {'token_mixer': 'gcn'}),
    ('tokenizer', {'tokenizer': 'kmeans'}),
    ('recurrent', {'recurrent': False, 'tokenizer': 'pooling'}),
    ('recurrent', {'recurrent': False, 'tokenizer': 'clustering'}),
    ('dynamic_tokens', {'dynamic_tokens': True, 'tokenizer': 'pooling'}),
    ('dynamic_tokens', {'dynamic_tokens': True, 'recurrent': False}),
    ('dynamic_tokens', {'dynamic_tokens': True, 'num_tokens': 5}),
    ('dynamic_tokens', {'dynamic_tokens': True, 'num_tokens': 1}),
    ('projector', {'projector': False, 'dynamic_tokens': True}),
    ('projector', {'projector': False, 'recurrent': False}),
    ('projector', {'projector': False, 'last_projector': True}),
    ('projector', {'projector': False, 'features_only': True}),
    ('num_tokens', {'tokenizer': 'pooling', 'num_tokens': 5}),
    ('num_tokens', {'tokenizer': 'pooling', 'num_tokens': 7}),
    ('num_tokens', {'tokenizer': 'pooling', 'num_tokens': 10}),
    ('pooling', {'tokenizer': 'pooling', 'num_tokens': 5}),
    ('num_tokens', {'num_tokens': 0}),
    ('position_code', {'position_code': True, 'tokenizer': 'pooling'}),
    ('num_heads', {'num_heads': 3}),
    ('num_heads', {'num_heads': 32}),
    ('num_heads', {'num_heads': 2, 'feature_dim': 25}),
    ('num_heads', {'num_heads': 2, 'token_dim': 9}),
    ('num_heads', {'num_heads': 0}),
    ('num_heads', {'num_heads': -1}),
    ('num_heads', {'num_heads': 1.5}),
    ('num_heads', {'num_heads': True}),
    ('num_heads', {'num_heads': 2, 'token_mixer': 'graph'}),
    ('num_heads', {'num_heads': 2, 'token_mixer': 'none'}),
    ('attention_values', {'attention_values': True, 'token_mixer': 'graph'}),
    ('attention_values', {'attention_values': True, 'token_mixer': 'none'}),
], ids=str)
def test_illegal_combination(word, options):
    with pytest.raises(ValueError) as error:
        timm.create_model('test_vt_resnet', device='meta', **{**TINY, **options})
    message = str(error.value)
    assert word in message and ' ' in message and 'got' in message


@pytest.mark.parametrize('word,make', [
    ('num_tokens', lambda: PoolingTokenizer(4, 8, 5)),
    ('position_code', lambda: PoolingTokenizer(4, 8, 4, position_code=True)),
    ('num_heads', lambda: TokenTransformer(8, num_heads=3)),
    ('num_heads', lambda: TokenTransformer(8, num_heads=8)),
    ('num_heads', lambda: Projector(6, 6, 8, num_heads=4)),
    ('num_heads', lambda: GraphMixer(8, 4, num_heads=2)),
    ('attention_values', lambda: LinearMixer(8, 4, attention_values=True)),
    ('num_tokens', lambda: DynamicVTModule(6, 6, 8, 5, tokenizer=RecurrentTokenizer)),
    ('num_heads', lambda: VTModule(6, 6, 8, 4, num_heads=4)),
])
def test_illegal_parts(word, make):
    with pytest.raises(ValueError, match=word):
        make()


# --- counts


@pytest.mark.parametrize('options,r18,r34', [
    ({}, (1578.95, 11.64), (3299.01, 21.84)),
    ({'tokenizer': 'pooling'}, (1549.69, 11.03), (3245.30, 20.64)),
    ({'tokenizer': 'clustering'}, (1578.95, 11.64), (3299.01, 21.84)),
    ({'recurrent': False}, (1564.14, 11.09), (3269.39, 20.74)),
    ({'token_mixer': 'none'}, (1527.83, 8.49), (3222.33, 17.12)),
    ({'token_mixer': 'graph'}, (1528.36, 8.49), (3223.12, 17.12)),
    ({'num_tokens': 32}, (1710.97, 11.64), (3514.13, 21.84)),
    ({'num_tokens': 64}, (1979.74, 11.65), (3951.45, 21.85)),
    ({'projector': False}, (1497.23, 9.33), (3158.04, 17.33)),
], ids=lambda o: name(o) if isinstance(o, dict) else '')
@pytest.mark.parametrize('depth', [18, 34])
def test_counts_are_those_of_the_ablation_table(depth, options, r18, r34):
    model = in_paper_order(timm.create_model(f'vt_resnet{depth}', device='meta', **options).eval())
    for m in model.modules():
        if isinstance(m, KMeans):
            m.iterations = 0
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device='meta'))
    multiply_adds, weights = r18 if depth == 18 else r34
    assert counter.get_total_flops() / 2e6 == pytest.approx(multiply_adds, rel=1e-3)
    learned = sum(m.weight.numel() for m in model.modules() if isinstance(m, LearnedFilters))  # not in the paper
    ours = sum(p.numel() for p in model.parameters() if p.ndim > 1) - learned
    assert ours / 1e6 == pytest.approx(weights, rel=1e-3)


@pytest.mark.parametrize('options', [*SINGLE, *COMBINED], ids=name)
def test_the_papers_order_of_computation_gives_the_same(options):
    model = calibrated(**options).double()
    x = images().double()
    with torch.no_grad():
        tokens, maps = model.forward_intermediates(x)
        others, other_maps = in_paper_order(model).forward_intermediates(x)
    for result, expected in zip([tokens, *maps], [others, *other_maps], strict=True):
        assert (result - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize('options, missing', [
    ({'num_heads': 2, 'attention_values': True}, {}),
    ({'tokenizer': 'pooling'}, {'attention': 2}),
    ({'tokenizer': 'clustering'}, {}),
    ({'token_mixer': 'graph'}, {'relation': 2}),
    ({'projector': False}, {'attention': 1, 'projection': 2}),
    ({'dynamic_tokens': True, 'position_code': True}, {}),
], ids=str)
def test_capture_of_every_option(options, missing):
    model = timm.create_model('test_vt_resnet', **options).eval()
    records = capture_tokens(model, torch.randn(2, 3, 48, 64))
    sizes = {'attention': (3, 4), 'relation': (16,), 'projection': (3, 4)}
    for name, size in sizes.items():
        maps = [m for m in (getattr(r, name) for r in records) if m is not None]
        assert len(records) - len(maps) == missing.get(name, 1 if name == 'projection' else 0)
        for m in maps:
            assert m.shape[0] == 2 and m.shape[2:] == size
            over = 1 if name == 'projection' else tuple(range(2, m.ndim))
            torch.testing.assert_close(m.sum(over), torch.ones_like(m.sum(over)))
