"""VT-ResNets in transformers: what docs/libraries.md says of them, and the folders that it reads."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from hub_server import WRITER, hub_server
from PIL import Image
from timm.data import ImageDataset, create_transform, resolve_model_data_config

from vt_zoo.weights.files import write_model
from vt_zoo.weights.loading import load_model
from vt_zoo.weights.publish import upload, write_release

transformers = pytest.importorskip('transformers')
REPO = 'someone/my-digits'


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def create():
    torch.manual_seed(0)
    return timm.create_model('test_vt_resnet', num_classes=3).eval()


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


def test_pipeline_reads_digits(shipped, digits):
    """Grey files of 8x8 pixels, as they are."""
    classify = transformers.pipeline('image-classification', shipped)
    paths = [str(path) for name in '0123456789' for path in sorted((digits / 'val' / name).iterdir())[:3]]
    labels = [answers[0]['label'] for answers in classify(paths)]
    assert sum(label == Path(path).parent.name for label, path in zip(labels, paths)) >= 29


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


@pytest.mark.parametrize('writer', ['shards', "timm's"])
def test_folder_of(writer, tmp_path):
    folder = tmp_path / 'release'
    if writer == 'shards':
        write_model(folder, create(), ['a', 'b', 'c'], {'input_size': (3, 32, 32)}, max_shard_size='300KB')
    else:
        timm.models.save_for_hf(
            create(), str(tmp_path / 'model'), {'label_names': ['a', 'b', 'c']}, {'num_classes': 3}, True)
        write_release(tmp_path / 'model', folder, REPO)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert isinstance(model, transformers.TimmWrapperForImageClassification)
    assert model.config.id2label == {0: 'a', 1: 'b', 2: 'c'}
    assert torch.equal(model(images(2, 3, 32, 32)).logits, create()(images(2, 3, 32, 32)))
