"""CIFAR-10 for the benchmarks: its pictures as tensors, models that see 8x8 pixels of it, and resumable training.

The pictures are JPEG files, `train/CLASS/NNNN.jpg` and `test/CLASS/NNNN.jpg`: those of torchvision's
`CIFAR10(root, download=True)` saved so, or a copy that is one already. JPEG loses a little, so that an accuracy on
copies is not that on the official files; a report says which it was.
"""
import argparse
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from harness import complaints, cross_entropy, train_epochs
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2
from tqdm import tqdm

from vt_zoo.data.images import load_image
from vt_zoo.errors import InputError
from vt_zoo.files import whole
from vt_zoo.training.run_state import load_state, state_tensors
from vt_zoo.weights.files import read_tensors, write_tensors

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
PICTURES = {'train': 50000, 'test': 10000}
PAD = 4
BATCH = 128
PLAIN = {'opt': 'sgd', 'lr': 0.1, 'weight_decay': 5e-4, 'momentum': 0.9}
AUTOCAST = {'float32': None, 'bfloat16': torch.bfloat16}  # of `harness.cross_entropy`, by precision

Pick = Callable[[torch.Tensor, torch.Generator, int], torch.Tensor]


def find_pictures(data_dir: Path) -> Dict[str, List[Tuple[Path, int]]]:
    """Files of `train` and `test`, and the class of each.

    Raises:
        InputError: The folder does not hold as many.
    """
    parts = {}
    for part, number in PICTURES.items():
        parts[part] = [
            (path, i) for i, name in enumerate(CLASSES) for path in sorted((data_dir / part / name).glob('[!.]*'))]
        if len(parts[part]) != number:
            raise InputError(
                f'--data-dir must hold {number} pictures in {part}/{CLASSES[0]}, ..., got {data_dir} with '
                f'{len(parts[part])}')
    return parts


def load_cifar(data_dir: Path) -> Dict[str, Tuple[torch.Tensor, torch.Tensor]]:
    """Pictures (N, 3, 32, 32) in uint8 and classes (N,) of `train` and `test`.

    They are kept in the folder, as opening 60,000 files takes a while.

    Raises:
        InputError: As of `find_pictures`.
    """
    parts = find_pictures(data_dir)
    kept = data_dir / 'cifar10.safetensors'
    if not kept.exists():
        tensors = {}
        for part, paths in parts.items():
            pictures = [np.asarray(load_image(path).convert('RGB')) for path, _ in tqdm(paths, part)]
            tensors[f'{part}.x'] = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
            tensors[f'{part}.y'] = torch.tensor([i for _, i in paths])
        with whole(kept) as new:
            save_file(tensors, new)
    tensors = load_file(kept)
    return {part: (tensors[f'{part}.x'], tensors[f'{part}.y']) for part in ('train', 'test')}


def prepare_cifar(parser: argparse.ArgumentParser, data_dir: Path) -> None:
    """Load the pictures once, before processes do so at the same time; what is wrong is an error of `--data-dir`."""
    with complaints(parser):
        load_cifar(data_dir)


def normalise(x: torch.Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> torch.Tensor:
    """Pictures from 0 to 255 as a model gets them."""
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (mean, std))
    return ((x / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def crop_and_flip(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures in uint8 padded by reflection, cropped at random to their size, half of them flipped."""
    size = x.shape[-1]
    left, top = torch.randint(2 * PAD + 1, (2, len(x)), generator=generator).to(x.device)
    flips = (torch.rand(len(x), generator=generator) < 0.5).to(x.device)
    windows = F.pad(x.float(), (PAD,) * 4, mode='reflect').unfold(2, size, 1).unfold(3, size, 1)
    crops = windows[torch.arange(len(x), device=x.device), :, top, left]
    return torch.where(flips[:, None, None, None], crops.flip(-1), crops)


def give_small_stem(model: nn.Module) -> nn.Module:
    """Replace the stem of a ResNet by a 3x3 convolution of stride 1, so that stage 3 has 8x8 pixels of 32x32."""
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode='fan_out', nonlinearity='relu')
    model.maxpool = nn.Identity()
    return model


class _Picked:
    """Pictures as `pick` gives them of indices in an epoch, with randomness from one source."""

    def __init__(self, pick: Pick, generator: torch.Generator) -> None:
        self.pick, self.generator, self.epoch = pick, generator, 0

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        return self.pick(indices, self.generator, self.epoch)


def fit(
        model: nn.Module,
        pick: Pick,
        classes: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        batch_size: int,
        seed: int,
        state: Path,
        loss_of: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor] = cross_entropy,
        average: Optional[nn.Module] = None,
) -> List[Tuple[float, float]]:
    """Train with a warm-up of one epoch and a cosine; a run that was killed goes on after its last whole epoch.

    Order and augmentation of an epoch follow from `seed` and its number alone.

    Args:
        model: Gives logits.
        pick: Pictures as the model gets them, of indices, a source of randomness and the number of the epoch from 0.
        classes: Class of each picture (N,).
        optimizer: Its learning rate is the peak.
        epochs: Number of epochs.
        batch_size: Pictures a step; whole batches only.
        seed: Of orders and augmentation.
        state: File of the state after each epoch, which who asked for it deletes; a log of the same name gets a line an
            epoch.
        loss_of: Loss of the model on images and classes.
        average: Moving average of the model, to update after each step.

    Returns:
        Mean training loss and CPU seconds of each epoch.
    """
    rate = optimizer.param_groups[0]['lr']
    modules = {'model': model}
    if average is not None:
        modules['average'] = average
        optimizer.register_step_post_hook(lambda *_: average.update(model))
    history = []
    if state.exists():
        tensors, metadata = read_tensors(state)
        load_state(tensors, metadata['scalars'], modules, optimizer)
        history = [tuple(epoch) for epoch in metadata['history']]
    first, generator = len(history), torch.Generator()
    pictures = _Picked(pick, generator)

    def orders() -> Iterator[torch.Tensor]:
        for epoch in range(first, epochs):
            pictures.epoch = epoch
            torch.manual_seed(1000 * seed + epoch)  # of dropout and stochastic depth
            yield torch.randperm(len(classes), generator=generator.manual_seed(1000 * seed + epoch))

    start = time.process_time()
    for loss in train_epochs(
            model, (pictures, classes), optimizer, orders(), epochs, batch_size, warmup_lr=rate / 25, first=first,
            loss_of=loss_of):
        history.append((loss, time.process_time() - start))
        tensors, scalars = state_tensors(modules, optimizer)
        write_tensors(state, tensors, {'history': history, 'scalars': scalars})
        with state.with_suffix('.log').open('a') as log:
            log.write(f'epoch {len(history)} of {epochs}: loss {loss:.4f}, {history[-1][1]:.0f} CPU seconds\n')
        start = time.process_time()
    return history


def fit_plain(
        model: nn.Module, x: torch.Tensor, classes: torch.Tensor, epochs: int, seed: int, state: Path, precision: str,
) -> List[Tuple[float, float]]:
    """`fit` on pictures in uint8 with crops and flips, by SGD with momentum."""

    def pick(indices: torch.Tensor, generator: torch.Generator, epoch: int) -> torch.Tensor:
        return normalise(crop_and_flip(x[indices], generator))

    loss_of = partial(cross_entropy, autocast=AUTOCAST[precision])
    return fit(model, pick, classes, create_optimizer_v2(model, **PLAIN), epochs, BATCH, seed, state, loss_of)
