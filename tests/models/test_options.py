"""Options of the VT-ResNets: the paper's ablations and its first version, against NumPy with float64."""
import itertools
import json

import pytest
import safetensors.torch
import timm
import torch
from helpers import COMBINED, SINGLE, TINY, calibrated, images, name, needs_timm_that_reads_folders, ragged
from paper_order import in_paper_order
from reference import assert_each, stage_reference
from torch.utils.flop_counter import FlopCounterMode

import vt_zoo  # noqa: F401
from vt_zoo.analysis.records import capture_tokens
from vt_zoo.layers import GraphMixer
from vt_zoo.layers.kmeans import KMeans
from vt_zoo.layers.position_code import PositionCode
from vt_zoo.layers.tokenizer import LearnedFilters


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


@pytest.mark.slow
@pytest.mark.parametrize('options', [*SINGLE, *COMBINED], ids=name)
def test_models_compile(options):
    torch._dynamo.reset()
    model = calibrated(**options)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-4)


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
    model = calibrated(dtype=torch.float64, **options).train()
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


# --- what is refused


@pytest.mark.parametrize('word,options', [
    ('token_mixer', {'token_mixer': 'gcn'}),
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
    ('projector', {'projector': False, 'features_only': True, 'out_indices': (0, 1)}),
    ('projector', {'projector': False, 'features_only': True, 'tokenizer': 'pooling'}),
    ('num_tokens', {'tokenizer': 'pooling', 'num_tokens': 5}),
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
    for part, size in sizes.items():
        maps = [m for m in (getattr(r, part) for r in records) if m is not None]
        assert len(records) - len(maps) == missing.get(part, 1 if part == 'projection' else 0)
        for m in maps:
            assert m.shape[0] == 2 and m.shape[2:] == size
            over = 1 if part == 'projection' else tuple(range(2, m.ndim))
            torch.testing.assert_close(m.sum(over), torch.ones_like(m.sum(over)))
