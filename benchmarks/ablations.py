"""The paper's ablations on a task made of real digits: are two handwritten digits, far apart, the same?

    python benchmarks/ablations.py

trains every variant and timm's ResNet on the same trunk by one recipe, three seeds each, and writes
benchmarks/results/ablations.md, .json and .png. Each image shows two scans from scikit-learn's digits at least half an
image apart among random strokes; the label says whether they show the same digit. Training images are composed of the
scans of `vt_zoo.digits`' training split, test images of its held-out scans. A run that was interrupted goes on where it
was.
"""
import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Dict, List, Tuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from tqdm import tqdm

import vt_zoo
from vt_zoo.checkpoint import whole
from vt_zoo.digits import write_digits
from vt_zoo.images import find_split, load_image

RESULTS = Path(__file__).parent / 'results'
SIZE, DIGIT, BATCH, LR = 96, 28, 64, 0.05
TRUNK = {
    'block': BasicBlock, 'layers': (1, 1, 1, 2), 'stem_type': 'deep', 'stem_width': 8, 'num_classes': 2, 'in_chans': 1}
VT = {'channels': (16, 32, 64), 'feature_dim': 128, 'token_dim': 128}
VARIANTS = {  # name: (table of the paper, options)
    'VT, base model': ('2', {}),
    'pooling tokenizer': ('3', {'tokenizer': 'pooling'}),
    'clustering tokenizer': ('3', {'tokenizer': 'clustering'}),
    'no recurrent tokenizer': ('4', {'recurrent': False}),
    'tokens not related': ('5', {'token_mixer': 'none'}),
    'graph convolution': ('5', {'token_mixer': 'graph'}),
    '4 tokens': ('6', {'num_tokens': 4}),
    '32 tokens': ('6', {'num_tokens': 32}),
    'no projector': ('7', {'projector': False}),
}
BASELINE = 'ResNet, same trunk'


def create(name: str) -> torch.nn.Module:
    """A variant by its name, or the ResNet whose last stage is as wide as the VT modules' map."""
    if name == BASELINE:
        return ResNet(channels=(*VT['channels'], VT['feature_dim']), **TRUNK)
    return timm.create_model('test_vt_resnet', **TRUNK, **VT, **VARIANTS[name][1])


def _strokes(rng: np.random.Generator) -> Image.Image:
    """Random curved strokes of a pen as thick and as blurred as the digits'."""
    small = Image.new('L', (SIZE // 3, SIZE // 3))
    draw = ImageDraw.Draw(small)
    for _ in range(6):
        x, y = rng.uniform(0, small.width, 2)
        angle = rng.uniform(0, 2 * math.pi)
        bend = rng.normal(0, 0.5)
        points = [(x, y)]
        for _ in range(rng.integers(3, 6)):
            angle += bend
            x, y = x + 1.5 * math.cos(angle), y + 1.5 * math.sin(angle)
            points.append((x, y))
        draw.line(points, fill=int(rng.integers(120, 256)), width=1)
    return small.resize((SIZE, SIZE), Image.BILINEAR)


def compose(scans: List[List[Image.Image]], number: int, seed: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Compose images.

    Args:
        scans: Scans of each digit.
        number: Images, half of them with the same digit twice (never the same scan).
        seed: Of everything random.

    Returns:
        Images (N, 1, 96, 96), normalised, and labels (N,), 1 for the same digit.
    """
    rng = np.random.default_rng(seed)
    images, labels = np.empty((number, SIZE, SIZE), np.uint8), np.arange(number) % 2
    for i, same in enumerate(labels):
        first = rng.integers(10)
        second = first if same else (first + rng.integers(1, 10)) % 10
        a = rng.integers(len(scans[first]))
        b = (a + rng.integers(1, len(scans[first]))) % len(scans[first]) if same else rng.integers(len(scans[second]))
        while True:
            places = rng.integers(0, SIZE - DIGIT, (2, 2))
            if np.hypot(*(places[0] - places[1])) >= SIZE / 2:
                break
        canvas = np.asarray(_strokes(rng)).copy()
        for scan, (x, y) in zip((scans[first][a], scans[second][b]), places):
            canvas[y:y + DIGIT, x:x + DIGIT] = np.asarray(scan)
        images[i] = canvas
    x = torch.from_numpy(images)[:, None].float() / 255
    return (x - 0.15) / 0.3, torch.from_numpy(labels)


def load_scans() -> Dict[str, List[List[Image.Image]]]:
    """The digits' scans by split and digit, at the size in which they are pasted."""
    with TemporaryDirectory() as folder:
        write_digits(folder)
        split = find_split(folder)
        return {
            name: [[load_image(p).convert('L').resize((DIGIT, DIGIT), Image.BILINEAR) for p, t in samples if t == digit]
                   for digit in range(10)]
            for name, samples in (('train', split.train), ('test', split.val))}


@torch.inference_mode()
def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Accuracy in percent."""
    model.eval()
    return 100 * torch.cat([model(part).argmax(1) for part in x.split(256)]).eq(y).float().mean().item()


def train(name: str, seed: int, epochs: int, data: dict) -> dict:
    """Train a variant; its test accuracy is that after the last epoch."""
    torch.manual_seed(seed)
    model = create(name)
    x, y = data['train']
    steps = len(x) // BATCH
    optimizer = create_optimizer_v2(model, 'momentum', lr=LR, weight_decay=1e-4)
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=epochs, warmup_epochs=1, warmup_lr=LR / 100, step_on_epochs=False,
        updates_per_epoch=steps)
    generator = torch.Generator().manual_seed(seed)
    losses, start = [], time.monotonic()
    for epoch in tqdm(range(epochs), desc=f'{name}, seed {seed}', leave=False):
        model.train()
        total = 0.
        for step, batch in enumerate(torch.randperm(len(x), generator=generator)[:steps * BATCH].split(BATCH)):
            scheduler.step_update(epoch * steps + step)
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / steps)
    return {
        'variant': name, 'seed': seed, 'epochs': epochs, 'loss': losses, 'test': accuracy(model, *data['test']),
        'train': accuracy(model, *(t[:2000] for t in data['train'])),
        'parameters': sum(p.numel() for p in model.parameters()), 'seconds': time.monotonic() - start}
