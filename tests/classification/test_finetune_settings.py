"""Settings of a classifier's training: types, what is allowed, recipes, and the options of the command line."""
import re
from dataclasses import fields

import pytest

from vt_zoo.classification import FinetuneSettings
from vt_zoo.cli.arguments import read_settings
from vt_zoo.cli.main import create_parser
from vt_zoo.segmentation import SegmentSettings


def settings_of(*words):
    """What `vt-zoo finetune DATA_DIR` makes of words."""
    return read_settings(create_parser().parse_args(['finetune', 'data', *words]), FinetuneSettings)


def test_defaults():
    assert settings_of() == FinetuneSettings() == FinetuneSettings.read()


def test_recipe_and_options(tmp_path):
    """An option replaces the recipe's field, which replaces the default."""
    (tmp_path / 'a.yaml').write_text('lr: 1\nscale: [0.5, 1]\naa: original\nmodel_kwargs: {num_tokens: 8}\n')
    settings = settings_of('--config', str(tmp_path / 'a.yaml'), '--lr', '2e-2', '--aa', 'null')
    assert settings == FinetuneSettings(lr=0.02, scale=(0.5, 1.0), model_kwargs={'num_tokens': 8})
    assert type(FinetuneSettings.read(str(tmp_path / 'a.yaml')).lr) is float


def test_recipe_of_the_quickstart():
    assert FinetuneSettings.recipes() == ['digits']
    assert FinetuneSettings.read('digits', {'seed': 3}) == FinetuneSettings(
        model='test_vt_resnet', epochs=12, img_size=96, scale=(0.7, 1.0), hflip=0., color_jitter=0., seed=3)


@pytest.mark.parametrize('words, changes', [
    (['--scale', '0.5', '1'], {'scale': (0.5, 1.0)}), (['--scale', '[0.5, 1]'], {'scale': (0.5, 1.0)}),
    (['--img-size', '64'], {'img_size': 64}), (['--img-size', 'null'], {}), (['--model', '123'], {'model': '123'}),
    (['--aa', 'rand-m9-mstd0.5'], {'aa': 'rand-m9-mstd0.5'}), (['--precision', 'float32'], {'precision': 'float32'}),
    (['--model-kwargs', 'trunk=regnety_016', 'num_tokens=4'],
     {'model_kwargs': {'trunk': 'regnety_016', 'num_tokens': 4}}),
])
def test_options(words, changes):
    assert settings_of(*words) == FinetuneSettings(**changes)


@pytest.mark.parametrize('name, value, allowed', [
    ('model', 5, 'a word'), ('model_kwargs', [1], 'arguments of the model'), ('model_kwargs', {'a b': 1}, 'arguments'),
    ('epochs', 0, 'at least 1'), ('epochs', 1.5, 'a whole number'), ('batch_size', 0, 'at least 1'),
    ('img_size', 0, 'at least 1'), ('img_size', 4097, 'at most 4096'), ('opt', None, 'a word'), ('lr', 0, 'above 0'),
    ('lr', float('nan'), 'above 0'), ('lr', 1e30, 'at most'), ('lr', '0.1', 'a number'),
    ('weight_decay', 1, 'under 1'), ('warmup_epochs', -1, 'at least 0'), ('smoothing', 1, 'under 1'),
    ('drop', -0.1, 'from 0'), ('drop_path', 1, 'under 1'), ('model_ema_decay', 1, 'under 1'),
    ('scale', (1, 0.5), 'smallest <= largest'), ('scale', (0, 1), '0 < smallest'), ('scale', (0.5, 2), 'largest <= 1'),
    ('scale', 0.5, 'a list of 2 numbers'), ('ratio', (0.01, 1), '0.1 <= smallest'), ('ratio', (2, 1), 'smallest <='),
    ('hflip', 1.1, 'from 0 to 1'), ('color_jitter', 1, 'under 1'), ('aa', 3, 'a word'), ('val_fraction', 1, 'under 1'),
    ('seed', -1, 'at least 0'), ('precision', 'half', 'auto, float32, bfloat16, float16'),
])
def test_value_that_is_not_allowed(name, value, allowed, input_error):
    with input_error(f'^{name} must be .*{re.escape(allowed)}'):
        FinetuneSettings(**{name: value})


@pytest.mark.parametrize('text, words', [
    ('sched: cosine', ["'sched'", 'vt-zoo finetune']), ('- 1', ['fields and values']), ('lr: [', ['cannot be read']),
])
def test_recipe_that_cannot_be_used(tmp_path, text, words, input_error):
    (tmp_path / 'recipe.yaml').write_text(text)
    with input_error(''.join(f'(?=.*{re.escape(word)})' for word in ['recipe.yaml', *words])):
        FinetuneSettings.read(str(tmp_path / 'recipe.yaml'))


def test_command_with_a_recipe(command, few_digits, tiny_arguments, tmp_path):
    """A run is that of the same options; a recipe of timm's train.py is refused before anything is written."""
    (tmp_path / 'a.yaml').write_text(
        'model: test_vt_resnet\nepochs: 1\nbatch_size: 8\nimg_size: 32\nwarmup_epochs: 0\n')
    words = ['finetune', few_digits, '--workers', '0', '--device', 'cpu']
    assert command(*words, '--config', tmp_path / 'a.yaml', '--out', tmp_path / 'run').code == 0
    options = ['--model', 'test_vt_resnet', '--epochs', '1', '--batch-size', '8', '--img-size', '32',
        '--warmup-epochs', '0']
    again = command(*words, *options, '--out', tmp_path / 'run', '--resume')
    assert again.code == 0
    assert 'finished' in again.stdout
    refused = command(*words, '--config', 'advanced', '--out', tmp_path / 'other')
    assert refused.code == 2
    assert refused.lines[-1] == 'vt-zoo: error: config advanced is neither a file nor one of digits'
    assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize('kind', [FinetuneSettings, SegmentSettings])
def test_docstring_and_help_say_what_each_field_is(kind):
    parser = create_parser()
    words = {FinetuneSettings: ['finetune'], SegmentSettings: ['segment', 'train']}[kind]
    for word in words:
        parser = next(a for a in parser._actions if isinstance(a.choices, dict)).choices[word]
    text = parser.format_help()
    for f in fields(kind):
        assert re.search(rf'^    {f.name}: \S.*\(default: .+\)\.$', kind.__doc__, re.M)
        assert f'--{f.name.replace("_", "-")} ' in text
