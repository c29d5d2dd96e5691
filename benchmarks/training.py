"""Training on images that lie in memory as tensors, for the benchmarks that compare models by one recipe."""
from typing import Callable, Iterable, Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.scheduler import create_scheduler_v2


def cross_entropy(
        model: torch.nn.Module,
        images: torch.Tensor,
        classes: torch.Tensor,
        autocast: Optional[torch.dtype] = None,
) -> torch.Tensor:
    """Loss of a batch; `autocast` is the type in which the model runs what may be in it, None for float32."""
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        logits = model(images)
    return F.cross_entropy(logits.float(), classes)


def train_epochs(
        model: torch.nn.Module,
        data: Tuple[torch.Tensor, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        orders: Iterable[torch.Tensor],
        epochs: int,
        batch_size: int,
        warmup_lr: float,
        first: int = 0,
        loss_of: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor] = cross_entropy,
) -> Iterator[float]:
    """Train with one epoch of warm-up and a cosine, step by step; whole batches only.

    Args:
        model: Gives logits.
        data: Images (N, C, H, W), or what gives images of indices, and classes (N,).
        optimizer: Its learning rate is the peak.
        orders: Permutations of the images, one an epoch that is left.
        epochs: Number of epochs.
        batch_size: Images a step.
        warmup_lr: Rate of the first step.
        first: Epochs that were trained already.
        loss_of: Loss of the model on images and classes.

    Yields:
        Mean training loss of each epoch, after it.
    """
    x, y = data
    steps = len(y) // batch_size
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=epochs, warmup_epochs=1, warmup_lr=warmup_lr, step_on_epochs=False,
        updates_per_epoch=steps)
    for epoch, order in enumerate(orders, first):
        model.train()
        total = 0.
        for step, batch in enumerate(order[:steps * batch_size].split(batch_size)):
            scheduler.step_update(epoch * steps + step)
            loss = loss_of(model, x[batch], y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        yield total / steps


@torch.inference_mode()
def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, batch_size: int) -> float:
    """Accuracy in percent."""
    model.eval()
    return 100 * torch.cat([model(part).argmax(1) for part in x.split(batch_size)]).eq(y).float().mean().item()
