"""Training of segmentation models: the sum it computes, reproducible, resumable after a kill at any moment."""
import csv
import json
import multiprocessing
import os
import shutil
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import WRITTEN, outcome, run_by_two, tree, words_of
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from vt_zoo.segmentation import train as train_module
from vt_zoo.segmentation.datasets import load_dataset
from vt_zoo.segmentation.metrics import SegmentMetrics, evaluate
from vt_zoo.segmentation.settings import SegmentSettings
from vt_zoo.segmentation.train import create_segmenter, encoder_statistics, train_segmenter
from vt_zoo.segmentation.transforms import eval_transform, train_transform
from vt_zoo.training.loop import Loop
from vt_zoo.training.sampling import IterationBatches, SeededDataset
from vt_zoo.weights import load
from vt_zoo.weights.files import read_tensors, write_tensors


def run(data_dir, out, settings, resume=False, overwrite=False, workers=0, **changes):
    settings = SegmentSettings.read(None, {**settings, **changes})
    return train_segmenter(data_dir, out, settings, resume, overwrite, workers, device='cpu', progress=False)


def weights(folder):
    return (folder / 'model.safetensors').read_bytes()


def history(out):
    with (out / 'history.csv').open(newline='') as f:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(f)]


def measure(model_dir, data_dir):
    """Measures of a model's files on the validation images."""
    loaded = load(model_dir)
    mean, std = loaded.preprocessing['mean'], loaded.preprocessing['std']
    dataset = load_dataset('folder', data_dir, 'val', eval_transform(mean, std))
    return evaluate(loaded.model, DataLoader(dataset), len(loaded.classes), loaded.eval_size)


@contextmanager
def interrupted_in(iteration):
    """Ctrl-C as an iteration, counted from 0, begins."""
    def interrupt(self, *args):
        if self.iteration == iteration:
            raise KeyboardInterrupt
        return step(self, *args)

    step = Loop.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, 'step', interrupt)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.fixture(scope='module')
def unfinished(composed, segment_settings, tmp_path_factory):
    """A run that was interrupted after iteration 5, with a checkpoint of iteration 4. Not to be changed."""
    out = tmp_path_factory.mktemp('unfinished') / 'run'
    with interrupted_in(5):
        run(composed, out, segment_settings)
    return out


@pytest.fixture
def my_unfinished(unfinished, tmp_path):
    """A copy of unfinished to change."""
    return shutil.copytree(unfinished, tmp_path / 'unfinished')


def test_what_is_written(segment_run, segment_settings):
    out = segment_run.out
    assert sorted(os.listdir(out)) == WRITTEN
    for name in ('best', 'last'):
        assert sorted(os.listdir(out / name)) == ['README.md', 'config.json', 'model.safetensors']
    rows = history(out)
    assert [row['iteration'] for row in rows] == [4, 8]
    assert list(rows[0]) == ['iteration', 'train_loss', 'miou', 'pixel_accuracy']
    assert all(0 < row['train_loss'] < 10 for row in rows)


def test_result_is_what_the_files_give(segment_run, composed):
    result, rows = segment_run.result, history(segment_run.out)
    assert (result.best_dir, result.last_dir) == (segment_run.out / 'best', segment_run.out / 'last')
    assert result.last == measure(result.last_dir, composed)
    assert result.best_miou == measure(result.best_dir, composed).miou == max(row['miou'] for row in rows)
    assert (rows[-1]['miou'], rows[-1]['pixel_accuracy']) == (result.last.miou, result.last.pixel_accuracy)


@pytest.mark.parametrize('arch', ['vt_fpn', pytest.param('panoptic_fpn', marks=pytest.mark.slow)])
def test_digits_are_learned(my_composed, segment_settings, tmp_path, arch):
    """A model that always says background has a mean IoU below 0.1."""
    for kind in ('images', 'masks'):
        for path in sorted((my_composed / kind / 'train').iterdir())[3:]:
            path.unlink()
        shutil.rmtree(my_composed / kind / 'val')
        shutil.copytree(my_composed / kind / 'train', my_composed / kind / 'val')
    result = run(
        my_composed, tmp_path / 'run', segment_settings, arch=arch, iterations=60, crop_size=[48, 48], scale=[1, 1],
        hflip=0., ema_decay=0., eval_every=20, checkpoint_every=1000)
    losses = [row['train_loss'] for row in history(tmp_path / 'run')]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.3 * losses[0]
    assert result.best_miou > 0.4
    assert result.last.pixel_accuracy > 0.9


def train_literally(data_dir, settings, steps):
    """The weights after so many iterations, in plain torch. Norms and biases have no weight decay, as in timm."""
    data = load_dataset('folder', data_dir, 'train')
    data.transform = train_transform(settings.crop_size, settings.scale, settings.hflip, settings.mean, settings.std)
    torch.manual_seed(settings.seed)
    model = create_segmenter(settings, len(data.classes)).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([
        {'params': [p for p in model.parameters() if p.ndim > 1], 'weight_decay': settings.weight_decay},
        {'params': [p for p in model.parameters() if p.ndim <= 1], 'weight_decay': 0.},
    ], lr=settings.lr, momentum=settings.momentum, nesterov=settings.opt == 'nesterov')
    loader = DataLoader(SeededDataset(data), batch_sampler=IterationBatches(
        len(data), settings.batch_size, 0, steps, settings.seed))
    losses, kept = [], []
    for i, (images, masks) in enumerate(loader):
        for group in optimizer.param_groups:
            group['lr'] = settings.lr * (1 - i / settings.iterations) ** settings.power
        loss = F.cross_entropy(model(images), masks, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
    return losses, kept


LITERAL = {'warmup': 0, 'mean': [0.4, 0.5, 0.6], 'std': [0.2, 0.3, 0.2], 'weight_decay': 0.01, 'eval_every': 100}


@pytest.mark.parametrize('arch', ['vt_fpn', 'panoptic_fpn'])
def test_run_is_plain_sgd(composed, segment_settings, tmp_path, arch):
    changes = {**LITERAL, 'arch': arch, 'ema_decay': 0., 'iterations': 4}
    run(composed, tmp_path / 'run', segment_settings, **changes)
    losses, kept = train_literally(composed, SegmentSettings.read(None, {**segment_settings, **changes}), 4)
    saved = load_file(tmp_path / 'run' / 'last' / 'model.safetensors')
    torch.testing.assert_close(saved, kept[-1], rtol=1e-4, atol=1e-5)
    assert history(tmp_path / 'run')[0]['train_loss'] == pytest.approx(np.mean(losses), rel=1e-4)


def test_moving_average_is_kept(composed, segment_settings, tmp_path):
    """timm's: from decay 0 at the first update, 1 - (1 + step) ** (-2 / 3) at the later ones, at most `ema_decay`."""
    changes = {**LITERAL, 'ema_decay': 0.4, 'iterations': 4}
    run(composed, tmp_path / 'run', segment_settings, **changes)
    _, kept = train_literally(composed, SegmentSettings.read(None, {**segment_settings, **changes}), 4)
    torch.manual_seed(0)
    average = create_segmenter(SegmentSettings.read(None, segment_settings), 11).state_dict()
    for step, state in enumerate(kept, 1):
        decay = min(0.4, max(0., 1 - step ** (-2 / 3)))
        average = {n: decay * average[n] + (1 - decay) * v if v.is_floating_point() else v for n, v in state.items()}
    saved = load_file(tmp_path / 'run' / 'last' / 'model.safetensors')
    torch.testing.assert_close(saved, average, rtol=1e-4, atol=1e-5)


def test_best_is_the_best_by_mean_iou_and_the_first_of_equals(composed, segment_settings, tmp_path, monkeypatch):
    states, scores = [], [0.2, 0.5, 0.1, 0.5, 0.3]

    def scripted(model, *args):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return SegmentMetrics(scores[len(states) - 1], [None] * 11, 0.5)

    monkeypatch.setattr(train_module, 'evaluate', scripted)
    result = run(composed, tmp_path / 'run', segment_settings, iterations=5, eval_every=1)
    best, last = (load_file(tmp_path / 'run' / name / 'model.safetensors') for name in ('best', 'last'))
    assert result.best_miou == 0.5
    assert all(torch.equal(best[name], states[1][name]) for name in best)
    assert all(torch.equal(last[name], states[-1][name]) for name in last)
    assert 'mIoU on 3 validation images: 50.00 %' in (tmp_path / 'run' / 'best' / 'README.md').read_text()
    assert 'mIoU on 3 validation images: 30.00 %' in (tmp_path / 'run' / 'last' / 'README.md').read_text()


def test_preprocessing_is_the_encoders_or_the_recipes(composed, segment_settings, segment_run, tmp_path):
    own = load(segment_run.out / 'last')
    assert own.preprocessing['mean'] == own.preprocessing['std'] == (0.5, 0.5, 0.5)  # of timm's test_resnet
    run(composed, tmp_path / 'run', segment_settings, iterations=1, mean=[0.1, 0.2, 0.3], std=[1, 2, 3], eval_size=40)
    given = load(tmp_path / 'run' / 'last')
    assert (given.preprocessing['mean'], given.preprocessing['std']) == ((0.1, 0.2, 0.3), (1, 2, 3))
    assert given.eval_size == 40


def test_preprocessing_of_pretrained_weights_of_segmentation_models_pytorch(tmp_path, monkeypatch):
    """It is on the hub, as the weights are."""
    (tmp_path / 'config.json').write_text(json.dumps({'mean': [0.5, 0.4, 0.3], 'std': [0.1, 0.2, 0.3]}))
    monkeypatch.setattr(
        'segmentation_models_pytorch.encoders.hf_hub_download', lambda *args, **kwargs: tmp_path / 'config.json')
    settings = SegmentSettings(encoder_name='xception', encoder_weights=True)
    assert encoder_statistics(settings) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))


@pytest.mark.parametrize('changes, workers', [
    ({}, 2),
    pytest.param({'ema_decay': 0.}, 0, marks=pytest.mark.slow),
    ({'opt': 'adamw', 'lr': 1e-3, 'arch': 'panoptic_fpn', 'schedule': 'cosine'}, 0),
    pytest.param(
        {'encoder_name': 'tu-test_vt_resnet', 'schedule': 'multistep', 'steps': [5]}, 0, marks=pytest.mark.slow),
    pytest.param({'encoder_name': 'efficientnet-b0'}, 0, marks=pytest.mark.slow),  # has random depth
    pytest.param({'eval_size': [40, 36], 'mean': [0.4, 0.5, 0.6]}, 0, marks=pytest.mark.slow),
])
def test_interrupted_and_resumed_with(composed, segment_settings, tmp_path, changes, workers):
    run(composed, tmp_path / 'whole', segment_settings, **changes)
    with interrupted_in(5):
        run(composed, tmp_path / 'run', segment_settings, workers=workers, **changes)
    torch.manual_seed(123)
    run(composed, tmp_path / 'run', segment_settings, workers=workers, resume=True, **changes)
    assert outcome(tmp_path / 'run') == outcome(tmp_path / 'whole')


def test_checkpoint_before_each_evaluation(composed, segment_settings, segment_run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train_module, 'evaluate', lambda *args: 1 / 0)
        run(composed, tmp_path / 'run', segment_settings, checkpoint_every=1000)
    metadata = read_tensors(tmp_path / 'run' / 'checkpoint.safetensors')[1]
    assert (metadata['iteration'], metadata['history']) == (4, [])
    run(composed, tmp_path / 'run', segment_settings, resume=True, checkpoint_every=1000)
    assert outcome(tmp_path / 'run') == outcome(segment_run.out)


def test_resumed_again_and_again(composed, segment_settings, segment_run, tmp_path):
    for iteration in (3, 5, 6):
        with interrupted_in(iteration):
            run(composed, tmp_path / 'run', segment_settings, resume=True)
    run(composed, tmp_path / 'run', segment_settings, resume=True)
    assert outcome(tmp_path / 'run') == outcome(segment_run.out)


# what takes its place: 1 checkpoint 2, 2 checkpoint 4, 3 best/ of 4, 4 checkpoint 4 with its measures, then the end
@pytest.mark.parametrize('function, call, after', [
    ('os.replace', 3, False),  # best/ is written but not in its place
    ('vt_zoo.segmentation.train.write_segmenter', -1, False),  # last/ is not written
    ('vt_zoo.segmentation.train.write_history', 1, True),  # both are, and the checkpoint is still there
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ('os.replace', 3, True),  # best/ is there, its measures are not in the checkpoint
        ('vt_zoo.segmentation.train.evaluate', 1, False),  # the checkpoint before it is there
        ('vt_zoo.training.loop.seed_of', 6, False),
        ('vt_zoo.segmentation.train.write_segmenter', -1, True),  # last/ is there, the history is not
    ])
])
def test_killed_and_resumed(
        segment_command, signal_at, composed, segment_arguments, segment_run, tmp_path, function, call, after):
    out = tmp_path / 'run'
    if call == -1:  # the last call, after one of each evaluation that was the best so far
        rows = history(segment_run.out)
        call = 2 + (rows[1]['miou'] > rows[0]['miou'])
    words = ['segment', 'train', '--data-dir', composed, *segment_arguments, '--out', out]
    killed = segment_command(*words, before=signal_at(function, call, signal.SIGKILL, after))
    assert killed.code == -signal.SIGKILL
    resumed = segment_command(*words, '--resume')
    assert resumed.code == 0, resumed.stderr
    assert outcome(out) == outcome(segment_run.out)
    assert sorted(os.listdir(out)) == WRITTEN


def test_kill_while_best_is_replaced(
        segment_command, signal_at, composed, segment_arguments, segment_run, tmp_path):
    """The old best/ is out of its place and the new one is not yet in it."""
    out = shutil.copytree(segment_run.out, tmp_path / 'run')
    words = ['segment', 'train', '--data-dir', composed, *segment_arguments, '--out', out]
    before = signal_at('os.replace', 3, signal.SIGKILL)
    assert segment_command(*words, '--overwrite', before=before).code == -signal.SIGKILL
    assert segment_command(*words, '--resume').code == 0
    assert outcome(out) == outcome(segment_run.out)
    assert sorted(os.listdir(out)) == WRITTEN


@pytest.mark.parametrize('name, value', [
    ('arch', 'panoptic_fpn'), ('encoder_name', 'tu-test_vt_resnet'), ('iterations', 9), ('batch_size', 4),
    ('lr', 0.01), ('crop_size', [32, 48]), ('scale', [0.5, 1.]), ('mean', [0.1, 0.5, 0.5]), ('eval_size', [32, 32]),
    ('eval_every', 3), ('ema_decay', 0.), ('schedule', 'cosine'), ('steps', [3]), ('seed', 1), ('token_dim', 64),
    ('label_map', {i: i for i in range(11)})])
def test_resuming_with_other_settings(composed, segment_settings, unfinished, name, value, input_error):
    before = tree(unfinished)
    with input_error(f'holds a run with {name} = '):
        run(composed, unfinished, segment_settings, resume=True, **{name: value})
    assert tree(unfinished) == before


def test_resuming_with_other_data(my_composed, segment_settings, unfinished, input_error):
    names = (my_composed / 'classes.txt').read_text()
    (my_composed / 'classes.txt').write_text(names.replace('9', 'nine'))
    with input_error('classes = '):
        run(my_composed, unfinished, segment_settings, resume=True)
    (my_composed / 'classes.txt').write_text(names)
    for kind in ('images', 'masks'):
        (my_composed / kind / 'train' / '00003.png').unlink()
    with input_error('train_images = 7'):
        run(my_composed, unfinished, segment_settings, resume=True)


@pytest.mark.parametrize('share', [0, 0.01, 0.5, 0.999])
def test_resuming_from_a_truncated_checkpoint(composed, segment_settings, my_unfinished, share, input_error):
    path = my_unfinished / 'checkpoint.safetensors'
    data = path.read_bytes()
    path.write_bytes(data[:int(share * len(data))])
    with input_error(r'checkpoint\.safetensors cannot be read'):
        run(composed, my_unfinished, segment_settings, resume=True)


def test_resuming_a_run_of_another_command(composed, segment_settings, my_unfinished, input_error):
    write_tensors(my_unfinished / 'checkpoint.safetensors', {'model.x': torch.zeros(1)}, {'fingerprint': {}})
    with input_error(r'checkpoint\.safetensors is not one of `vt-zoo segment train`'):
        run(composed, my_unfinished, segment_settings, resume=True)


def test_resume_without_a_run_begins_one(composed, segment_settings, segment_run, tmp_path):
    torch.manual_seed(123)  # the outcome is a function of the settings' seed
    run(composed, tmp_path / 'run', segment_settings, resume=True)
    assert outcome(tmp_path / 'run') == outcome(segment_run.out)


def test_run_is_overwritten_if_asked(composed, segment_settings, segment_run, my_unfinished, tmp_path):
    finished = shutil.copytree(segment_run.out, tmp_path / 'run')
    run(composed, finished, segment_settings, overwrite=True, seed=1)
    assert all(weights(finished / name) != weights(segment_run.out / name) for name in ('best', 'last'))
    run(composed, my_unfinished, segment_settings, overwrite=True)
    assert outcome(my_unfinished) == outcome(segment_run.out)


def test_unfinished_run_is_kept(composed, segment_settings, unfinished, input_error):
    before = tree(unfinished)
    with input_error('unfinished run.*--resume'):
        run(composed, unfinished, segment_settings)
    assert tree(unfinished) == before


@pytest.mark.parametrize('name', ['best/notes.txt', 'history.csv'])
def test_what_is_not_of_a_run_is_kept(composed, segment_settings, tmp_path, name, input_error):
    path = tmp_path / 'run' / name
    path.parent.mkdir(parents=True)
    path.write_text('mine')
    with input_error('is there already: add --overwrite to replace it'):
        run(composed, tmp_path / 'run', segment_settings)
    assert path.read_text() == 'mine'


def test_validated_in_float32_whatever_the_precision_of_training(composed, segment_settings, tmp_path):
    result = run(composed, tmp_path / 'run', segment_settings, precision='bf16', ema_decay=0.)
    assert result.last.pixel_accuracy == measure(tmp_path / 'run' / 'last', composed).pixel_accuracy


def test_unfinished_run_stays_where_the_new_one_cannot_begin(
        composed, segment_settings, my_unfinished, input_error):
    before = tree(my_unfinished)
    with input_error('encoder'):
        run(composed, my_unfinished, segment_settings, overwrite=True, encoder_name='tu-no_such_encoder')
    assert tree(my_unfinished) == before


def test_masks_without_labels_teach_nothing(my_composed, segment_settings, tmp_path):
    for path in (my_composed / 'masks' / 'train').iterdir():
        Image.new('L', (48, 48), 255).save(path)
    run(my_composed, tmp_path / 'run', segment_settings, iterations=2, ema_decay=0., weight_decay=0.)
    assert history(tmp_path / 'run')[0]['train_loss'] == 0
    torch.manual_seed(0)
    start = create_segmenter(SegmentSettings.read(None, segment_settings), 11)
    saved = load_file(tmp_path / 'run' / 'last' / 'model.safetensors')
    assert all(torch.equal(saved[name], p) for name, p in start.named_parameters())


@pytest.mark.parametrize('batch_size', [1, 7, 20])
def test_batch_size(composed, segment_settings, tmp_path, batch_size):
    run(composed, tmp_path / 'run', segment_settings, batch_size=batch_size, iterations=2, crop_size=[64, 64])
    assert sorted(os.listdir(tmp_path / 'run')) == WRITTEN


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize('kind, split', [('images', 'train'), ('masks', 'train'), ('images', 'val'), ('masks', 'val')])
def test_broken_file(my_composed, segment_settings, tmp_path, workers, kind, split, input_error):
    path = my_composed / kind / split / '00001.png'
    path.write_bytes(path.read_bytes()[:60])
    with input_error(f'^{kind[:-1]} {path} cannot be read: '):
        run(my_composed, tmp_path / 'run', segment_settings, workers=workers, iterations=4)
    assert not (tmp_path / 'run' / 'last').exists()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize('changes, match', [
    ({'opt': 'no_such_optimizer'}, "^opt must be .*'no_such_optimizer'"),
    ({'opt': 'lbfgs'}, "^opt must be .*'lbfgs'"),
    ({'opt': 'adahessian'}, "^opt must be .*'adahessian': it needs second derivatives"),
    ({'encoder_name': 'tu-resnet18.no_such_tag'}, "encoder 'tu-resnet18.no_such_tag' cannot be made"),
    ({'encoder_name': 'tu-no_such_encoder'}, "encoder 'tu-no_such_encoder' cannot be made"),
    ({'encoder_name': 'no_such_encoder'}, "encoder 'no_such_encoder' cannot be made"),
    ({'encoder_name': 'tu-test_vit'}, "encoder 'tu-test_vit' cannot be made"),
    ({'encoder_name': 'tu-coatnet_pico_rw_224'}, 'tu-coatnet_pico_rw_224 does not take images of 3x32x32'),
    ({'batch_size': 1}, 'a batch of 1 images of 32x32 cannot be trained'),
    ({'precision': 'fp16'}, 'precision fp16 is for GPUs, on a CPU no and bf16 are allowed'),
    ({'format': 'voc'}, "'voc'"),
    ({'format': 'lip'}, 'TrainVal_images'),
])
def test_settings_that_cannot_be_used(composed, segment_settings, tmp_path, changes, match, input_error):
    with input_error(match):
        run(composed, tmp_path / 'run', segment_settings, **changes)
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]


def test_classes_of_the_parts_differ(my_composed, segment_settings, tmp_path, monkeypatch, input_error):
    def other(format, root, split, transform=None):
        dataset = load_dataset(format, root, split, transform)
        dataset.classes = dataset.classes[:5] if split == 'val' else dataset.classes
        return dataset

    monkeypatch.setattr(train_module, 'load_dataset', other)
    with input_error('other classes in its training part'):
        run(my_composed, tmp_path / 'run', segment_settings)


def test_no_output_without_progress(composed, segment_settings, tmp_path, capfd):
    run(composed, tmp_path / 'run', segment_settings, iterations=2)
    assert capfd.readouterr() == ('', '')


def test_mixed_precision(segment_command, composed, segment_arguments, segment_run, tmp_path):
    words = ['segment', 'train', '--data-dir', composed, *segment_arguments, '--precision', 'bf16']
    result = segment_command(*words, '--out', tmp_path / 'run')
    assert result.code == 0, result.stderr
    saved = load_file(tmp_path / 'run' / 'last' / 'model.safetensors')
    full = load_file(segment_run.out / 'last' / 'model.safetensors')
    assert {t.dtype for t in saved.values()} <= {torch.float32, torch.int64}
    assert any(not torch.equal(saved[name], full[name]) for name in full)
    for ours, theirs in zip(history(tmp_path / 'run'), history(segment_run.out)):
        assert ours['train_loss'] == pytest.approx(theirs['train_loss'], rel=0.1)

    before = '; '.join([
        'import vt_zoo.segmentation.train as t, itertools', 'rate, calls = t.learning_rate, itertools.count()',
        't.learning_rate = lambda s, i: rate(s, i) if next(calls) < 5 else 1 / 0'])
    assert segment_command(*words, '--out', tmp_path / 'other', before=before).code == 1
    assert segment_command(*words, '--out', tmp_path / 'other', '--resume').code == 0
    assert outcome(tmp_path / 'other') == outcome(tmp_path / 'run')


# without batch statistics, so that two processes compute what one computes, but for rounding; the crop is larger than
# the images, so that processes have other numbers of ignored pixels
WITHOUT_BATCH_NORM = {
    'arch': 'panoptic_fpn', 'encoder_name': 'tu-test_efficientnet_gn', 'crop_size': [64, 64], 'ema_decay': 0.}


@pytest.mark.parametrize('launcher', ['forks', pytest.param('accelerate', marks=pytest.mark.slow)])
def test_gradients_of_two_processes(
        two_processes, composed, segment_settings, segment_arguments, tmp_path, launcher):
    """Batches of 3 are shared as 2 and 1, and the gradients are those of the whole batch."""
    words = ['segment', 'train', '--data-dir', composed, *segment_arguments, *words_of(WITHOUT_BATCH_NORM),
             '--out', tmp_path / 'two']
    printed = run_by_two(launcher, two_processes, words)
    run(composed, tmp_path / 'one', segment_settings, **WITHOUT_BATCH_NORM)
    assert weights(tmp_path / 'two' / 'last') != weights(tmp_path / 'one' / 'last'), 'there were no two processes'
    one, two = (load_file(tmp_path / name / 'last' / 'model.safetensors') for name in ('one', 'two'))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=5e-4)
    for row, expected in zip(history(tmp_path / 'two'), history(tmp_path / 'one'), strict=True):
        assert row == pytest.approx(expected, rel=1e-3)
    assert sorted(os.listdir(tmp_path / 'two')) == WRITTEN
    assert printed.count('models     ') == printed.count('iteration 8:') == 1


@pytest.fixture(scope='module')
def distributed_words(composed, segment_arguments):
    """Of a run with batch norm, whose statistics are each process's own on CPU."""
    return ['segment', 'train', '--data-dir', composed, *segment_arguments, '--crop-size', '[64, 64]']


def test_two_processes_that_are_killed_and_resumed(two_processes, signal_at, distributed_words, tmp_path):
    whole, out = tmp_path / 'whole', tmp_path / 'run'
    results = two_processes(*distributed_words, '--out', whole)
    assert [r.code for r in results] == [0, 0], results[0].stderr
    assert 'mIoU' in results[0].stdout and results[1].stdout == ''
    before = signal_at('vt_zoo.training.loop.seed_of', 6, signal.SIGKILL)
    assert [r.code for r in two_processes(*distributed_words, '--out', out, before=before)] == 2 * [-signal.SIGKILL]
    assert sorted(os.listdir(out)) == ['.lock', 'best', 'checkpoint.safetensors']
    results = two_processes(*distributed_words, '--out', out, '--resume')
    assert [r.code for r in results] == [0, 0], results[0].stderr
    assert outcome(out) == outcome(whole)
    assert sorted(os.listdir(out)) == WRITTEN


# gloo's threads end while Python can run: where they end as the model is freed, they and it may wait for each other
GLOO_ENDS = '''
import accelerate, os
def end_training(self, end=accelerate.Accelerator.end_training):
    threads = len(os.listdir('/proc/self/task'))
    end(self)
    assert len(os.listdir('/proc/self/task')) < threads
accelerate.Accelerator.end_training = end_training
'''


def test_two_processes_measure_the_model_that_is_written(two_processes, distributed_words, composed, tmp_path):
    words = [*distributed_words, '--ema-decay', '0', '--iterations', '3']
    results = two_processes(*words, '--out', tmp_path / 'run', before=GLOO_ENDS)
    assert [r.code for r in results] == [0, 0], results[0].stderr
    row, metrics = history(tmp_path / 'run')[-1], measure(tmp_path / 'run' / 'last', composed)
    assert (row['miou'], row['pixel_accuracy']) == (metrics.miou, metrics.pixel_accuracy)


def test_two_processes_and_one_validation_image(two_processes, my_composed, segment_arguments, tmp_path):
    for kind in ('images', 'masks'):
        for path in sorted((my_composed / kind / 'val').iterdir())[1:]:
            path.unlink()
    words = ['segment', 'train', '--data-dir', my_composed, *segment_arguments, '--crop-size', '[64, 64]']
    results = two_processes(*words, '--out', tmp_path / 'run')
    assert [r.code for r in results] == [0, 0], results[0].stderr
    assert history(tmp_path / 'run')[-1]['miou'] == measure(tmp_path / 'run' / 'last', my_composed).miou


def test_two_processes_say_the_same_of_a_mask(two_processes, my_composed, segment_arguments, tmp_path):
    """Each looks at its share of the masks; the wrong one is of the second's."""
    path = sorted((my_composed / 'masks' / 'val').iterdir())[1]
    Image.new('L', (48, 48), 77).save(path)
    words = ['segment', 'train', '--data-dir', my_composed, *segment_arguments]
    for result in two_processes(*words, '--out', tmp_path / 'run'):
        assert result.code == 2
        assert result.lines[-1].endswith(f'mask {path} has the label 77, allowed are 0 to 10 and 255 (ignored)')
    assert not (tmp_path / 'run').exists()


def test_fewer_samples_than_processes(two_processes, composed, segment_arguments, tmp_path):
    words = ['segment', 'train', '--data-dir', composed, *segment_arguments, '--batch-size', '1']
    for result in two_processes(*words, '--out', tmp_path / 'run'):
        assert result.code == 2
        assert 'batch_size must be at least the number of processes, 2' in result.lines[-1]
    assert not (tmp_path / 'run').exists()
