"""Publishing: the folder, its model card, the upload by the hub's real client to a hub on the loopback."""
import argparse
import json
import os
import pickle
from dataclasses import replace

import pytest
import safetensors.torch
import timm
import torch
import yaml
from helpers import change_config
from hub_server import READER, WRITER, hub_server, newer_client
from huggingface_hub import ModelCard

import vt_zoo
from vt_zoo.classification.train import finetune
from vt_zoo.weights.conversion import convert
from vt_zoo.weights.files import write_model
from vt_zoo.weights.loading import load_model
from vt_zoo.weights.publish import upload, write_release

REPO = 'someone/my-digits'


def create(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_vt_resnet', **{'num_classes': 3, **kwargs}).eval()


def logits(model):
    with torch.inference_mode():
        return model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def card_of(folder):
    return ModelCard.load(folder / 'README.md')


@pytest.fixture
def release(tiny_model, tmp_path):
    """Folder for the hub, of the model of tiny_run."""
    write_release(tiny_model, tmp_path / 'release', REPO, 'cc-by-4.0', 'Handwritten digits')
    return tmp_path / 'release'


@pytest.fixture
def hub(hub_client, tmp_path, monkeypatch):
    """An empty hub that this process's client asks, with a token that may write."""
    monkeypatch.setenv('HF_TOKEN', WRITER)
    (tmp_path / 'hub').mkdir()
    with hub_server(tmp_path / 'hub') as server:
        hub_client(server.url)
        yield server


@pytest.mark.parametrize('inner', ['', 'model'])
def test_folder_of_a_run_or_of_its_model(tiny_run, tmp_path, inner):
    write_release(tiny_run.out / inner, tmp_path / 'release', REPO)
    assert sorted(os.listdir(tmp_path / 'release')) == ['README.md', 'config.json', 'model.safetensors']
    for name in ('config.json', 'model.safetensors'):
        assert (tmp_path / 'release' / name).read_bytes() == (tiny_run.out / 'model' / name).read_bytes()


def test_metadata(release, tiny_run):
    data = card_of(release).data
    result, = data.eval_results
    assert result.metric_value == pytest.approx(tiny_run.result.correct / tiny_run.result.total, abs=1e-6)
    assert (result.metric_type, result.dataset_name, result.task_type) == (
        'accuracy', 'Handwritten digits', 'image-classification')
    assert (data.license, data.library_name, data.pipeline_tag, data.model_name) == (
        'cc-by-4.0', 'timm', 'image-classification', 'my-digits')
    assert data.get('base_model') is None


def test_text(release, tiny_run, tiny_settings):
    text = card_of(release).text
    rows = dict(line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('| `'))
    for name in ('lr', 'epochs', 'batch_size', 'seed', 'scale', 'opt'):
        value = getattr(tiny_settings, name)
        assert rows[f'`{name}`'] == (value if isinstance(value, str) else json.dumps(value))
    assert rows['`model`'].split('.')[0] == tiny_settings.model
    assert rows['`vt_zoo`'] == vt_zoo.__version__
    for words in (
            'Data: Handwritten digits. Training images: 36; held-out images: 18. Classes: 0, 1, 2.',
            f'({tiny_run.result.correct} of 18)', 'Started from: new weights', 'cc-by-4.0',
            f'{sum(p.numel() for p in create().parameters()):,} parameters, stored as float32; 3 classes',
            f'hf-hub:{REPO}', 'import vt_zoo'):
        assert words in text


def test_what_nobody_wrote_down_is_unknown(tmp_path):
    """A folder of timm's own, pickle beside it."""
    timm.models.save_for_hf(create(), str(tmp_path / 'model'), safe_serialization='both')
    write_release(tmp_path / 'model', tmp_path / 'release', REPO)
    assert sorted(os.listdir(tmp_path / 'release')) == ['README.md', 'config.json', 'model.safetensors']
    card = card_of(tmp_path / 'release')
    assert card.data.license == 'unknown'
    assert card.data.eval_results is None and card.data.get('model-index') is None
    for words in ('Data: unknown. Training images: unknown; held-out images: unknown. Classes: unknown.',
                  'Program: unknown. Epochs: unknown. Weights: unknown. Started from: unknown.', 'Accuracy: unknown.',
                  'Arguments: unknown.'):
        assert words in card.text


def test_card_of_a_converted_checkpoint(tmp_path):
    args = argparse.Namespace(
        model='test_vt_resnet', num_classes=3, eval_metric='top1', lr=0.5, pretrained=False)
    content = {'arch': args.model, 'args': args, 'state_dict': create().state_dict(), 'epoch': 6, 'metric': 62.5}
    torch.save(content, tmp_path / 'last.pth.tar')
    convert(tmp_path / 'last.pth.tar', tmp_path / 'model', dtype=torch.float16)
    write_release(tmp_path / 'model', tmp_path / 'release', REPO)
    card = card_of(tmp_path / 'release')
    assert card.data.eval_results[0].metric_value == 0.625
    for words in (
            "Program: timm's train.py. Epochs: 7.", 'stored as float16', '| `lr` | 0.5 |', 'picked by these images'):
        assert words in card.text


def test_base_model(hub, few_digits, tiny_settings, tmp_path):
    folder = tmp_path / 'hub' / 'timm' / 'resnet18.a1_in1k'
    folder.mkdir(parents=True)
    safetensors.torch.save_file(timm.create_model('resnet18').state_dict(), folder / 'model.safetensors')
    settings = replace(tiny_settings, model='vt_resnet18.trunk_a1_in1k', epochs=1)
    finetune(few_digits, tmp_path / 'run', settings, device='cpu', progress=False)
    write_release(tmp_path / 'run', tmp_path / 'release', REPO)
    card = card_of(tmp_path / 'release')
    assert card.data.base_model == 'timm/resnet18.a1_in1k'
    assert 'weights of [timm/resnet18.a1_in1k](https://huggingface.co/timm/resnet18.a1_in1k)' in card.text

    finetune(few_digits, tmp_path / 'again', replace(settings, model=str(tmp_path / 'run' / 'model')), device='cpu',
             progress=False)
    write_release(tmp_path / 'again', tmp_path / 'second', REPO)
    assert card_of(tmp_path / 'second').data.get('base_model') is None
    assert 'Started from: weights that are not on the hub' in card_of(tmp_path / 'second').text
    assert not any(str(tmp_path).encode() in content for content in tree(tmp_path / 'second').values())


@newer_client
def test_upload(hub, release, tiny_model, tmp_path):
    assert upload(release, REPO) == (f'{hub.url}/{REPO}/commit/0123456789abcdef0123456789abcdef01234567', False)
    assert tree(tmp_path / 'hub' / REPO) == tree(release)
    assert hub.visibility == {REPO: None}
    model = timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
    assert torch.equal(logits(model), logits(load_model(str(release))))
    assert model.pretrained_cfg['label_names'] == ['0', '1', '2']
    write_release(tiny_model, tmp_path / 'second', REPO, 'mit')
    upload(tmp_path / 'second', REPO)
    assert ModelCard.load(REPO).data.license == 'mit'


@newer_client
@pytest.mark.parametrize('then', [None, 'public'])
def test_private_never_ends_in_a_public_upload(hub, release, tmp_path, then, input_error):
    repo = tmp_path / 'hub' / REPO
    repo.mkdir(parents=True)
    hub.visibility[REPO] = then
    with input_error(f'{REPO} is public: nothing was uploaded'):
        upload(release, REPO, private=True)
    assert list(repo.iterdir()) == []
    hub.visibility[REPO] = 'private'
    upload(release, REPO, private=True)
    assert tree(repo) == tree(release)


@newer_client
@pytest.mark.parametrize('edit', [
    lambda card: card + 'By me.', lambda card: card.replace('## Limits', '## My limits'), lambda card: ''])
def test_edited_card_is_kept_unless_asked(hub, release, tmp_path, edit):
    upload(release, REPO)
    path = tmp_path / 'hub' / REPO / 'README.md'
    path.write_text(edit(path.read_text()))
    edited = path.read_text()
    assert upload(release, REPO)[1]
    assert path.read_text() == edited
    assert not upload(release, REPO, replace_card=True)[1]
    assert path.read_bytes() == (release / 'README.md').read_bytes()


@newer_client
def test_nothing_is_uploaded_where_the_card_cannot_be_asked_for(hub, release, monkeypatch, input_error):
    upload(release, REPO)
    before = len(hub.requests)
    monkeypatch.setattr(
        'huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE', hub.url + '/nowhere/{repo_id}/{revision}/{filename}')
    with input_error(f'{REPO} cannot be published at {hub.url}: '):
        upload(release, REPO)
    assert not any('/commit/' in path for _, path in hub.requests[before:])


def test_segmenter_is_not_published(segment_run, tmp_path, input_error):
    for folder in (segment_run.out, segment_run.out / 'best'):
        with input_error('holds a segmenter, publish is for classifiers.* `hf upload ORG/NAME '):
            write_release(folder, tmp_path / 'release', REPO)


@newer_client
def test_hub_refuses_the_card_before_anything_is_created(hub, tiny_model, tmp_path, input_error):
    write_release(tiny_model, tmp_path / 'release', REPO, 'my own licence')
    with input_error(f'the hub refuses {REPO}: "license" must be one of'):
        upload(tmp_path / 'release', REPO)
    assert not (tmp_path / 'hub' / REPO).exists()


@newer_client
@pytest.mark.parametrize('token, match', [
    (READER, 'the token does not allow it'), ('hf_none', 'the hub does not know the token')])
def test_token_that_may_not(hub, release, monkeypatch, token, match, input_error):
    monkeypatch.setenv('HF_TOKEN', token)
    with input_error(f'{REPO} cannot be published at {hub.url}: {match}'):
        upload(release, REPO)


def test_no_token(hub, release, monkeypatch, tmp_path, input_error):
    monkeypatch.delenv('HF_TOKEN')
    monkeypatch.setattr('huggingface_hub.constants.HF_TOKEN_PATH', str(tmp_path / 'none'))
    with input_error('no token of the hub: run `hf auth login` or set HF_TOKEN'):
        upload(release, REPO)
    assert hub.requests == []


@newer_client
def test_hub_that_cannot_be_reached(hub, hub_client, release, input_error):
    hub_client('http://127.0.0.1:9')
    with input_error(f'{REPO} cannot be published at http://127.0.0.1:9: .*refused'):
        upload(release, REPO)


def change_weights(change):
    def damage(folder):
        path = folder / 'model.safetensors'
        path.write_bytes(change(path.read_bytes()))
    return damage


def of_other_classes(folder):
    safetensors.torch.save_file(create(num_classes=7).state_dict(), folder / 'model.safetensors')


@pytest.mark.parametrize('damage', [
    of_other_classes, change_weights(lambda content: content[:-100]), change_weights(pickle.dumps),
    lambda folder: change_config(folder, architecture='no_such_model'),
    lambda folder: change_config(folder, label_names=['a']),
    lambda folder: change_config(folder, training={'val_correct': 'many', 'val_images': []}),
    lambda folder: change_config(folder, training='a long one')])
def test_folder_that_cannot_be_published(my_model, tmp_path, damage, input_error):
    damage(my_model)
    before = tree(tmp_path)
    with input_error(str(my_model)):
        write_release(my_model, tmp_path / 'release', REPO)
    assert tree(tmp_path) == before


def test_folder_without_the_file_that_timm_reads(tmp_path, input_error):
    with input_error('holds no model: neither'):
        write_release(tmp_path, tmp_path / 'release', REPO)
    write_model(tmp_path / 'model', create(), None, {}, max_shard_size='300KB')
    with input_error(r'holds no model\.safetensors, the one file of weights that timm reads'):
        write_release(tmp_path, tmp_path / 'release', REPO)


@pytest.mark.parametrize(
    'name', ['digits', 'a/b/c', 'some one/digits', '../digits', 'a/', '', 'someone/x--y', 'a/b.git'])
def test_repository_that_cannot_be(tiny_model, tmp_path, name, input_error):
    with input_error('repo-id must be org/name'):
        write_release(tiny_model, tmp_path / 'release', name)
    assert not (tmp_path / 'release').exists()


@pytest.fixture
def offline():
    """For `before` of a command: its client asks nobody."""
    return 'import huggingface_hub.constants as c; c.HF_HUB_OFFLINE = True'


def test_dry_run(command, offline, tiny_run, tmp_path):
    words = ['publish', tiny_run.out, '--repo-id', REPO, '--license', 'mit', '--dry-run']
    result = command(*words, '--out', tmp_path / 'release', before=offline)
    assert (result.code, result.stderr) == (0, '')
    listed, card = result.stdout.split('\n\n', 1)
    assert card == (tmp_path / 'release' / 'README.md').read_text()
    assert [line.split()[::2] for line in listed.splitlines()] == [
        [f'{(tmp_path / "release" / name).stat().st_size:,}', name]
        for name in ('README.md', 'config.json', 'model.safetensors')]
    assert yaml.safe_load(card.split('---')[1])['license'] == 'mit'


@newer_client
def test_command(command, release, tiny_model, tmp_path):
    (tmp_path / 'hub').mkdir()
    with hub_server(tmp_path / 'hub') as server:
        before = (
            f'import os; os.environ["HF_TOKEN"] = "{WRITER}"; import huggingface_hub.constants as c; '
            f'c.ENDPOINT = {server.url!r}; c.HF_HUB_DISABLE_XET = True; '
            "c.HUGGINGFACE_CO_URL_TEMPLATE = c.ENDPOINT + '/{repo_id}/resolve/{revision}/{filename}'")
        words = ['--repo-id', REPO, '--license', 'cc-by-4.0', '--dataset', 'Handwritten digits', '--private']
        result = command('publish', tiny_model, *words, before=before)
    assert result.code == 0, result.stderr
    assert f'{server.url}/{REPO}/commit/' in result.stdout
    assert tree(tmp_path / 'hub' / REPO) == tree(release)
    assert server.visibility == {REPO: 'private'}


@pytest.mark.parametrize('words, holds', [
    (['--repo-id', 'digits'], 'repo-id must be org/name'), ([], '--repo-id'),
    (['--repo-id', REPO, '--out', '.'], '. is there already')])
def test_command_refuses(command, offline, tiny_model, words, holds):
    result = command('publish', tiny_model, *words, before=offline)
    assert (result.code, result.stdout, len(result.lines)) == (2, '', 1), result.stderr
    assert holds in result.lines[0]


def test_command_on_a_full_disk(command, offline, limit_file_size, tiny_model, tmp_path):
    out = tmp_path / 'release'
    words = ['--repo-id', REPO, '--dry-run', '--out', out]
    result = command('publish', tiny_model, *words, before=f'{offline}; {limit_file_size(500_000)}')
    assert (result.code, result.stdout, len(result.lines)) == (2, '', 1), result.stderr
    assert f'cannot read or write {out / "model.safetensors"}: ' in result.lines[0]
    assert os.listdir(tmp_path) == []
