"""What people put into a model stays in its inference form; and the model's way to be asked for it harms no other."""
import copy
import gc
import pickle
import weakref

import pytest
import timm
import torch
import torch.nn as nn
from helpers import assert_equal, calibrated, images, stir
from timm.utils import reparameterize_model

from vt_zoo.inference import InferenceStage, fold_neck, fold_norms
from vt_zoo.layers import FilterTokenizer, Projector, VTModule, VTNeck, VTStage
from vt_zoo.layers.attention import gather

SMALL = {'in_chs': 16, 'feature_dim': 24, 'token_dim': 32, 'num_tokens': 4, 'dtype': torch.float64}


def stage_of(**options):
    torch.manual_seed(0)
    return stir(VTStage(**SMALL, **options)).eval()


def double(module, inputs, output):
    return output * 2


def double_map(module, inputs, output):
    return output[0] * 2, output[1]


def double_tokens(module, inputs, output):
    return output[0], output[1] * 2


class Warm(nn.Module):
    def forward(self, logits):
        return (logits / 3).softmax(-2)


class OwnTokenizer(FilterTokenizer):
    def gather(self, logits, x):
        return super().gather(logits.square(), x)


class OwnModule(VTModule):
    def tokenize(self, x, tokens):
        return super().tokenize(x, tokens).square()


class OwnProjector(Projector):
    def forward(self, x, tokens):
        return 2 * super().forward(x, tokens)


class Foreign(nn.Module):
    def forward(self, x, tokens):
        return x.square(), tokens


def hook(path, function=double):
    return f'hook on {path}', lambda stage: stage.get_submodule(path).register_forward_hook(function)


def put(path, module):
    def change(stage):
        parent, _, name = path.rpartition('.')
        setattr(stage.get_submodule(parent), name, module)
    return f'{type(module).__name__} as {path}', change


def become(path, cls):
    return f'{path} of {cls.__name__}', lambda stage: setattr(stage.get_submodule(path), '__class__', cls)


@pytest.mark.parametrize('change', [
    hook('0.projector.softmax'), hook('0.projector.drop_path'), hook('0.tokenizer.softmax'),
    hook('1.tokenizer.softmax'), hook('0.projector'), hook('1.tokenizer'), hook('1', double_map), hook('0.embed'),
    hook('1.transformer.drop_path'),
    put('0.projector.softmax', Warm()), put('1.tokenizer.softmax', nn.Sigmoid()),
    put('1.tokenizer.key', nn.Linear(24, 24, dtype=torch.float64)),
    become('0.tokenizer', OwnTokenizer), become('1', OwnModule), become('0.projector', OwnProjector),
    put('1', Foreign())], ids=lambda change: change[0])
def test_what_people_put_into_a_stage_stays(change):
    stage = stage_of()
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        before = stage(x)
        change[1](stage)
        expected = stage(x)
        assert any((a - b).norm() > 1e-3 * b.norm() for a, b in zip(expected, before)), 'the change is none'
        for result, other in zip(InferenceStage(stage)(x), expected):
            assert_equal(result, other)


class OwnStage(VTStage):
    def forward(self, x, tokens=None):
        x, tokens = super().forward(x, tokens)
        return x, tokens.square()


@pytest.mark.parametrize('change', [hook('vt_stage', double_tokens), become('vt_stage', OwnStage)], ids=lambda c: c[0])
def test_what_people_make_of_the_whole_stage_stays(change):
    model, x = calibrated().double(), images(dtype=torch.float64)
    change[1](model)
    with torch.no_grad():
        assert_equal(reparameterize_model(model)(x), model(x))


def test_observing_hooks_of_a_softmax_go_on():
    stage, seen = stage_of(), []
    stage[0].projector.softmax.register_forward_hook(lambda module, inputs, output: seen.append(output))
    merged = InferenceStage(stage)
    with torch.no_grad():
        merged(torch.randn(2, 16, 5, 7, dtype=torch.float64))
    assert len(seen) == 1


def test_tied_filters_of_a_neck():
    torch.manual_seed(0)
    neck = stir(VTNeck((4, 6), 16, 3, 20)).eval().double()
    neck.tokenizers[1].filters = neck.tokenizers[0].filters
    maps = [torch.randn(2, 4, 6, 8).double(), torch.randn(2, 6, 3, 4).double()]
    with torch.no_grad():
        for result, expected in zip(fold_neck(neck)(maps), neck(maps)):
            assert_equal(result, expected)


@pytest.mark.parametrize('read', ['conv', 'norm'])
def test_weights_that_are_read_elsewhere_are_not_folded(read):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x)) * getattr(self, read).weight.mean()

    torch.manual_seed(0)
    model = stir(Reader()).eval().double()
    x = images(dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        fold_norms(model)
        assert_equal(model(x), expected)


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: InferenceStage(VTModule(16, 24)), 'stage must be a VTStage, got VTModule'),
    (lambda: fold_neck(VTStage(16, 24)), 'neck must be a VTNeck, got VTStage')], ids=['stage', 'neck'])
def test_other_modules_are_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_inference_form_of_a_training_stage_is_not_random():
    stage = stage_of(drop_path=0.5)
    x = torch.randn(4, 16, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        expected = stage(x)
        merged = InferenceStage(stage.train())
        assert merged.training
        for result, other in zip(merged(x), expected):
            assert_equal(result, other)
    assert not any(m.training for m in InferenceStage(stage.eval()).modules())


def test_new_modules_are_in_the_models_mode():
    assert not any(m.training for m in reparameterize_model(calibrated()).modules())


# --- how timm asks


def test_stage_that_is_taken_out_leaves_its_model_alone():
    donor = calibrated()
    other = copy.deepcopy(nn.Sequential(donor.vt_stage))
    assert type(reparameterize_model(other)[0]) is VTStage
    assert type(reparameterize_model(nn.Sequential(donor.vt_stage[:1]), inplace=True)[0]) is VTStage
    assert type(donor.vt_stage) is VTStage and isinstance(donor.bn1, nn.BatchNorm2d)


def test_stage_alone_is_no_larger_than_itself():
    model = calibrated()
    size = len(pickle.dumps(model.vt_stage))
    weights = sum(t.numel() * t.element_size() for t in model.vt_stage.state_dict().values())
    assert size < weights + 150_000 < len(pickle.dumps(model))


@pytest.mark.parametrize('path', ['vt_stage', 'decoder'])
def test_models_are_freed_at_once(path):
    if path == 'vt_stage':
        model = timm.create_model('test_vt_resnet')
    else:
        from vt_zoo.models.vt_fpn import VTFPN
        model = VTFPN('tu-test_resnet', classes=2, token_dim=32, pyramid_channels=32, head_channels=32)
    gc.collect()
    gc.disable()
    try:
        alive = weakref.ref(getattr(model, path))
        del model
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize('make', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['copy', 'pickle'])
def test_copies_are_asked_for_their_own(make):
    model = calibrated()
    other = make(model)
    reparameterize_model(other, inplace=True)
    assert isinstance(other.vt_stage, InferenceStage) and isinstance(other.bn1, nn.Identity)
    assert type(model.vt_stage) is VTStage and isinstance(model.bn1, nn.BatchNorm2d)


def test_stage_that_is_put_in_is_asked():
    model = calibrated().double()
    model.vt_stage = stir(VTStage(16, 24, token_dim=32, num_tokens=4, last_projector=False)).eval().double()
    x = images(dtype=torch.float64)
    with torch.no_grad():
        once = reparameterize_model(model)
        assert isinstance(once.vt_stage, InferenceStage)
        assert_equal(once(x), model(x))


# --- slices, float16


def test_slice_has_hooks_of_its_own():
    stage = stage_of()
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        before = stage(x)
        part = stage[:1]
        part.register_forward_hook(double_map)
        part.register_buffer('mine', torch.zeros(1))
        assert torch.equal(stage(x)[0], before[0]) and 'mine' not in stage.state_dict()


@pytest.mark.parametrize('value', [1., 4095., 60000.])
def test_gathering_large_pixels_in_half_precision(value):
    attn, pixels = torch.full((1, 2, 100), 0.01), torch.full((1, 3, 10, 10), value)
    result = gather(attn, pixels.half())
    assert result.dtype == torch.float16
    torch.testing.assert_close(result.float(), torch.full((1, 2, 3), value), rtol=2e-3, atol=0)
