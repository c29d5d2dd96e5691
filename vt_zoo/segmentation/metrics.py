"""Mean IoU, IoU of each class and pixel accuracy over a data set."""
from dataclasses import dataclass
from typing import Any, Iterable, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from ..data.images import to_eval_size
from ..errors import InputError, first_line
from .datasets import SegmentationDataset

__all__ = ['SegmentMetrics', 'evaluate', 'segment']


@dataclass
class SegmentMetrics:
    """Metrics over all pixels of a data set together, from 0 to 1; ignored pixels do not count.

    Attributes:
        miou: Mean IoU over the classes that occur in a mask or in a prediction.
        iou: IoU of each class; None for a class that occurs in neither.
        pixel_accuracy: Share of correctly classified pixels.
    """
    miou: float
    iou: List[Optional[float]]
    pixel_accuracy: float


def segment(
        model: nn.Module,
        images: torch.Tensor,
        size: Tuple[int, int],
        eval_size: Optional[Union[int, Tuple[int, int]]] = None,
) -> torch.Tensor:
    """Compute the logits `(B, classes, *size)` of images (B, C, H, W).

    Args:
        model: Segmentation model.
        images: Normalised images.
        size: (height, width) of the returned logits.
        eval_size: (height, width), or short side, to which images are resized before the model; None for no resizing.

    Raises:
        InputError: The model does not take images of this size.
    """
    images = to_eval_size(images, eval_size)
    try:
        logits = model(images)
    except (RuntimeError, ValueError, AssertionError) as e:  # each library raises its own
        height, width = images.shape[-2:]
        raise InputError(f'the model does not take images of {height}x{width} pixels: {first_line(e)}') from e
    if logits.shape[-2:] != size:
        logits = F.interpolate(logits, size=size, mode='bilinear', align_corners=False)
    return logits


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        batches: Iterable[Any],
        num_classes: int,
        eval_size: Optional[Union[int, Tuple[int, int]]] = None,
) -> SegmentMetrics:
    """Evaluate a model at the resolution of the masks.

    With torch.distributed, each process passes its own batches, and all of them get the metrics over all batches.

    Args:
        model: Model; it is put into eval mode.
        batches: Pairs of normalised images (B, C, H, W) and masks (B, H, W) of classes, or 255.
        num_classes: Number of classes.
        eval_size: As in `segment`.

    Raises:
        InputError: No pixel of the masks has a class, or the model does not take images of one of the sizes.
    """
    device = next(model.parameters()).device
    model.eval()
    common = {'num_classes': num_classes, 'ignore_index': SegmentationDataset.ignore_index}
    metrics = MetricCollection({
        'iou': MulticlassJaccardIndex(average='none', zero_division=float('nan'), **common),
        'pixel_accuracy': MulticlassAccuracy(average='micro', **common),
    }).to(device)
    for images, masks in batches:
        logits = segment(model, images.to(device), tuple(masks.shape[-2:]), eval_size)
        metrics.update(logits.argmax(1), masks.to(device))
    values = metrics.compute()
    if values['iou'].isnan().all():
        raise InputError('no pixel of the masks has a class, all are ignored: nothing can be measured')
    return SegmentMetrics(
        miou=values['iou'].nanmean().item(),
        iou=[None if v != v else v for v in values['iou'].tolist()],
        pixel_accuracy=values['pixel_accuracy'].item(),
    )
