"""The recipes for timm's train.py: the paper's values, through timm's own scheduler, optimizer, model and loss."""
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import needs_timm_that_reads_folders
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from vt_zoo.recipes import list_recipes, recipe_path

GPUS = 8
# what train.py has where a recipe is silent, for the functions of timm that read its arguments
TRAIN_PY = {
    'opt_eps': None, 'opt_betas': None, 'layer_decay': None, 'layer_decay_min_scale': 0,
    'layer_decay_no_opt_scale': None, 'opt_kwargs': {}, 'sched_on_updates': False, 'lr_noise': None,
    'lr_noise_pct': 0.67, 'lr_noise_std': 1., 'lr_cycle_mul': 1., 'lr_cycle_decay': 0.5, 'lr_cycle_limit': 1,
    'lr_k_decay': 1., 'warmup_lr': 1e-5, 'min_lr': 0., 'decay_milestones': [90, 180, 270], 'warmup_prefix': False,
    'cooldown_epochs': 0, 'patience_epochs': 10, 'seed': 42}


def read(name):
    return yaml.safe_load(recipe_path(name).read_text())


def arguments(name):
    return SimpleNamespace(**{**TRAIN_PY, **read(name)})


def optimizer_of(name, model):
    args = arguments(name)
    return create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)


def learning_rates(name):
    """Of each epoch, as train.py steps timm's scheduler: once before the first and after each."""
    model = timm.create_model('test_vt_resnet', device='meta')
    optimizer = optimizer_of(name, model)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(arguments(name)), updates_per_epoch=626)
    rates = []
    for epoch in range(epochs):
        assert len({group['lr'] / group.get('lr_scale', 1.) for group in optimizer.param_groups}) == 1
        rates.append(optimizer.param_groups[0]['lr'] / optimizer.param_groups[0].get('lr_scale', 1.))
        scheduler.step(epoch + 1)
    return rates


def test_names():
    assert list_recipes() == ['advanced', 'finetune', 'plain']


def test_unknown_name():
    with pytest.raises(ValueError, match=r"recipe must be one of advanced, finetune, plain, got 'no_such'"):
        recipe_path('no_such')


@pytest.mark.parametrize('name', ['plain', 'advanced'])
def test_each_value_says_where_it_is_from(name):
    values = [line for line in recipe_path(name).read_text().splitlines() if line and not line.startswith('#')]
    assert [line for line in values if ' # ' not in line and not line.endswith(':')] == []


@pytest.mark.parametrize('name', list_recipes())
def test_values_have_their_types(name):
    """YAML reads 1e-3 as text."""
    text = {key: value for key, value in read(name).items() if isinstance(value, str)}
    assert [key for key, value in text.items() if value[0].isdigit()] == []


def test_learning_rate_of_plain():
    assert learning_rates('plain') == pytest.approx([0.1] * 30 + [0.01] * 30 + [0.001] * 30)


def test_learning_rate_of_advanced():
    """0.01 rising to 0.16 in 5 epochs, then times 0.9875 an epoch, 400 in all: section 5.2."""
    warmup = np.interp(range(5), [0, 5], [0.01, 0.16])
    decay = 0.16 * np.cumprod([1.] + [0.9875] * 394)
    assert learning_rates('advanced') == pytest.approx([*warmup, *decay], rel=1e-9)
    assert read('advanced')['batch_size'] * GPUS == 2048


@pytest.mark.parametrize('name, kind, expected', [
    ('plain', 'SGD', {'momentum': 0.9, 'nesterov': False, 'weight_decay': 4e-5}),
    ('advanced', 'RMSpropTF', {'momentum': 0.9})])
def test_optimizer(name, kind, expected):
    optimizer = optimizer_of(name, timm.create_model('test_vt_resnet'))
    assert type(optimizer).__name__ == kind
    for group in optimizer.param_groups:
        assert {key: group[key] for key in expected} == expected


def test_stochastic_depth_and_dropout_of_advanced():
    recipe = read('advanced')
    model = timm.create_model(
        'vt_resnet50', drop_rate=recipe['drop'], drop_path_rate=recipe['drop_path'], device='meta')
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == 'DropPath']
    assert model.drop_rate == 0.2
    assert max(rates) == pytest.approx(0.1)
    assert rates == sorted(rates)


def test_teacher_of_advanced():
    name = read('advanced')['kd_model_name']
    assert timm.models.get_pretrained_cfg(name).architecture == 'fbnetv3_g'
    assert timm.models.get_pretrained_cfg(name).has_weights


def log_softmax(x):
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


@needs_timm_that_reads_folders
def test_loss_of_advanced(tmp_path):
    """0.2 CE(smoothed) + 0.8 KL(teacher, student), through timm.task and in float64."""
    task_module = pytest.importorskip('timm.task', reason='timm has no timm.task before 1.0.23')
    recipe = read('advanced')
    teacher = timm.create_model('test_vt_resnet', num_classes=7)
    timm.models.save_for_hf(teacher, str(tmp_path), safe_serialization=True)
    student = timm.create_model('test_vt_resnet', num_classes=7)
    task = task_module.LogitDistillationTask(
        student_model=student, teacher_model=f'local-dir:{tmp_path}', verbose=False,
        criterion=LabelSmoothingCrossEntropy(smoothing=recipe['smoothing']),
        task_loss_weight=recipe['task_loss_weight'], distill_loss_weight=recipe.get('distill_loss_weight'),
        temperature=recipe['kd_temperature'])
    task.eval()  # so that the student's norms and ours see the same
    x, y = 3 * torch.randn(5, 3, 64, 64), torch.tensor([0, 6, 3, 3, 1])
    loss = task(x, y)['loss']
    with torch.no_grad():
        student_log, teacher_log = (
            log_softmax(m.eval().double()(x.double()).numpy()) for m in (student, teacher))
    smooth = np.full((5, 7), 0.1 / 7)
    smooth[range(5), y] += 0.9
    cross_entropy = -(smooth * student_log).sum(1).mean()
    distillation = (np.exp(teacher_log) * (teacher_log - student_log)).sum(1).mean()
    assert distillation > 1e-4
    assert loss.item() == pytest.approx(0.2 * cross_entropy + 0.8 * distillation, rel=1e-4)


@pytest.fixture
def train_py(timm_clone):
    """timm's train.py as a module."""
    spec = importlib.util.spec_from_file_location('timm_train_script', timm_clone / 'train.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('name', list_recipes())
def test_keys_are_arguments_of_train_py(train_py, name):
    actions = {action.dest: action for action in train_py.parser._actions}
    recipe = read(name)
    assert sorted(recipe.keys() - actions.keys()) == []
    for key, value in recipe.items():
        choices, kind = actions[key].choices, actions[key].type
        assert choices is None or value in choices
        values = value if isinstance(value, list) else [value]
        assert kind is None or all(type(v) in (kind, int) for v in values), key


def commands_of_the_docs():
    root = Path(__file__).parents[2]
    text = ''.join((root / name).read_text() for name in ('README.md', 'docs/training.md')).replace('\\\n', ' ')
    return [line for line in text.splitlines() if re.match(r'(torchrun|python) .*train\.py ', line)]


@pytest.mark.parametrize('command', commands_of_the_docs(), ids=range(len(commands_of_the_docs())))
def test_train_py_reads_the_commands_of_the_docs(train_py, monkeypatch, command):
    command = re.sub(r'\$\(vt-zoo recipe (\w+)\)', lambda match: str(recipe_path(match[1])), command)
    monkeypatch.setattr(sys, 'argv', shlex.split(command[command.index('train.py'):]))
    args, _ = train_py._parse_args()
    assert args.device_modules == ['vt_zoo']
    assert timm.is_model(args.model)


@pytest.mark.parametrize('name', list_recipes())
def test_train_py_reads_it(train_py, monkeypatch, name):
    monkeypatch.setattr(sys, 'argv', ['train.py', '-c', str(recipe_path(name)), '--model', 'vt_resnet50'])
    defaults = vars(train_py.parser.parse_args([]))
    args, _ = train_py._parse_args()
    assert {key: vars(args)[key] for key in read(name)} == read(name)
    assert {key for key, value in TRAIN_PY.items() if defaults[key] != value} == set()
