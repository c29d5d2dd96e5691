"""Augmentation and normalisation of an image together with its mask, by torchvision's transforms v2.

Random numbers come from torch's global generator, which a DataLoader seeds in each of its processes.
"""
from typing import Any, Callable, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..errors import InputError
from .datasets import SegmentationDataset

__all__ = ['eval_transform', 'train_transform']

Pair = Tuple[torch.Tensor, torch.Tensor]


def train_transform(
        crop_size: Tuple[int, int],
        scale: Tuple[float, float],
        hflip: float,
        mean: Sequence[float],
        std: Sequence[float],
        flip_pairs: Sequence[Tuple[int, int]] = (),
) -> Callable[[Image.Image, np.ndarray], Pair]:
    """Create a transform that resizes by a random factor, takes a random crop, flips at random and normalises.

    Args:
        crop_size: (height, width) of the result. If the resized image is smaller, it is placed at random in the crop;
            around it, the image is `mean` (0 after normalising) and the mask is 255.
        scale: Smallest and largest factor by which the image is resized.
        hflip: Probability of a horizontal flip.
        mean: Mean of each channel, for values 0 to 1.
        std: Standard deviation of each channel, for values 0 to 1.
        flip_pairs: Pairs of classes that are swapped in a flip (`SegmentationDataset.flip_pairs`).

    Returns:
        Function of (image, mask) that returns float32 (3, H, W) and int64 (H, W). It can be pickled.

    Raises:
        InputError: A size or factor is not positive, `scale` is not in order, or `hflip` is not a probability.
    """
    if min(crop_size) < 1:
        raise InputError(f'crop_size {tuple(crop_size)} must be positive')
    if not 0 < scale[0] <= scale[1]:
        raise InputError(f'scale {tuple(scale)} must be two factors, 0 < smallest <= largest')
    if not 0 <= hflip <= 1:
        raise InputError(f'hflip {hflip} must be a probability, 0 to 1')
    fill = {tv_tensors.Image: list(mean), tv_tensors.Mask: SegmentationDataset.ignore_index}
    return v2.Compose([
        _to_tv_tensors,
        _RandomScale(scale),
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomCrop(crop_size, pad_if_needed=True, fill=fill),
        _RandomMirror(hflip, flip_pairs),
        v2.Normalize(mean, std),
        _to_tensors,
    ])


def eval_transform(
        mean: Sequence[float],
        std: Sequence[float],
        size: Optional[Tuple[int, int]] = None,
) -> Callable[[Image.Image, np.ndarray], Pair]:
    """Create a transform that normalises, and resizes if a size is given.

    Args:
        mean: Mean of each channel, for values 0 to 1.
        std: Standard deviation of each channel, for values 0 to 1.
        size: (height, width) to which image and mask are resized, whatever their aspect ratio; metrics are then
            computed on the resized mask. None keeps the image's own size, so that images of different sizes need
            batches of one.

    Returns:
        Function of (image, mask) that returns float32 (3, H, W) and int64 (H, W). It can be pickled.

    Raises:
        InputError: The size is not positive.
    """
    if size is not None and min(size) < 1:
        raise InputError(f'size {tuple(size)} must be positive')
    resize = [] if size is None else [_Resize(size)]
    return v2.Compose([
        _to_tv_tensors, *resize, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), _to_tensors])


def _to_tv_tensors(image: Image.Image, mask: np.ndarray) -> Tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Convert both to uint8, which resizes faster than int64 and is large enough for labels."""
    return F.to_image(image), tv_tensors.Mask(torch.as_tensor(mask).to(torch.uint8))


def _to_tensors(image: tv_tensors.Image, mask: tv_tensors.Mask) -> Pair:
    return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor).long()


def _resize(image: tv_tensors.Image, mask: tv_tensors.Mask, size: Sequence[int]) -> Tuple[Any, Any]:
    """Resize both to (height, width).

    v2.Resize would use the mode 'nearest' for the mask, which takes the pixel at the corner of each area, half a pixel
    off from bilinear interpolation, which is centred on the area. 'nearest-exact' takes the pixel in the middle.
    """
    resized = F.resize_image(mask.as_subclass(torch.Tensor)[None], size, v2.InterpolationMode.NEAREST_EXACT)[0]
    return F.resize(image, size, antialias=True), tv_tensors.wrap(resized, like=mask)


class _Resize:
    def __init__(self, size: Tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> Tuple[Any, Any]:
        return _resize(image, mask, self.size)


class _RandomScale:
    def __init__(self, scale: Tuple[float, float]) -> None:
        self.scale = scale

    def __call__(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> Tuple[Any, Any]:
        factor = torch.empty(()).uniform_(*self.scale).item()
        return _resize(image, mask, [max(round(n * factor), 1) for n in mask.shape])


class _RandomMirror:
    def __init__(self, probability: float, flip_pairs: Sequence[Tuple[int, int]]) -> None:
        self.probability = probability
        self.swapped = torch.arange(256, dtype=torch.uint8)
        for left, right in flip_pairs:
            self.swapped[left], self.swapped[right] = right, left

    def __call__(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> Tuple[Any, Any]:
        if torch.rand(()) >= self.probability:
            return image, mask
        mirrored = self.swapped[F.horizontal_flip(mask).long()]
        return F.horizontal_flip(image), tv_tensors.wrap(mirrored, like=mask)
