"""Training images from WebDataset shards, through timm's own reader and loader."""
import io
import tarfile

import pytest
import timm
import torch
from timm.data import create_dataset, create_loader

import vt_zoo  # noqa: F401

ClassificationTask = pytest.importorskip('timm.task', reason='timm has no timm.task before 1.0.23').ClassificationTask

SHARD = 9  # images


def write_shard(path, images):
    """A tar file with a picture NUMBER.png and its class NUMBER.cls for each image."""
    with tarfile.open(path, 'w') as tar:
        for number, image in enumerate(images):
            for ending, content in (('png', image.read_bytes()), ('cls', image.parent.name.encode())):
                member = tarfile.TarInfo(f'{number:04d}.{ending}')
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(few_digits, tmp_path):
    """Four shards of few_digits' training images."""
    images = sorted((few_digits / 'train').glob('*/*.png'))
    for number, start in enumerate(range(0, len(images), SHARD)):
        write_shard(tmp_path / f'digits-train-{number:02d}.tar', images[start:start + SHARD])
    return tmp_path


def test_training_step(shards):
    """The dataset as `train.py --dataset wds/digits --data-dir DIR --train-split '...tar|36'` names it."""
    pytest.importorskip('webdataset')
    dataset = create_dataset(
        'wds/digits', root=str(shards), split='digits-train-{00..03}.tar|36', is_training=False, batch_size=12)
    loader = create_loader(
        dataset, input_size=(3, 64, 64), batch_size=12, num_workers=1, device=torch.device('cpu'),
        persistent_workers=False)
    task = ClassificationTask(timm.create_model('test_vt_resnet', num_classes=3), verbose=False)
    seen = []
    for x, y in loader:
        task(x, y)['loss'].backward()
        seen += y.tolist()
    assert sorted(seen) == [0] * 12 + [1] * 12 + [2] * 12
    assert all(p.grad is not None for p in task.get_trainable_module().parameters())
