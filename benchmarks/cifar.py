"""CIFAR-10 for the benchmarks: its pictures as tensors, models that see 8x8 pixels of it, and resumable training.

The pictures are JPEG files, `train/CLASS/NNNN.jpg` and `test/CLASS/NNNN.jpg`: those of torchvision's
`CIFAR10(root, download=True)` saved so, or a copy that is one already. JPEG loses a little, so that an accuracy on
copies is not that on the official files; a report says which it was.
"""
import json
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.scheduler import create_scheduler_v2
from tqdm import tqdm

from vt_zoo.checkpoint import whole
from vt_zoo.images import load_image
from vt_zoo.run_state import load_state, state_tensors

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
SIZE, PAD = 32, 4


def load_cifar(data_dir: Path) -> Dict[str, Tuple[torch.Tensor, torch.Tensor]]:
    """Pictures (N, 3, 32, 32) in uint8 and classes (N,) of `train` and `test`.

    They are kept beside the folder, as opening 60,000 files takes a minute.

    Raises:
        SystemExit: The folder does not hold these classes.
    """
    kept = data_dir / 'cifar10.safetensors'
    if not kept.exists():
        tensors = {}
        for part in ('train', 'test'):
            folders = [data_dir / part / name for name in CLASSES]
            if not all(folder.is_dir() for folder in folders):
                raise SystemExit(f'--data-dir must hold {part}/{CLASSES[0]}, ..., got {data_dir}')
            paths = [(path, i) for i, folder in enumerate(folders) for path in sorted(folder.iterdir())]
            pictures = [np.asarray(load_image(path).convert('RGB')) for path, _ in tqdm(paths, part)]
            tensors[f'{part}.x'] = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
            tensors[f'{part}.y'] = torch.tensor([i for _, i in paths])
        with whole(kept) as new:
            save_file(tensors, new)
    tensors = load_file(kept)
    return {part: (tensors[f'{part}.x'], tensors[f'{part}.y']) for part in ('train', 'test')}


def normalise(x: torch.Tensor) -> torch.Tensor:
    """Pictures in uint8 as a model gets them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((x / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def crop_and_flip(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures in uint8 padded by reflection, cropped at random to their size, half of them flipped."""
    padded = F.pad(x.float(), (PAD,) * 4, mode='reflect')
    size = x.shape[-1]
    left, top = torch.randint(2 * PAD + 1, (2, len(x)), generator=generator)
    flips = torch.rand(len(x), generator=generator) < 0.5
    crops = [picture[:, i:i + size, j:j + size] for picture, i, j in zip(padded, top, left)]
    return torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, flips)])


def give_small_stem(model: nn.Module) -> nn.Module:
    """Replace the stem of a ResNet by a 3x3 convolution of stride 1, so that stage 3 has 8x8 pixels of 32x32."""
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode='fan_out', nonlinearity='relu')
    model.maxpool = nn.Identity()
    return model


def decay_weights(model: nn.Module, weight_decay: float) -> List[dict]:
    """Parameter groups: norms and biases without weight decay."""
    return [
        {'params': [p for p in model.parameters() if p.ndim > 1], 'weight_decay': weight_decay},
        {'params': [p for p in model.parameters() if p.ndim <= 1], 'weight_decay': 0.}]


def fit(
        model: nn.Module,
        pick: Callable[[torch.Tensor, torch.Generator], torch.Tensor],
        classes: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        batch_size: int,
        seed: int,
        state: Path,
) -> List[float]:
    """Train with a warm-up of one epoch and a cosine; a run that was killed goes on after its last whole epoch.

    Order and augmentation of an epoch follow from `seed` and its number alone.

    Args:
        model: Gives logits.
        pick: Pictures as the model gets them, of indices and a source of randomness.
        classes: Class of each picture (N,).
        optimizer: Its learning rate is the peak.
        epochs: Number of epochs.
        batch_size: Pictures a step; whole batches only.
        seed: Of orders and augmentation.
        state: File of the state after each epoch; who asked for it deletes it.

    Returns:
        Mean training loss of each epoch.
    """
    steps = len(classes) // batch_size
    rate = optimizer.param_groups[0]['lr']
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=epochs, warmup_epochs=1, warmup_lr=rate / 25, step_on_epochs=False,
        updates_per_epoch=steps)
    losses = _resume(model, optimizer, state)
    for epoch in range(len(losses), epochs):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(classes), generator=generator)[:steps * batch_size]
        model.train()
        total = 0.
        for step, batch in enumerate(order.split(batch_size)):
            scheduler.step_update(epoch * steps + step)
            loss = F.cross_entropy(model(pick(batch, generator)), classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / steps)
        _keep(model, optimizer, losses, state)
    return losses


def _keep(model: nn.Module, optimizer: torch.optim.Optimizer, losses: List[float], state: Path) -> None:
    tensors, scalars = state_tensors({'model': model}, optimizer)
    with whole(state) as new:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, new,
            metadata={'losses': json.dumps(losses), 'scalars': json.dumps(scalars)})


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer, state: Path) -> List[float]:
    """Take over a state that was kept; the losses of its epochs, none where there is none."""
    if not state.exists():
        return []
    with safe_open(state, 'pt') as f:
        metadata = f.metadata()
    load_state(load_file(state), json.loads(metadata['scalars']), {'model': model}, optimizer)
    return json.loads(metadata['losses'])


@torch.inference_mode()
def accuracy(model: nn.Module, pick: Callable[[torch.Tensor], torch.Tensor], classes: torch.Tensor) -> float:
    """Accuracy in percent, on pictures that `pick` gives of indices."""
    model.eval()
    hits = sum((model(pick(i)).argmax(1) == classes[i]).sum().item() for i in torch.arange(len(classes)).split(500))
    return 100 * hits / len(classes)
