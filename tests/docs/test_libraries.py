"""VT-ResNets in the libraries around timm, each the real one: what docs/libraries.md says of them.

transformers is in tests/docs/test_transformers.py, torch.hub in tests/models/test_hubconf.py,
scikit-learn's probe in tests/docs/test_docs.py.
"""
import math
from types import SimpleNamespace

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from documents import blocks
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN

TRUNK_NORMS = ('bn1', 'layer1', 'layer2', 'layer3')


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def without_gradient(model):
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


# --- segmentation_models_pytorch


@pytest.mark.parametrize('depth', [5, 4])
@pytest.mark.parametrize('cls', [smp.Unet, smp.FPN, smp.UPerNet])
def test_segmentation_model(cls, depth):
    """Every parameter of the encoder learns; at depth 4 the VT stage is not there."""
    kwargs = {}
    if depth == 4:
        kwargs = {smp.Unet: {'decoder_channels': (64, 32, 24, 16)}, smp.FPN: {'upsampling': 2}}.get(cls, {})
    model = cls(
        'tu-vt_resnet50', encoder_depth=depth, encoder_weights=None, classes=4, zero_init_last=False, **kwargs)
    masks = model(images(2, 3, 64, 96))
    assert masks.shape == (2, 4, 64, 96)
    masks.square().mean().backward()
    assert without_gradient(model.encoder) == []
    assert any('vt_stage' in name for name, _ in model.encoder.named_parameters()) == (depth == 5)
    assert list(model.encoder.out_channels) == [3, 64, 256, 512, 1024, 1024][:depth + 1]


def test_encoder_with_weights():
    x = images(2, 3, 64, 96)
    encoder = smp.Unet('tu-test_vt_resnet', encoder_weights=True).encoder.eval()
    body = timm.create_model('test_vt_resnet', pretrained=True, features_only=True).eval()
    with torch.inference_mode():
        for ours, expected in zip(encoder(x), [x, *body(x)], strict=True):
            assert torch.equal(ours, expected)


# --- torchvision


@pytest.fixture(scope='module')
def detection():
    """What the document's example of torchvision leaves."""
    names = {'torch': torch, 'print': lambda *values: None}
    code, = (code for _, code in blocks('docs/libraries.md', 'python') if 'torchvision' in code)
    exec(code, names)
    return SimpleNamespace(**{name: names[name] for name in ('Backbone', 'FasterRCNN', 'images', 'targets')})


@pytest.mark.parametrize('name', ['test_vt_resnet', 'vt_resnet50'])
def test_every_parameter_of_the_backbone_learns(detection, name):
    """On images of odd and different sizes, from the boxes to the stem."""
    torch.manual_seed(0)
    backbone = detection.Backbone(name, out_channels=32, zero_init_last=False)
    detector = detection.FasterRCNN(backbone, num_classes=3, min_size=64, max_size=128)
    losses = detector(detection.images, detection.targets)
    assert all(math.isfinite(loss.item()) for loss in losses.values())
    sum(losses.values()).backward()
    assert without_gradient(detector.backbone.body) == []


def test_frozen_norms_of_the_trunk(detection):
    """They are the weights' own whatever the batch holds; those of the VT stage learn."""
    body = detection.Backbone('test_vt_resnet', pretrained=True).body.train()
    expected = timm.create_model('test_vt_resnet', pretrained=True).eval()
    x = images(2, 3, 64, 64)
    maps = body(x)
    for ours, own in zip(maps[:3], expected.forward_intermediates(x, intermediates_only=True)[1:4]):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)
    norms = {name for name, m in body.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms and all(name.startswith('vt_stage') for name in norms)


@pytest.mark.parametrize('parts', [TRUNK_NORMS, (*TRUNK_NORMS, 'vt_stage')], ids=['trunk', 'all'])
def test_last_module_with_a_frozen_norm_never_learns(parts):
    body = timm.create_model('test_vt_resnet', pretrained=True, features_only=True)
    for part in parts:
        setattr(body.model, part, freeze_batch_norm_2d(getattr(body.model, part)))
    optimizer = torch.optim.SGD(body.parameters(), lr=0.01)
    for _ in range(2):  # the first step moves the norm that starts at zero
        optimizer.zero_grad()
        body(images(4, 3, 64, 64))[-1].square().mean().backward()
        optimizer.step()
    last = [name for name, _ in body.named_parameters() if 'vt_stage.1.' in name]
    silent = [name for name in without_gradient(body) if name in last]
    assert silent == (last if 'vt_stage' in parts else [])


def test_backbone_with_fpn_ends_at_stage_3():
    model = timm.create_model('test_vt_resnet')
    maps = BackboneWithFPN(model, {'layer2': '0', 'layer3': '1'}, [48, 96], 32)(images(1, 3, 64, 64))
    assert [tuple(m.shape) for m in maps.values()] == [(1, 32, 8, 8), (1, 32, 4, 4), (1, 32, 2, 2)]
    with pytest.raises(TypeError):
        BackboneWithFPN(model, {'layer3': '0', 'vt_stage': '1'}, [96, 128], 32)(images(1, 3, 64, 64))
