"""Training on a folder of images: reproducible, resumable after a kill at any moment, its accuracy the true one."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import as_in_version_0_1, count_correct, history, interrupted_after, truncate, weights
from PIL import Image

import vt_zoo.classification.train as train_module
from vt_zoo.classification.train import evaluate, finetune
from vt_zoo.data.images import find_split, load_image
from vt_zoo.errors import InputError
from vt_zoo.training.run_state import RunFinishedError
from vt_zoo.weights import load
from vt_zoo.weights.files import read_tensors, write_model, write_tensors
from vt_zoo.weights.loading import load_model

STEPS = 4  # of an epoch of tiny_settings on few_digits

# everything that draws random numbers or keeps a state
RESTLESS = {
    'drop': 0.2, 'drop_path': 0.2, 'color_jitter': 0.4, 'aa': 'rand-m5-mstd0.5', 'hflip': 0.5, 'smoothing': 0.2,
    'warmup_epochs': 1}

def train(data_dir, out, settings, **kwargs):
    return finetune(data_dir, out, settings, device='cpu', progress=False, **kwargs)


@pytest.fixture(scope='module')
def unfinished(few_digits, tiny_settings, tmp_path_factory):
    """A run of two epochs that was interrupted in the second. Not to be changed."""
    out = tmp_path_factory.mktemp('unfinished') / 'run'
    with interrupted_after(STEPS + 2):
        train(few_digits, out, tiny_settings)
    return out


@pytest.fixture
def my_unfinished(unfinished, tmp_path):
    """A copy of unfinished to change."""
    return shutil.copytree(unfinished, tmp_path / 'unfinished')


@pytest.mark.parametrize('resume', [False, True])
def test_same_seed_same_weights(few_digits, tiny_settings, tiny_run, tmp_path, resume, capfd):
    """And nothing is printed without progress."""
    torch.manual_seed(123)
    train(few_digits, tmp_path / 'run', tiny_settings, resume=resume)
    assert weights(tmp_path / 'run') == weights(tiny_run.out)
    assert history(tmp_path / 'run') == history(tiny_run.out)
    assert capfd.readouterr() == ('', '')


def test_starts_from_the_folder_of_a_run(few_digits, tiny_settings, tiny_run, tmp_path):
    settings = replace(tiny_settings, epochs=1, seed=1)
    for name, folder in (('run', tiny_run.out), ('model', tiny_run.out / 'model')):
        train(few_digits, tmp_path / name, replace(settings, model=str(folder)))
    assert weights(tmp_path / 'run') == weights(tmp_path / 'model')


@pytest.mark.slow
@pytest.mark.parametrize('model, size', [
    ('lambda_resnet26t', 32),  # has 3D convolutions
    ('coat_lite_tiny', 224),  # uses parameters twice
    ('densenet121', 32),  # knows no drop_path_rate
])
def test_models_of_timm(few_digits, tiny_settings, tmp_path, model, size):
    result = train(few_digits, tmp_path / 'run', replace(tiny_settings, epochs=1, model=model, img_size=size))
    assert (result.correct, result.total) == count_correct(result.model_dir, few_digits / 'val')
    assert result.same_predictions


def test_drop_path_that_the_model_does_not_know(few_digits, tiny_settings, tmp_path, input_error):
    with input_error("densenet121.* 'drop_path_rate'"):
        train(few_digits, tmp_path / 'run', replace(tiny_settings, model='densenet121', drop_path=0.1))


@pytest.mark.parametrize('changes, words', [
    ({'model': 'test_resnet'}, "model = 'test_vt_resnet.*' instead of 'test_resnet'"),
    ({'model': 'test_vt_resnet.cifar10'}, "model = 'test_vt_resnet.*' instead of 'test_vt_resnet.cifar10'"),
    ({'img_size': None}, 'img_size = 32 instead of None')])
def test_finished_run_is_not_that_of_other_settings(few_digits, tiny_settings, tiny_run, input_error, changes, words):
    with input_error(f'holds a finished run with {words}'):
        train(few_digits, tiny_run.out, replace(tiny_settings, **changes), resume=True)


def test_finished_run_from_a_folder(few_digits, tiny_settings, tiny_run, tmp_path, input_error):
    settings = replace(tiny_settings, epochs=1, model=str(tiny_run.out))
    train(few_digits, tmp_path / 'run', settings)
    with pytest.raises(RunFinishedError):
        train(few_digits, tmp_path / 'run', settings, resume=True)
    with input_error('a finished run with model = .a local folder, SHA-256 of its weights'):
        train(few_digits, tmp_path / 'run', replace(settings, model=str(tmp_path / 'run')), resume=True)


def test_history_of_the_user(few_digits, tiny_settings, tmp_path, input_error):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'history.csv').write_text('mine')
    with input_error('history.csv is there already: add --overwrite to replace it'):
        train(few_digits, tmp_path / 'run', tiny_settings)
    assert (tmp_path / 'run' / 'history.csv').read_text() == 'mine'


def test_image_that_vanishes(my_digits, tiny_settings, tmp_path, monkeypatch, input_error):
    """One sentence also from a process that loads images."""
    original = train_module.describe_split

    def describe(split):
        os.unlink(split.train[0][0])
        return original(split)
    monkeypatch.setattr(train_module, 'describe_split', describe)
    with input_error('does not exist'):
        finetune(my_digits, tmp_path / 'run', tiny_settings, workers=1, device='cpu')


def test_measured_with_the_preprocessing_of_the_model(my_digits, my_model, tiny_settings, tmp_path):
    """As predict prepares pictures: here wide ones are squashed, not cropped."""
    for path in my_digits.rglob('*.png'):
        with Image.open(path) as image:
            image.resize((64, 32)).save(path)
    config = json.loads((my_model / 'config.json').read_text())
    config['pretrained_cfg'].update(crop_mode='squash', crop_pct=0.9)
    (my_model / 'config.json').write_text(json.dumps(config))
    train(my_digits, tmp_path / 'run', replace(tiny_settings, model=str(my_model)))
    loaded = load(tmp_path / 'run')
    assert loaded.preprocessing['crop_mode'] == 'squash'
    losses = []
    for path, target in find_split(my_digits).val:
        with torch.inference_mode():
            logits = loaded.model(loaded.prepare(load_image(path))[None])
        losses.append(F.cross_entropy(logits, torch.tensor([target])).item())
    assert sum(losses) / len(losses) == pytest.approx(float(history(tmp_path / 'run')[-1]['val_loss']), rel=1e-4)


def test_what_is_written(tiny_run, tiny_settings, few_digits):
    assert sorted(os.listdir(tiny_run.out)) == ['history.csv', 'model']
    rows = history(tiny_run.out)
    assert [row['epoch'] for row in rows] == ['1', '2']
    assert all(0 < float(row['train_loss']) < 10 and 0 < float(row['val_loss']) < 10 for row in rows)
    model = load_model(str(tiny_run.out / 'model'))
    assert list(model.pretrained_cfg['label_names']) == ['0', '1', '2']
    assert tuple(model.pretrained_cfg['input_size']) == (3, tiny_settings.img_size, tiny_settings.img_size)


def test_result_is_the_accuracy_that_timm_finds(tiny_run, few_digits):
    result = tiny_run.result
    assert result.model_dir == tiny_run.out / 'model'
    assert (result.correct, result.total) == count_correct(result.model_dir, few_digits / 'val')
    assert (result.reloaded_correct, result.same_predictions) == (result.correct, True)
    assert float(history(tiny_run.out)[-1]['val_top1']) == pytest.approx(100 * result.correct / result.total)


@pytest.mark.parametrize('ema_decay, kept', [(0., 'as trained'), (0.9, 'moving average')])
def test_measured_in_float32_whatever_the_precision_of_training(few_digits, tiny_settings, tmp_path, ema_decay, kept):
    settings = replace(tiny_settings, epochs=1, precision='bfloat16', model_ema_decay=ema_decay)
    result = train(few_digits, tmp_path / 'run', settings)
    loaded = load(tmp_path / 'run')
    split = find_split(few_digits).val
    batch = torch.stack([loaded.prepare(load_image(path)) for path, _ in split])
    with torch.inference_mode():
        loss = F.cross_entropy(loaded.model(batch), torch.tensor([target for _, target in split])).item()
    assert float(history(tmp_path / 'run')[-1]['val_loss']) == pytest.approx(loss, rel=1e-5)
    assert result.same_predictions
    assert json.loads((tmp_path / 'run' / 'model' / 'config.json').read_text())['training']['weights'] == kept


def test_difference_after_reloading_is_told(few_digits, tiny_settings, tmp_path, monkeypatch):
    def write_another(path, model, *args):
        with torch.no_grad():
            model.fc.bias += torch.tensor([0., 0., 1000.])
        write_model(path, model, *args)

    monkeypatch.setattr('vt_zoo.classification.train.write_model', write_another)
    result = train(few_digits, tmp_path / 'run', replace(tiny_settings, epochs=1))
    assert not result.same_predictions
    assert result.reloaded_correct == 6


def test_split_on_the_fly(class_folders, tiny_settings, tmp_path):
    result = train(class_folders, tmp_path / 'run', replace(tiny_settings, epochs=1, val_fraction=0.25))
    split = find_split(class_folders, 0.25, tiny_settings.seed)
    assert result.total == len(split.val) == 9
    assert result.val_samples == split.val
    predictions = []
    for path, target in split.val:
        folder = tmp_path / 'val' / split.classes[target]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
        predictions.append(target)
    assert count_correct(result.model_dir, tmp_path / 'val') == (result.correct, 9)


@pytest.mark.parametrize('steps', [2, STEPS + 2, 2 * STEPS + 1])
def test_interrupted_and_resumed(few_digits, tiny_settings, tmp_path, steps):
    settings = replace(tiny_settings, epochs=3, **RESTLESS)
    train(few_digits, tmp_path / 'whole', settings)
    with interrupted_after(steps):
        train(few_digits, tmp_path / 'run', settings)
    left = os.listdir(tmp_path / 'run') if (tmp_path / 'run').exists() else []
    assert left == (['checkpoint.safetensors'] if steps > STEPS else [])
    torch.manual_seed(123)
    train(few_digits, tmp_path / 'run', settings, resume=True)
    assert weights(tmp_path / 'run') == weights(tmp_path / 'whole')
    assert history(tmp_path / 'run') == history(tmp_path / 'whole')
    assert sorted(os.listdir(tmp_path / 'run')) == ['history.csv', 'model']


@pytest.mark.parametrize('changes, workers', [
    ({'precision': 'bfloat16'}, 0),
    ({'opt': 'adamw', 'lr': 1e-3}, 2),
    ({'opt': 'lamb', 'lr': 1e-3}, 0),  # counts its steps for each group of parameters
    *(pytest.param(*values, marks=pytest.mark.slow) for values in [
        ({'opt': 'sgd'}, 0), ({'opt': 'adanw', 'lr': 1e-3}, 0), ({'opt': 'rmsproptf', 'lr': 1e-3}, 0),
        ({'opt': 'adamw', 'lr': 1e-3}, 0),
        ({}, 2)]),
])
def test_interrupted_and_resumed_with(few_digits, tiny_settings, tmp_path, changes, workers):
    settings = replace(tiny_settings, **RESTLESS, **changes)
    train(few_digits, tmp_path / 'whole', settings, workers=workers)
    with interrupted_after(STEPS + 2):
        train(few_digits, tmp_path / 'run', settings, workers=workers)
    train(few_digits, tmp_path / 'run', settings, workers=workers, resume=True)
    assert weights(tmp_path / 'run') == weights(tmp_path / 'whole')


def test_interrupted_twice(few_digits, tiny_settings, tiny_run, my_unfinished):
    with interrupted_after(1):
        train(few_digits, my_unfinished, tiny_settings, resume=True)
    train(few_digits, my_unfinished, tiny_settings, resume=True)
    assert weights(my_unfinished) == weights(tiny_run.out)


@pytest.mark.parametrize('function, call, after', [
    ('timm.utils.ModelEmaV3.update', STEPS + 2, False),  # in the second epoch
    ('os.replace', 1, False),  # the checkpoint of the first epoch is written, but not in its place
    ('os.replace', 2, False),  # it was, the epoch is evaluated
    ('os.replace', 3, False),  # the checkpoint of the second epoch, which replaces it, is not in its place
    ('os.replace', 5, False),  # training is over, the model is written but not in its place
    ('os.replace', 5, True),  # the model is in its place, the history is not
    ('os.replace', 6, True),  # both are, and the checkpoint is still there
])
def test_killed_and_resumed(
        command, signal_at, few_digits, tiny_arguments, tiny_run, tmp_path, function, call, after):
    out = tmp_path / 'run'
    words = ['finetune', few_digits, *tiny_arguments, '--out', out]
    killed = command(*words, before=signal_at(function, call, signal.SIGKILL, after))
    assert killed.code == -signal.SIGKILL
    if (out / 'checkpoint.safetensors').exists():
        assert len(read_tensors(out / 'checkpoint.safetensors')[1]['history']) in (0, 1, 2)
    if (out / 'model').exists():
        assert weights(out) == weights(tiny_run.out)
    assert command(*words, '--resume').code == 0
    assert weights(out) == weights(tiny_run.out)
    assert history(out) == history(tiny_run.out)
    assert sorted(os.listdir(out)) == ['history.csv', 'model']  # and no half-written file


@pytest.mark.slow
def test_kill_9_of_a_real_process(command, few_digits, tiny_arguments, tiny_settings, tmp_path):
    out = tmp_path / 'run'
    words = ['finetune', few_digits, *tiny_arguments, '--epochs', '5', '--out', out]
    process = subprocess.Popen(
        [sys.executable, '-m', 'vt_zoo', *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / 'checkpoint.safetensors').exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / 'model').exists()
    assert command(*words, '--resume').code == 0
    train(few_digits, tmp_path / 'whole', replace(tiny_settings, epochs=5))
    assert weights(out) == weights(tmp_path / 'whole')


@pytest.mark.parametrize('name, value', [
    ('model', 'test_resnet'), ('model_kwargs', {'num_tokens': 4}), ('epochs', 3), ('batch_size', 9), ('img_size', 48),
    ('opt', 'adamw'), ('lr', 0.01),
    ('weight_decay', 0.1), ('warmup_epochs', 1), ('smoothing', 0.), ('drop', 0.1), ('drop_path', 0.1),
    ('model_ema_decay', 0.9), ('scale', (0.5, 1.)), ('ratio', (1., 1.)), ('hflip', 0.5), ('color_jitter', 0.),
    ('aa', 'rand-m9'), ('seed', 1), ('precision', 'bfloat16')])
def test_resuming_with_other_settings(few_digits, tiny_settings, unfinished, name, value, input_error):
    before = (unfinished / 'checkpoint.safetensors').read_bytes()
    with input_error(f'{name} = '):
        train(few_digits, unfinished, replace(tiny_settings, **{name: value}), resume=True)
    assert os.listdir(unfinished) == ['checkpoint.safetensors']
    assert (unfinished / 'checkpoint.safetensors').read_bytes() == before


def test_resuming_with_other_images_or_classes(my_digits, tiny_settings, unfinished, input_error):
    next((my_digits / 'train' / '1').iterdir()).unlink()
    with input_error('train_images = 36'):
        train(my_digits, unfinished, tiny_settings, resume=True)
    for split in ('train', 'val'):
        (my_digits / split / '2').rename(my_digits / split / 'two')
    with input_error('classes = '):
        train(my_digits, unfinished, tiny_settings, resume=True)


def test_resuming_from_a_truncated_checkpoint(few_digits, tiny_settings, my_unfinished, input_error):
    truncate(my_unfinished / 'checkpoint.safetensors')
    with input_error(r'checkpoint\.safetensors cannot be read'):
        train(few_digits, my_unfinished, tiny_settings, resume=True)


def test_resuming_from_a_file_of_another_kind(few_digits, tiny_settings, my_unfinished, input_error):
    write_tensors(my_unfinished / 'checkpoint.safetensors', {'x': torch.zeros(1)}, {'a': 1})
    with input_error(r'checkpoint\.safetensors|holds a run'):
        train(few_digits, my_unfinished, tiny_settings, resume=True)


def test_checkpoint_holds_complete_epochs(unfinished):
    tensors, metadata = read_tensors(unfinished / 'checkpoint.safetensors')
    assert [row['epoch'] for row in metadata['history']] == [1]
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize('resume', [False, True])
def test_finished_run_is_kept(few_digits, tiny_settings, tiny_run, resume, input_error):
    before = {p: p.stat().st_mtime_ns for p in tiny_run.out.rglob('*')}
    with input_error('finished run.*--overwrite'):
        train(few_digits, tiny_run.out, replace(tiny_settings, seed=1), resume=resume)
    assert {p: p.stat().st_mtime_ns for p in tiny_run.out.rglob('*')} == before


def test_finished_run_is_overwritten_if_asked(few_digits, tiny_settings, tiny_run, tmp_path):
    out = shutil.copytree(tiny_run.out, tmp_path / 'run')
    train(few_digits, out, replace(tiny_settings, epochs=1), overwrite=True)
    assert weights(out) != weights(tiny_run.out)
    assert len(history(out)) == 1


def test_unfinished_run_is_kept(few_digits, tiny_settings, unfinished, input_error):
    with input_error('unfinished run.*--resume'):
        train(few_digits, unfinished, tiny_settings)
    assert os.listdir(unfinished) == ['checkpoint.safetensors']


def test_run_of_version_0_1_cannot_go_on(few_digits, tiny_settings, my_unfinished, input_error):
    checkpoint = my_unfinished / 'checkpoint.safetensors'
    tensors, metadata = read_tensors(checkpoint)
    write_tensors(checkpoint, as_in_version_0_1(tensors), metadata)
    before = checkpoint.read_bytes()
    with input_error('the run cannot go on: its weights are of vt_zoo 0.1'):
        train(few_digits, my_unfinished, tiny_settings, resume=True)
    assert checkpoint.read_bytes() == before


def test_overwriting_run_that_is_interrupted_can_be_resumed(
        few_digits, tiny_settings, tiny_run, my_unfinished, tmp_path):
    settings = replace(tiny_settings, seed=1)
    train(few_digits, tmp_path / 'whole', settings)
    assert weights(tmp_path / 'whole') != weights(tiny_run.out), 'the seed matters'
    with interrupted_after(2):
        train(few_digits, my_unfinished, settings, overwrite=True)
    train(few_digits, my_unfinished, settings, resume=True)
    assert weights(my_unfinished) == weights(tmp_path / 'whole')


def shapes(model):
    return {name: weight.shape for name, weight in model.state_dict().items()}


@pytest.mark.parametrize(('model', 'model_kwargs'), [
    ('vt_net', {'trunk': 'test_efficientnet', 'token_dim': 32}),
    ('test_vt_resnet', {'layers': (1, 1, 1, 1), 'token_mixer': 'graph'}), ('test_resnet', {})])
def test_arguments_of_the_model(few_digits, tiny_settings, tmp_path, model, model_kwargs):
    settings = replace(tiny_settings, model=model, model_kwargs=model_kwargs)
    with interrupted_after(1):
        train(few_digits, tmp_path / 'run', settings)
    result = train(few_digits, tmp_path / 'run', settings, resume=True)
    loaded = load_model(str(tmp_path / 'run' / 'model'))
    expected = timm.create_model(model, **model_kwargs, num_classes=3)
    assert result.same_predictions
    assert (result.correct, result.total) == count_correct(result.model_dir, few_digits / 'val')
    assert shapes(loaded) == shapes(expected)
    with pytest.raises(RunFinishedError):
        train(few_digits, tmp_path / 'run', settings, resume=True)


@pytest.mark.parametrize(('model_kwargs', 'words'), [
    ({'num_classes': 3}, 'model_kwargs must not hold num_classes'), ({'checkpoint_path': 'x'}, 'checkpoint_path'),
    ({'no_such': 1}, 'cannot be trained here: .*no_such'), ({'num_tokens': -1}, 'num_tokens'),
    ({'global_pool': ''}, 'does not give one logit per class')])
def test_arguments_that_no_model_can_have(few_digits, tiny_settings, tmp_path, model_kwargs, words, input_error):
    with input_error(words):
        train(few_digits, tmp_path / 'run', replace(tiny_settings, model_kwargs=model_kwargs))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('lr', [1e4, 1e6])
def test_learning_rate_that_is_too_high(few_digits, tiny_settings, tmp_path, lr):
    try:
        train(few_digits, tmp_path / 'run', replace(tiny_settings, lr=lr))
    except InputError as e:
        assert 'the loss became' in str(e) and 'lower lr' in str(e)
        assert not (tmp_path / 'run' / 'model').exists()
    else:
        assert all(float(row['train_loss']) < float('inf') for row in history(tmp_path / 'run'))
        tensors = load_model(str(tmp_path / 'run' / 'model')).state_dict().values()
        assert all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize('batch_size', [1, 36, 1000])
def test_batch_size(few_digits, tiny_settings, tmp_path, batch_size):
    result = train(few_digits, tmp_path / 'run', replace(tiny_settings, batch_size=batch_size, epochs=1))
    assert (result.correct, result.total) == count_correct(result.model_dir, few_digits / 'val')


def test_four_images(my_digits, tiny_settings, tmp_path):
    for name in '01':
        for path in sorted((my_digits / 'train' / name).iterdir())[2:]:
            path.unlink()
    shutil.rmtree(my_digits / 'train' / '2')
    result = train(my_digits / 'train', tmp_path / 'run', replace(tiny_settings, epochs=1))
    assert result.total == 2


def test_start_from_a_model_of_other_classes(few_digits, my_digits, tiny_settings, tiny_model, tmp_path):
    for split in ('train', 'val'):
        shutil.rmtree(my_digits / split / '0')
    settings = replace(tiny_settings, model=str(tiny_model), epochs=1, lr=1e-9)
    result = train(my_digits, tmp_path / 'run', settings)
    model = load_model(str(result.model_dir))
    assert model.num_classes == 2
    assert list(model.pretrained_cfg['label_names']) == ['1', '2']
    start = load_model(str(tiny_model))
    for name, parameter in model.named_parameters():
        if not name.startswith('fc.'):
            torch.testing.assert_close(parameter, start.get_parameter(name), rtol=0, atol=1e-4)


def test_start_from_a_model_of_the_same_classes_keeps_the_classifier(few_digits, tiny_settings, tiny_model, tmp_path):
    settings = replace(tiny_settings, model=str(tiny_model), epochs=1, lr=1e-9)
    model = load_model(str(train(few_digits, tmp_path / 'run', settings).model_dir))
    torch.testing.assert_close(model.fc.weight, load_model(str(tiny_model)).fc.weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize('changes, match', [
    ({'model': 'no_such_model'}, 'no_such_model'),
    ({'model': 'vt_resnet18.no_such_tag'}, 'no_such_tag'),
    ({'model': 'local-dir:no/such/folder'}, 'no/such/folder'),
    ({'model': 'vit_tiny_patch16_224'}, '224'),  # takes no other size
    ({'img_size': 16}, '32'),
    ({'aa': 'nosuchpolicy'}, 'nosuchpolicy'),
    ({'precision': 'float16'}, 'is for GPUs, on a CPU float32 and bfloat16 are allowed'),
])
def test_settings_that_cannot_be_used(few_digits, tiny_settings, tmp_path, changes, match, input_error):
    with input_error(match):
        train(few_digits, tmp_path / 'run', replace(tiny_settings, **changes))
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]


def test_no_gpu(few_digits, tiny_settings, tmp_path, monkeypatch, input_error):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with input_error('cuda'):
        finetune(few_digits, tmp_path / 'run', tiny_settings, device='cuda')
    assert not (tmp_path / 'run').exists()


def test_one_gpu_of_several(few_digits, tiny_settings, tmp_path, monkeypatch, input_error):
    monkeypatch.setattr('vt_zoo.training.loop.find_device', torch.device)
    monkeypatch.setattr('vt_zoo.classification.train.find_device', torch.device)
    with input_error('device must be cpu, cuda or mps, got cuda:1: choose a GPU by CUDA_VISIBLE_DEVICES'):
        finetune(few_digits, tmp_path / 'run', tiny_settings, device='cuda:1')
    assert not (tmp_path / 'run').exists()


class Lookup(torch.nn.Module):
    """Logits that are the input, in eval mode alone."""

    def forward(self, x):
        assert not self.training
        return x


def test_evaluate():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 8, generator=generator)
    targets = torch.randint(8, (50,), generator=generator)
    model = Lookup().train()
    loader = [(logits[i:i + 7], targets[i:i + 7]) for i in range(0, 50, 7)]
    metrics, predictions = evaluate(model, loader, torch.device('cpu'))
    assert metrics['top1'] == pytest.approx(100 * (logits.argmax(1) == targets).sum().item() / 50)
    assert metrics['loss'] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert torch.equal(predictions, logits.argmax(1))
