"""Recipes of segmentation runs, the refusal of bad ones, and the learning rate against torch's own schedulers."""
import re
from dataclasses import fields

import pytest
import torch
from timm.scheduler import create_scheduler_v2
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, PolynomialLR

from vt_zoo.segmentation.datasets import FORMATS
from vt_zoo.segmentation.settings import SegmentSettings
from vt_zoo.segmentation.train import create_segmenter, schedule_arguments
from vt_zoo.training.settings import read_yaml

# section 5.3, and what its names of Detectron2's recipe mean
PAPER = {
    'coco_stuff': {
        'iterations': 90000, 'schedule': 'multistep', 'steps': [60000, 80000], 'batch_size': 32, 'lr': 0.04,
        'opt': 'momentum', 'num_tokens': 8, 'token_dim': 1024},
    'lip': {
        'batch_size': 96, 'lr': 0.01, 'weight_decay': 5e-4, 'opt': 'momentum', 'num_tokens': 8, 'token_dim': 1024,
        'crop_size': (473, 473), 'eval_size': (473, 473)},
}


def write(folder, text):
    (folder / 'recipe.yaml').write_text(text, errors='surrogateescape')
    return str(folder / 'recipe.yaml')


def test_recipes_are_listed():
    assert SegmentSettings.recipes() == sorted([*PAPER, 'camvid', 'camvid_small', 'digits'])


def test_the_small_model_fits_10_megabytes():
    model = create_segmenter(SegmentSettings.read('camvid_small'), 11)
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) < 9.9e6


@pytest.mark.parametrize('name', PAPER)
def test_recipe_has_the_values_of_the_paper(name):
    settings = SegmentSettings.read(name)
    assert {field: getattr(settings, field) for field in PAPER[name]} == PAPER[name]
    assert settings.format in FORMATS
    assert settings.encoder_weights is True


def test_defaults(tmp_path):
    assert SegmentSettings.read(None) == SegmentSettings.read(None, {}) == SegmentSettings()
    assert SegmentSettings.read(write(tmp_path, '# nothing\n')) == SegmentSettings()


def test_overrides_replace_the_recipe():
    settings = SegmentSettings.read('lip', {'lr': 1, 'arch': 'panoptic_fpn', 'eval_size': None, 'crop_size': [64, 32]})
    assert (settings.lr, settings.arch, settings.eval_size, settings.crop_size) == (1.0, 'panoptic_fpn', None, (64, 32))
    assert isinstance(settings.lr, float)
    assert settings.batch_size == 96


@pytest.mark.parametrize('text, value', [
    ('1e-3', 0.001), ('1e3', 1000.), ('-2E+2', -200.), ('.5', 0.5), ('4.', 4.), ('1.5e-4', 1.5e-4), ('7', 7),
    ('no', 'no'), ('on', 'on'), ('true', True), ('false', False), ('null', None), ('[1, 2.5]', [1, 2.5]),
    ('1e', '1e'), ('e3', 'e3'), ('resnet50.a1_in1k', 'resnet50.a1_in1k'), ('.inf', float('inf')),
])
def test_words_and_numbers_of_yaml(text, value):
    """As in YAML 1.2: `--precision no` is a word and `--lr 1e-3` a number."""
    assert read_yaml(text) == value
    assert type(read_yaml(text)) is type(value)


@pytest.mark.parametrize('name', [f.name for f in fields(SegmentSettings)])
def test_value_of_a_wrong_kind(name, input_error):
    with input_error(rf"^{name} must be .*, got \{{'a': 1\}}"):
        SegmentSettings.read(None, {name: {'a': 1}})


@pytest.mark.parametrize('name, value, allowed', [
    ('arch', 'unet', 'vt_fpn, panoptic_fpn'), ('schedule', 'step', 'multistep, poly, cosine'),
    ('precision', 'fp8', 'no, bf16, fp16'), ('precision', False, 'a word'), ('encoder_weights', 'imagenet', 'true'),
    ('iterations', 0, 'at least 1'), ('iterations', 1.5, 'whole number'), ('iterations', True, 'whole number'),
    ('batch_size', 0, 'at least 1'), ('eval_every', 0, 'at least 1'), ('checkpoint_every', -1, 'at least 1'),
    ('num_tokens', 0, 'at least 1'), ('token_dim', 0, 'at least 1'), ('pyramid_channels', 0, 'at least 1'),
    ('head_channels', 48, 'multiple of 32'), ('head_channels', 0, 'multiple of 32'), ('warmup', -1, 'at least 0'),
    ('seed', -1, 'from 0'), ('seed', 2 ** 63, '2 ** 63'), ('lr', 0, 'above 0'), ('lr', float('nan'), 'above 0'),
    ('lr', float('inf'), 'above 0'), ('lr', 'fast', 'a number'), ('lr', True, 'a number'),
    ('momentum', 1, 'from 0 to under 1'), ('weight_decay', -1e-4, 'from 0 to under 1'),
    ('ema_decay', 1.0, 'from 0 to under 1'), ('power', -0.5, 'at least 0'), ('power', float('nan'), 'at least 0'),
    ('hflip', 1.5, 'from 0 to 1'), ('scale', [2, 1], 'smallest <= largest'), ('scale', [0, 1], 'smallest <= largest'),
    ('scale', [1, float('inf')], 'smallest <= largest'), ('scale', [1], 'a list of 2 numbers'),
    ('crop_size', 32, 'a list of 2 numbers'), ('crop_size', [32, 0], 'at least 1'),
    ('crop_size', [32, 1.5], 'a whole number'), ('steps', 5, 'a list of whole numbers'),
    ('steps', [5, 0], 'at least 1'), ('mean', [1, 2], 'a list of 3 numbers'), ('std', [1, 0, 1], 'above 0'),
    ('eval_size', 0, 'a height and a width'), ('eval_size', [32, 0], 'short side'), ('eval_size', -1, 'short side'),
    ('eval_size', [1, 2, 3], '2 numbers'),
])
def test_value_that_is_not_allowed(name, value, allowed, input_error):
    given = str(value[-1] if isinstance(value, list) else value)
    with input_error(f'^{name} must be .*{re.escape(allowed)}.*, got .*{re.escape(given)}'):
        SegmentSettings.read(None, {name: value})


@pytest.mark.parametrize('text, words', [
    ('no_such_field: 1', ['recipe.yaml', "'no_such_field'", 'vt-zoo segment train']),
    ('1: 1', ['unknown field 1']),
    ('[1, 2]', ['recipe.yaml', 'fields and values']),
    ('lr 0.1', ['recipe.yaml', 'fields and values']),
    ('lr: [', ['recipe.yaml', 'cannot be read']),
    ('\udcff\udcfe\0', ['recipe.yaml', 'cannot be read']),  # no text
    ('lr: !!python/object/apply:os.system [ls]', ['recipe.yaml', 'cannot be read']),
    ('lr: fast', ['lr', "'fast'", 'a number']),
])
def test_recipe_that_cannot_be_used(tmp_path, text, words, input_error):
    with input_error(''.join(f'(?=.*{re.escape(word)})' for word in words)):
        SegmentSettings.read(write(tmp_path, text))


@pytest.mark.parametrize('name, match', [
    ('no_such_recipe',
     'config no_such_recipe is neither a file nor one of camvid, camvid_small, coco_stuff, digits, lip'),
    ('no/such/recipe.yaml', 'config no/such/recipe.yaml is neither a file nor'), ('.', 'cannot be read')])
def test_missing_recipe(name, match, input_error):
    with input_error(match):
        SegmentSettings.read(name)


def rates(settings, iterations):
    """Those of the training loop."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.lr)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=settings.iterations, step_on_epochs=False, updates_per_epoch=1,
        **schedule_arguments(settings))
    found = []
    for i in iterations:
        scheduler.step_update(i)
        found.append(optimizer.param_groups[0]['lr'])
    return found


def rates_of_torch(create, iterations, lr):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = create(optimizer)
    rates = []
    for _ in range(iterations):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize('changes, create', [
    ({'schedule': 'multistep', 'steps': [20, 31]}, lambda o: MultiStepLR(o, [20, 31], gamma=0.1)),
    ({'schedule': 'multistep'}, lambda o: MultiStepLR(o, [])),
    ({'schedule': 'poly', 'power': 0.9}, lambda o: PolynomialLR(o, 40, power=0.9)),
    ({'schedule': 'poly', 'power': 2.}, lambda o: PolynomialLR(o, 40, power=2.)),
    ({'schedule': 'cosine'}, lambda o: CosineAnnealingLR(o, 40)),
])
def test_learning_rate_is_torchs(changes, create):
    settings = SegmentSettings(iterations=40, lr=0.3, **changes)
    expected = rates_of_torch(create, 40, 0.3)
    assert rates(settings, range(40)) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize('schedule', ['multistep', 'poly', 'cosine'])
def test_warmup(schedule):
    """Linear from a thousandth of the rate."""
    with_warmup = SegmentSettings(iterations=40, lr=0.3, schedule=schedule, steps=[16], warmup=10)
    without = SegmentSettings(iterations=40, lr=0.3, schedule=schedule, steps=[16])
    assert rates(with_warmup, range(10)) == pytest.approx([0.3 * (0.001 + 0.999 * i / 10) for i in range(10)])
    assert rates(with_warmup, range(10, 40)) == pytest.approx(rates(without, range(10, 40)))
