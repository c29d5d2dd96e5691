"""The VT stage as a module of its own, on other backbones than ours, and where its code lives."""
import inspect
from functools import partial

import pytest
import torch
import torch.nn as nn
from helpers import COMBINED, SINGLE, TINY, assert_equal, calibrated, images, name, run_blocks, stir

import vt_zoo.layers
from vt_zoo.analysis.metrics import effective_rank
from vt_zoo.inference import InferenceStage
from vt_zoo.layers import (
    ClusteringTokenizer,
    FilterTokenizer,
    RecurrentTokenizer,
    VTModule,
    VTStage,
)

SMALL = {'token_dim': 32, 'num_tokens': 4}


def test_document(tmp_path):
    names = run_blocks('docs/stage.md', tmp_path)
    x = images(2, 64, 64)
    model, trained = names['model'], names['Classifier'](10)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    trained = stir(trained).eval()
    with torch.no_grad():
        expected = trained(x)
        trained.vt_stage = InferenceStage(trained.vt_stage)
        names['fold_norms'](trained)
        assert_equal(trained(x), expected)
    blocks = names['resnext'].layer2[0].conv2, names['se_resnet'].layer1[0].se
    assert blocks[0].groups == 32 and blocks[1] is not None and isinstance(names['resnet_d'].conv1, nn.Sequential)


@pytest.mark.parametrize('options', [*SINGLE, *COMBINED], ids=name)
def test_stage_is_that_of_the_model(options):
    """The same names, the same weights: a stage that was trained alone fits a model, and the other way round."""
    model = calibrated(**options)
    own = {k: v for k, v in {**TINY, **options}.items() if k not in ('layers', 'channels', 'num_classes')}
    stage = VTStage(16, depth=3, **{'last_projector': False, **own}).eval()
    stage.load_state_dict(model.vt_stage.state_dict())
    x = torch.randn(2, 16, 5, 7)
    with torch.no_grad():
        for result, expected in zip(stage(x), model.vt_stage(x), strict=True):
            assert torch.equal(result, expected)
    assert stage.out_chs == stage(x)[0].shape[1]


def test_later_modules_start_with_filters_of_their_own():
    """The tokens before do not decide where a later module looks, until training says so: its tokens differ."""
    torch.manual_seed(0)
    x, others = torch.randn(2, 16, 9, 9), torch.randn(2, 8, 32)
    look = {}
    for start_at_zero in (True, False):
        stage = VTStage(16, 16, depth=3, token_dim=32, num_tokens=8, zero_init_last=start_at_zero)
        tokens, tokens_of_others = (stage[2].tokenizer(x, tokens) for tokens in (stage[:2](x)[1], others))
        look[start_at_zero] = torch.equal(tokens, tokens_of_others)
        tokens.square().sum().backward()
        assert stage[2].tokenizer.query.norm.weight.grad.any()
    assert look == {True: True, False: False}


def test_tokens_of_later_modules_are_no_more_alike_than_those_of_the_first():
    torch.manual_seed(0)
    stage = VTStage(64, 64, depth=3, token_dim=64)
    x = torch.randn(8, 64, 14, 14) + torch.randn(8, 64, 1, 1)
    ranks, tokens = [], None
    for module in stage:
        x, tokens = module(x, tokens)
        ranks.append(effective_rank(tokens).mean().item())
    assert min(ranks[1:]) > 0.8 * ranks[0]
    for module in stage:
        if isinstance(module.tokenizer, RecurrentTokenizer):
            nn.init.zeros_(module.tokenizer.filters.weight)  # equation (2) as it is written
            nn.init.ones_(module.tokenizer.query.norm.weight)
    x, tokens = stage(x)
    assert effective_rank(tokens).mean() < 0.8 * ranks[0]


def test_stage_is_a_row_of_modules():
    stage = VTStage(16, 24, depth=3, **SMALL).eval()
    assert len(stage) == 3 and list(stage) == [stage[0], stage[1], stage[-1]]
    assert {k.split('.')[0] for k in stage.state_dict()} == {'0', '1', '2'}
    x = torch.randn(2, 16, 5, 7)
    first, rest = stage[:1], stage[1:]
    assert len(first) == 1 and len(rest) == 2 and rest[0] is stage[1]
    with torch.no_grad():
        for result, expected in zip(rest(*first(x)), stage(x), strict=True):
            assert torch.equal(result, expected)


@pytest.mark.parametrize('zero_init_last', [True, False])
@pytest.mark.parametrize('build', [partial(VTStage, depth=2), VTModule])
def test_it_starts_as_the_identity_of_the_map(build, zero_init_last):
    """Residual branches start at zero, without a call of anything."""
    x = torch.randn(2, 24, 5, 7)
    module = build(24, 24, **SMALL, **({} if zero_init_last else {'zero_init_last': False})).eval()
    assert torch.equal(module(x)[0], x) == zero_init_last


def test_a_stage_trains():
    torch.manual_seed(0)
    stage = VTStage(16, 24, **SMALL)
    x, y = torch.randn(8, 16, 6, 6), torch.randint(4, (8,))
    head, losses = nn.Linear(24 + 32, 4), []
    optimizer = torch.optim.SGD([*stage.parameters(), *head.parameters()], 0.1, momentum=0.9)
    for _ in range(30):
        feature_map, tokens = stage(x)
        loss = nn.functional.cross_entropy(head(torch.cat([feature_map.mean((2, 3)), tokens.mean(1)], dim=1)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    assert all(p.grad is not None for p in stage.parameters())


@pytest.mark.parametrize('rates', [0.1, (0.1, 0.2, 0.3)])
def test_drop_path(rates):
    stage = VTStage(16, 24, drop_path=rates, **SMALL)
    expected = [0.1] * 3 if rates == 0.1 else list(rates)
    assert [m.transformer.drop_path.drop_prob for m in stage] == expected


@pytest.mark.parametrize(('argument', 'changes'), [
    ('in_chs', {'in_chs': 0}), ('feature_dim', {'feature_dim': 2.5}), ('depth', {'depth': 0}),
    ('token_dim', {'token_dim': -1}), ('dynamic_tokens', {'depth': 1, 'dynamic_tokens': True}),
    ('drop_path', {'drop_path': [0.1, 0.2]}), ('drop_path', {'drop_path': -0.1}), ('drop_path', {'drop_path': 1.5}),
    ('norm_layer', {'norm_layer': 'nope'}), ('norm_layer', {'norm_layer': None})])
def test_arguments_that_cannot_be(argument, changes):
    with pytest.raises(ValueError, match=rf'^{argument} ?.*got'):
        VTStage(**{'in_chs': 16, 'feature_dim': 24, **SMALL, **changes})


@pytest.mark.parametrize('cls', [FilterTokenizer, RecurrentTokenizer, ClusteringTokenizer])
def test_value_map_is_an_option_of_each(cls):
    tokenizer = stir(cls(16, 32, 4, value_map=False)).eval()
    x, tokens = torch.randn(2, 16, 5, 7), torch.randn(2, 4, 32)
    attn = []
    tokenizer.softmax.register_forward_hook(lambda module, inputs, output: attn.append(output))
    with torch.no_grad():
        result = tokenizer(x, tokens)
    torch.testing.assert_close(result, torch.einsum('bln,bcn->blc', attn[0], x.flatten(2)))


def test_public_names():
    assert set(vt_zoo.layers.__all__) <= set(dir(vt_zoo.layers))
    assert all(inspect.isclass(getattr(vt_zoo.layers, n)) for n in vt_zoo.layers.__all__)
