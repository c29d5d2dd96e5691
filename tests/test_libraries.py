"""VT-ResNets in the libraries around timm, each the real one: what docs/libraries.md says of them.

torch.hub is in tests/test_hubconf.py, scikit-learn's probe in tests/test_docs.py.
"""
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import transformers
from hub_server import WRITER, hub_server
from PIL import Image
from timm.data import ImageDataset, create_transform, resolve_model_data_config
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from vt_zoo.checkpoint import load_model, write_model
from vt_zoo.publish import upload, write_release

DOCUMENT = (Path(__file__).parents[1] / 'docs' / 'libraries.md').read_text()
REPO = 'someone/my-digits'
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


@pytest.mark.parametrize('output_stride', [16, 8])
def test_segmentation_model_of_a_smaller_stride(output_stride):
    model = smp.DeepLabV3Plus(
        'tu-test_vt_resnet', encoder_weights=None, classes=4, encoder_output_stride=output_stride).eval()
    with torch.inference_mode():
        assert model.encoder(images(1, 3, 64, 96))[-1].shape == (1, 128, 64 // output_stride, 96 // output_stride)
        assert model(images(1, 3, 64, 96)).shape == (1, 4, 64, 96)


def test_encoder_with_weights():
    x = images(2, 3, 64, 96)
    encoder = smp.Unet('tu-test_vt_resnet', encoder_weights=True).encoder.eval()
    body = timm.create_model('test_vt_resnet', pretrained=True, features_only=True).eval()
    with torch.inference_mode():
        for ours, expected in zip(encoder(x), [x, *body(x)], strict=True):
            assert torch.equal(ours, expected)


def test_image_sizes_of_segmentation_models():
    x = images(1, 3, 61, 83)
    assert smp.Unet('tu-test_vt_resnet', encoder_weights=None).eval()(x).shape == (1, 1, 61, 83)
    for cls in (smp.FPN, smp.UPerNet):
        with pytest.raises(RuntimeError, match='divisible by 32'):
            cls('tu-test_vt_resnet', encoder_weights=None)(x)


# --- torchvision


@pytest.fixture(scope='module')
def detection():
    """What the document's example of torchvision leaves."""
    names = {'torch': torch, 'print': lambda *values: None}
    exec(re.search('## torchvision.*?^```python\n(.*?)^```$', DOCUMENT, re.MULTILINE | re.DOTALL)[1], names)
    return SimpleNamespace(**{name: names[name] for name in ('Backbone', 'FasterRCNN', 'images', 'targets', 'found')})


def detector_of(detection, name, **kwargs):
    torch.manual_seed(0)
    return detection.FasterRCNN(
        detection.Backbone(name, out_channels=32, **kwargs), num_classes=3, min_size=64, max_size=128)


@pytest.mark.parametrize('name', ['test_vt_resnet', 'vt_resnet50'])
def test_every_parameter_of_the_backbone_learns(detection, name):
    """On images of odd and different sizes, from the boxes to the stem."""
    detector = detector_of(detection, name, zero_init_last=False)
    losses = detector(detection.images, detection.targets)
    assert all(math.isfinite(loss.item()) for loss in losses.values())
    sum(losses.values()).backward()
    assert without_gradient(detector.backbone.body) == []


def test_detector_learns(detection):
    """Ten steps on two images."""
    detector = detector_of(detection, 'test_vt_resnet', pretrained=True)
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.02, momentum=0.9)
    history = []
    for _ in range(10):
        loss = sum(detector(detection.images, detection.targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert all(map(math.isfinite, history))
    assert history[-1] < 0.7 * history[0]


def test_boxes_are_inside_of_the_image(detection):
    detector = detector_of(detection, 'test_vt_resnet', pretrained=True).eval()
    detector.roi_heads.score_thresh = 0.  # nothing was learnt, so that no score is high
    with torch.inference_mode():
        found = detector(detection.images)
    for image, boxes in zip(detection.images, (f['boxes'] for f in found), strict=True):
        x0, y0, x1, y1 = boxes.unbind(1)
        assert len(boxes) > 0
        assert (x0 >= 0).all() and (x0 <= x1).all() and (x1 <= image.shape[2]).all()
        assert (y0 >= 0).all() and (y0 <= y1).all() and (y1 <= image.shape[1]).all()


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
    with pytest.raises(NotImplementedError):
        BackboneWithFPN(model, {'layer3': '0', 'vt_stage': '1'}, [96, 128], 32)(images(1, 3, 64, 64))


# --- transformers


@pytest.fixture(scope='module')
def shipped(tmp_path_factory):
    """Folder of the model that ships, as `finetune` writes it."""
    folder = tmp_path_factory.mktemp('shipped') / 'model'
    model = timm.create_model('test_vt_resnet', pretrained=True)
    write_model(folder, model, list('0123456789'), resolve_model_data_config(model))
    return str(folder)


@pytest.fixture(params=['finetune', 'hub'])
def source(request, tiny_model, tmp_path, monkeypatch, hub_client):
    """A model as `vt-zoo finetune` saves it, and as `vt-zoo publish` uploads it: its name, its folder, timm's name."""
    if request.param == 'finetune':
        yield SimpleNamespace(name=str(tiny_model), folder=str(tiny_model), timm=f'local-dir:{tiny_model}')
        return
    monkeypatch.setenv('HF_TOKEN', WRITER)
    (tmp_path / 'hub').mkdir()
    with hub_server(tmp_path / 'hub') as server:
        hub_client(server.url)
        write_release(tiny_model, tmp_path / 'release', REPO)
        upload(tmp_path / 'release', REPO)
        yield SimpleNamespace(name=REPO, folder=str(tiny_model), timm=f'hf-hub:{REPO}')


def test_classifier_and_tokens(source):
    x = images(2, 3, 32, 32)
    model = load_model(source.folder)
    classifier = transformers.AutoModelForImageClassification.from_pretrained(source.name).eval()
    assert classifier.config.id2label == {0: '0', 1: '1', 2: '2'}
    with torch.inference_mode():
        torch.testing.assert_close(classifier(x).logits, model(x))
        outputs = transformers.AutoModel.from_pretrained(source.name).eval()(x, output_hidden_states=True)
        tokens, maps = model.forward_intermediates(x)
        torch.testing.assert_close(outputs.last_hidden_state, tokens)
        torch.testing.assert_close(outputs.pooler_output, model.forward_head(tokens, pre_logits=True))
        torch.testing.assert_close(list(outputs.hidden_states), maps)


def test_image_processor(source, few_digits):
    processor = transformers.AutoImageProcessor.from_pretrained(source.name)
    transform = create_transform(**resolve_model_data_config(load_model(source.folder)))
    image = Image.open(next((few_digits / 'val' / '1').iterdir())).convert('RGB')
    assert torch.equal(processor(image)['pixel_values'], transform(image)[None])


def test_pipeline(source, few_digits):
    classify = transformers.pipeline('image-classification', source.name)
    path = next((few_digits / 'val' / '1').iterdir())
    model = load_model(source.folder)
    transform = create_transform(**resolve_model_data_config(model))
    with torch.inference_mode():
        expected = model(transform(Image.open(path).convert('RGB'))[None]).softmax(-1)[0].tolist()
    found = {answer['label']: answer['score'] for answer in classify(str(path))}
    assert found == pytest.approx(dict(zip('012', expected)), abs=1e-5)


def test_pipeline_reads_digits(shipped, digits):
    """Grey files of 8x8 pixels, as they are."""
    classify = transformers.pipeline('image-classification', shipped)
    paths = [str(path) for name in '0123456789' for path in sorted((digits / 'val' / name).iterdir())[:3]]
    labels = [answers[0]['label'] for answers in classify(paths)]
    assert sum(label == Path(path).parent.name for label, path in zip(labels, paths)) >= 29


def test_forgotten_import(shipped, tmp_path):
    """The document says what transformers says then."""
    folder = Path(shipped)
    config = json.loads((folder / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, 'architecture': 'not_registered'}))
    (tmp_path / 'model.safetensors').symlink_to(folder / 'model.safetensors')
    with pytest.raises(ImportError, match='is not supported in your version of timm'):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path)


def train(model, folder, out, transform):
    """Three steps; gives their losses."""
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(out), max_steps=3, per_device_train_batch_size=8, logging_steps=1, report_to='none', use_cpu=True,
            learning_rate=1e-3, disable_tqdm=True, save_strategy='no'),
        train_dataset=ImageDataset(str(folder), transform=transform),
        data_collator=lambda batch: {
            'pixel_values': torch.stack([image for image, _ in batch]),
            'labels': torch.tensor([label for _, label in batch])})
    trainer.train()
    trainer.save_model(str(out))
    return [entry['loss'] for entry in trainer.state.log_history if 'loss' in entry]


@pytest.mark.parametrize('gradient_checkpointing', [False, True])
def test_trainer(tiny_model, few_digits, tmp_path, gradient_checkpointing):
    """Every weight changes, and timm reads what the Trainer saves."""
    processor = transformers.AutoImageProcessor.from_pretrained(tiny_model)
    model = transformers.AutoModelForImageClassification.from_pretrained(tiny_model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    assert model.timm_model.grad_checkpointing == gradient_checkpointing
    losses = train(model, few_digits / 'train', tmp_path / 'out', processor.train_transforms)
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    before = load_model(str(tiny_model))
    after = load_model(str(tmp_path / 'out'))
    assert [n for (n, p), q in zip(before.named_parameters(), after.parameters()) if torch.equal(p, q)] == []
    x = images(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(after(x), model.eval()(x).logits)
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['label_names'] == ['0', '1', '2']


def test_trainer_on_other_classes(shipped, few_digits, tmp_path):
    """A new classifier on the trunk that is there, by its new names once they are set."""
    processor = transformers.AutoImageProcessor.from_pretrained(shipped)
    model = transformers.AutoModelForImageClassification.from_pretrained(
        shipped, num_labels=3, ignore_mismatched_sizes=True)
    trunk = load_model(shipped).layer1[0].conv1.weight
    assert torch.equal(model.timm_model.layer1[0].conv1.weight, trunk)
    model.config.label_names = ['zero', 'one', 'two']
    train(model, few_digits / 'train', tmp_path / 'out', processor.train_transforms)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'out')
    assert again.config.id2label == {0: 'zero', 1: 'one', 2: 'two'}


def backbone_of(name, **kwargs):
    config = transformers.TimmBackboneConfig(backbone=name, freeze_batch_norm_2d=True, **kwargs)
    return transformers.AutoBackbone.from_config(config, pretrained=True).eval()


def test_backbone(source):
    x = images(2, 3, 64, 64)
    backbone = backbone_of(source.timm, out_indices=[1, 2, 3, 4])
    expected = timm.create_model(source.timm, pretrained=True, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    assert backbone.channels == expected.feature_info.channels() == [32, 48, 96, 128]
    assert backbone.out_features == ['layer1', 'layer2', 'layer3', 'vt_stage']
    with torch.inference_mode():
        torch.testing.assert_close(list(backbone(x).feature_maps), expected(x))
        backbone.unfreeze_batch_norm_2d()
        torch.testing.assert_close(list(backbone.eval()(x).feature_maps), expected(x))


def test_thawed_backbone_learns():
    backbone = backbone_of('test_vt_resnet', out_indices=[4])
    backbone.unfreeze_batch_norm_2d()
    optimizer = torch.optim.SGD(backbone.train().parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        backbone(images(4, 3, 64, 64)).feature_maps[0].square().mean().backward()
        optimizer.step()
    assert without_gradient(backbone) == []


def test_hidden_states_of_the_backbone():
    x = images(1, 3, 64, 64)
    with torch.inference_mode():
        outputs = backbone_of('test_vt_resnet', out_indices=[0, 1, 2, 3, 4])(x, output_hidden_states=True)
    assert len(outputs.hidden_states) == 5
    for state, feature in zip(outputs.hidden_states, outputs.feature_maps, strict=True):
        assert torch.equal(state, feature)
