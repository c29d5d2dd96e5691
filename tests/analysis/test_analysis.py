"""What a model's tokens look at, what it costs, and the picture."""
import copy
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.utils import AttentionExtract

import vt_zoo  # noqa: F401
from vt_zoo.analysis.cost import count_multiply_adds, count_weights
from vt_zoo.analysis.figures import draw_interaction, draw_locality, draw_token_attention
from vt_zoo.analysis.records import capture_tokens
from vt_zoo.models.vt_fpn import VTFPN

SIZES = [(64, 64), (32, 32), (48, 96), (100, 33)]
TOKENS, TOKEN_DIM = 16, 128  # of test_vt_resnet


def images(batch=2, height=64, width=64):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    """A model whose residual branches are not zero, in eval."""
    torch.manual_seed(0)
    model = timm.create_model('test_vt_resnet', num_classes=5)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith('weight'):
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.train()(images(8))
    return model.eval()


def hooks(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


@pytest.mark.parametrize('height, width', SIZES)
def test_shapes(model, height, width):
    first, last = capture_tokens(model, images(3, height, width))
    pixels = (-(-height // 16), -(-width // 16))
    for record in (first, last):
        assert record.attention.shape == (3, TOKENS, *pixels)
        assert record.relation.shape == (3, TOKENS, TOKENS)
        assert record.tokens.shape == (3, TOKENS, TOKEN_DIM)
    assert first.projection.shape == (3, TOKENS, *pixels)
    assert last.projection is None
    shares = [share for r in (first, last) for share in (r.attention.sum((2, 3)), r.relation.sum(-1))]
    for share in (*shares, first.projection.sum(1)):
        torch.testing.assert_close(share, torch.ones_like(share))
    assert min(first.attention.min(), last.attention.min()) >= 0


def test_tokens_are_those_of_the_model(model):
    records = capture_tokens(model, images())
    with torch.inference_mode():
        assert torch.equal(records[-1].tokens, model.forward_features(images()))
    assert not torch.equal(records[0].tokens, records[1].tokens)


def test_attention_is_what_the_tokenizer_gathers_with(model):
    seen = []
    handles = [m.tokenizer.register_forward_hook(lambda m, x, y: seen.append((m, x[0], y))) for m in model.vt_stage]
    records = capture_tokens(model, images(2, 48, 96))
    for handle in handles:
        handle.remove()
    with torch.inference_mode():
        for record, (tokenizer, x, tokens) in zip(records, seen):
            gathered = tokenizer.value(torch.einsum('blhw,bchw->blc', record.attention, x))
            torch.testing.assert_close(gathered, tokens, rtol=1e-4, atol=1e-4)
            assert record.attention.flatten(2).std(-1).min() > 1e-5


def test_relation_is_what_the_transformer_mixes_with(model):
    transformer, seen = model.vt_stage[0].transformer, []
    handle = transformer.norm.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    other = transformer.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    record = capture_tokens(model, images())[0]
    handle.remove()
    other.remove()
    tokens, mixed = seen
    torch.testing.assert_close(record.relation @ tokens, mixed, rtol=1e-4, atol=1e-4)


def test_projection_is_what_the_projector_writes_with(model):
    projector, seen = model.vt_stage[0].projector, []
    handle = projector.register_forward_hook(lambda m, x, y: seen.append((*x, y)))
    record = capture_tokens(model, images(2, 48, 96))[0]
    handle.remove()
    x, tokens, out = seen[0]
    with torch.inference_mode():
        written = torch.einsum('blhw,blc->bchw', record.projection, projector.value(tokens))
        torch.testing.assert_close(projector.skip(x) + written, out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('training', [False, True])
def test_model_is_as_before(model, training):
    before = copy.deepcopy(model.train(training).state_dict())
    first, second = capture_tokens(model, images()), capture_tokens(model, images())
    for record, again in zip(first, second):
        assert torch.equal(record.attention, again.attention)
        assert not record.attention.requires_grad and not record.tokens.requires_grad
    assert hooks(model) == []
    assert model.training == training
    assert training or all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hooks_are_gone_after_an_error(model):
    with pytest.raises(ValueError, match='at least 32'):
        capture_tokens(model, torch.zeros(1, 3, 8, 8))
    assert hooks(model) == []


def test_other_hooks_stay(model):
    calls = []
    model.vt_stage[0].tokenizer.softmax.register_forward_hook(lambda *args: calls.append(1))
    capture_tokens(model, images())
    assert len(hooks(model)) == len(calls) == 1


def test_backbone_has_a_projector_in_each_module():
    model = timm.create_model('test_vt_resnet', features_only=True).eval()
    records = capture_tokens(model, images())
    assert len(records) == 2
    assert all(record.projection is not None for record in records)


def vt_fpn():
    torch.manual_seed(0)
    model = VTFPN('tu-test_resnet', classes=3, num_tokens=4, token_dim=16, pyramid_channels=32, head_channels=32)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith('weight'):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def test_vt_fpn_has_a_record_a_level():
    model, x = vt_fpn(), images(2, 66, 97)
    with torch.no_grad():
        before = model(x)
    records = capture_tokens(model, x)
    assert [record.attention.shape for record in records] == [
        (2, 4, -(-66 // n), -(-97 // n)) for n in (4, 8, 16, 32)]
    for record in records:
        assert record.relation.shape == (2, 16, 16)
        assert torch.equal(record.relation, records[0].relation)
        assert record.projection.shape == record.attention.shape
        assert record.tokens.shape == (2, 4, 16)
        for share in (record.attention.sum((2, 3)), record.projection.sum(1), record.relation.sum(-1)):
            torch.testing.assert_close(share, torch.ones_like(share))
    assert hooks(model) == []
    with torch.no_grad():
        assert torch.equal(model(x), before)


def test_vt_fpn_writes_with_what_is_captured():
    model, seen = vt_fpn(), []
    projector = model.decoder.neck.projectors[1]
    handle = projector.register_forward_hook(lambda m, x, y: seen.append((*x, y)))
    record = capture_tokens(model, images(2, 64, 96))[1]
    handle.remove()
    x, tokens, out = seen[0]
    assert torch.equal(tokens, record.tokens)
    with torch.no_grad():
        written = torch.einsum('blhw,blc->bchw', record.projection, projector.value(tokens))
        torch.testing.assert_close(x + written, out, rtol=1e-4, atol=1e-4)


def test_encoder_and_neck_with_tokens():
    model = VTFPN('tu-test_vt_resnet', classes=3, num_tokens=4, token_dim=16).eval()
    assert [record.tokens.shape[1] for record in capture_tokens(model, images())] == [TOKENS, TOKENS, 4, 4, 4, 4]


def assert_same_records(records, expected):
    assert len(records) == len(expected)
    for record, other in zip(records, expected):
        torch.testing.assert_close(record.attention, other.attention)
        torch.testing.assert_close(record.tokens, other.tokens)


@pytest.mark.parametrize('in_place', [False, True])
def test_compiled_model(model, in_place):
    expected = capture_tokens(model, images())
    compiled = model if in_place else torch.compile(model, backend='eager')
    if in_place:
        model.compile(backend='eager')
    with torch.no_grad():
        before = compiled(images())
    assert_same_records(capture_tokens(compiled, images()), expected)
    assert hooks(model) == []
    with torch.no_grad():
        assert torch.equal(compiled(images()), before)


def test_reduced_model(model):
    model.double()
    x = images().double()
    assert_same_records(capture_tokens(timm.utils.reparameterize_model(model), x), capture_tokens(model, x))


def test_distributed_model(model, tmp_path):
    expected = capture_tokens(model, images())
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        assert_same_records(capture_tokens(nn.parallel.DistributedDataParallel(model), images()), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_scripted_model(model):
    with pytest.raises(ValueError, match='scripted'):
        capture_tokens(torch.jit.script(model), images())


@pytest.mark.parametrize(('method', 'name'), [('hook', '*tokenizer.softmax'), ('fx', '*tokenizer.softmax*')])
def test_attention_extract_of_timm(model, method, name):
    expected = [record.attention.flatten(2) for record in capture_tokens(model, images())]
    with torch.no_grad():
        extracted = AttentionExtract(model, names=[name], method=method)(images())
    assert len(extracted) == 2
    for a, b in zip(extracted.values(), expected):
        torch.testing.assert_close(a, b)


def test_model_without_tokens():
    with pytest.raises(ValueError, match='ResNet has none'):
        capture_tokens(timm.create_model('resnet18'), images())


@pytest.fixture
def hand_made():
    """216 + 4,800 weights and 216 * 120 + 4,800 multiply-adds for an image of 3x10x12."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 10 * 12, 5))


def test_cost_of_a_hand_made_model(hand_made):
    assert count_weights(hand_made) == 216 + 4800
    assert count_multiply_adds(hand_made, (3, 10, 12)) == 216 * 120 + 4800


def test_multiply_adds_of_groups_strides_and_products():
    class Product(nn.Module):
        def forward(self, x):
            return x @ x.transpose(1, 2)

    model = nn.Sequential(nn.Conv2d(4, 6, 2, stride=2, groups=2, bias=False), nn.Flatten(2), Product())
    assert count_weights(model) == 6 * 2 * 4
    assert count_multiply_adds(model, (4, 8, 6)) == 48 * 12 + 6 * 6 * 12


@pytest.mark.parametrize('training', [False, True])
def test_counting_changes_nothing(hand_made, training):
    hand_made.train(training)
    before = {name: value.clone() for name, value in hand_made.state_dict().items()}
    hand_made[1].eval()  # a frozen norm stays so
    count_multiply_adds(hand_made, (3, 10, 12))
    assert (hand_made.training, hand_made[0].training, hand_made[1].training) == (training, training, False)
    assert all(torch.equal(value, before[name]) for name, value in hand_made.state_dict().items())


@pytest.mark.parametrize('device, dtype', [('meta', torch.float32), ('cpu', torch.bfloat16)])
def test_counting_elsewhere(hand_made, device, dtype):
    assert count_multiply_adds(hand_made.to(device, dtype), (3, 10, 12)) == 216 * 120 + 4800


def attention(batch=2, tokens=3, height=4, width=4):
    logits = torch.randn(batch, tokens, height * width, generator=torch.Generator().manual_seed(0))
    return (3 * logits).softmax(-1).unflatten(-1, (height, width))


def pictures(batch=2, size=(32, 32)):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(batch)]


def test_picture(tmp_path):
    draw_token_attention(pictures(), attention(), ['a', 'b'], tmp_path / 'new' / 'tokens.png')
    with Image.open(tmp_path / 'new' / 'tokens.png') as image:
        assert image.format == 'PNG'
        assert min(image.size) > 100
        assert len(np.unique(np.asarray(image.convert('RGB')).reshape(-1, 3), axis=0)) > 500
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['tokens.png']
    draw_token_attention(pictures(), attention(), ['cat', 'dog'], tmp_path / 'tokens.svg')
    assert '<svg' in (tmp_path / 'tokens.svg').read_text()


def test_picture_shows_the_attention(tmp_path):
    draw_token_attention(pictures(), attention(), ['a', 'b'], tmp_path / 'a.png')
    draw_token_attention(pictures(), attention().flip(-1), ['a', 'b'], str(tmp_path / 'b.png'))
    draw_token_attention(pictures(), attention(), ['a', 'b'], tmp_path / 'c.png')
    a, b, c = (np.asarray(Image.open(tmp_path / f'{name}.png')).astype(int) for name in 'abc')
    assert (a == c).all()
    assert a.shape != b.shape or np.abs(a - b).mean() > 1


def test_figure_6(tmp_path):
    a = attention(1, 16)[0]
    draw_interaction(pictures(1)[0], a, a.flip(0), 'a picture', tmp_path / 'figure.png')
    draw_interaction(pictures(1)[0], a, a, 'a picture', tmp_path / 'same.png')
    figure, same = (np.asarray(Image.open(tmp_path / f'{name}.png')).astype(int) for name in ('figure', 'same'))
    assert figure.shape[1] > 1000 and np.abs(figure - same).mean() > 0.5
    draw_interaction(pictures(1)[0], a, a, 'a picture', tmp_path / 'figure.svg')
    assert '<svg' in (tmp_path / 'figure.svg').read_text()


def test_figure_5(tmp_path):
    draw_locality(torch.rand(12, 3), 0.0416, 'a model, random weights', tmp_path / 'figure.svg')
    draw_locality(torch.rand(1, 1), 0.0416, 'one layer, one head', tmp_path / 'figure.png')
    assert '<svg' in (tmp_path / 'figure.svg').read_text()
    assert (tmp_path / 'figure.png').stat().st_size > 5000


def test_picture_without_matplotlib(tmp_path, monkeypatch, input_error):
    for name in [name for name in sys.modules if name.split('.')[0] == 'matplotlib'] + ['matplotlib']:
        monkeypatch.setitem(sys.modules, name, None)
    with input_error('matplotlib'):
        draw_token_attention(pictures(), attention(), ['a', 'b'], tmp_path / 'tokens.png')
    assert not list(tmp_path.iterdir())
