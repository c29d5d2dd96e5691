"""Settings of training a segmenter."""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple, Union

from .._moved import old_names
from ..data.label_map import read_label_map
from ..errors import MAX_INT, MAX_PIXELS, MAX_SIDE, InputError, either, short
from ..training.settings import (
    LEARNING_RATE,
    SHARE,
    UNDER_ONE,
    Allowed,
    Settings,
    at_least,
    documented,
    one_of,
    ordered,
    setting,
)

__all__ = ['SegmentSettings']

ARCHITECTURES = ('vt_fpn', 'panoptic_fpn')
SCHEDULES = ('multistep', 'poly', 'cosine')
PRECISIONS = ('no', 'bf16', 'fp16')
MAX_WIDTH = 4096  # channels of a layer's output
MAX_SCALE = 16
MAX_POWER = 100
MIN_STD, MAX_STD = 0.001, 10  # of images with values from 0 to 1


def _is_size(value: Union[int, Tuple[int, int]]) -> bool:
    sides = value if isinstance(value, tuple) else (value,)
    return min(sides) >= 1 and max(sides) <= MAX_SIDE


def _read_weights(value: Union[bool, str]) -> Union[bool, str]:
    """Read `encoder_weights`."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value and Path(value).is_dir():
        return str(Path(value))
    raise InputError(f'encoder_weights must be true, false or the folder of a classifier, got {short(value)}')


@documented
@dataclass
class SegmentSettings(Settings):
    """Settings that decide the outcome of `vt-zoo segment train`.

    The optimizer is the paper's (section 5.3: SGD, with Detectron2's momentum of 0.9). The default learning rate, batch
    size and length are for small data sets. As in Detectron2, training is counted in iterations, not epochs.

    Raises:
        InputError: A value is not of its field's type, or not allowed.
    """
    COMMAND = 'vt-zoo segment train'
    FOLDER = 'segmentation'

    format: str = setting(
        'folder', 'NAME', 'layout of the data set: folder, coco_panoptic_stuff, coco_stuff or lip')
    label_map: Optional[Dict[Union[int, str], int]] = setting(
        None, 'MAP', 'class of each value of the masks, e.g. {0: 0, 255: 1} or {"255,0,0": 1}', read=read_label_map)
    arch: str = setting(
        'vt_fpn', 'NAME', f'model architecture: {either(ARCHITECTURES)}', one_of(*ARCHITECTURES))
    encoder_name: str = setting(
        'tu-resnet50', 'NAME',
        'backbone, an encoder of segmentation_models_pytorch; tu-NAME is the model NAME of timm')
    encoder_weights: Union[bool, str] = setting(
        False, 'WEIGHTS', 'weights that the encoder starts from: true for its pretrained ones, false for random ones, '
        'or the folder of a classifier of the same timm model, as vt-zoo finetune writes it', read=_read_weights)
    num_tokens: int = setting(
        8, 'N', 'visual tokens per pyramid level; only for vt_fpn', at_least(1, MAX_WIDTH))
    token_dim: int = setting(1024, 'N', 'channels of a visual token; only for vt_fpn', at_least(1, MAX_WIDTH))
    pyramid_channels: int = setting(
        256, 'N', 'channels of each level of the feature pyramid', at_least(1, MAX_WIDTH))
    head_channels: int = setting(
        128, 'N', 'channels of the segmentation head, a multiple of 32',
        Allowed(lambda v: 32 <= v <= MAX_WIDTH and v % 32 == 0, f'a multiple of 32 and at most {MAX_WIDTH}'))
    iterations: int = setting(2000, 'N', 'number of optimizer steps', at_least(1))
    batch_size: int = setting(16, 'N', 'total batch size in images, over all processes', at_least(1))
    opt: str = setting('momentum', 'NAME', 'optimizer of timm, e.g. momentum or adamw')
    lr: float = setting(0.01, 'LR', 'peak learning rate', LEARNING_RATE)
    momentum: float = setting(0.9, 'M', 'optimizer momentum, from 0 to under 1', UNDER_ONE)
    weight_decay: float = setting(1e-4, 'W', 'weight decay, from 0 to under 1', UNDER_ONE)
    schedule: str = setting(
        'poly', 'NAME', f'learning rate schedule: {either(SCHEDULES)}', one_of(*SCHEDULES))
    steps: List[int] = setting(
        [], 'N', 'iterations at which the learning rate falls to a tenth; only for multistep', Allowed(
            lambda v: all(1 <= step <= MAX_INT for step in v), f'iterations of at least 1 and at most {MAX_INT}'))
    power: float = setting(0.9, 'P', 'exponent of the decay; only for poly', at_least(0, MAX_POWER))
    warmup: int = setting(0, 'N', 'number of iterations in which the learning rate rises', at_least(0))
    crop_size: Tuple[int, int] = setting(
        (512, 512), 'PIXELS', 'height and width of the training crops, in pixels',
        Allowed(_is_size, f'a height and a width of at least 1 and at most {MAX_SIDE}'))
    scale: Tuple[float, float] = setting(
        (0.5, 2.0), 'FACTOR', 'smallest and largest factor by which a training image is resized before it is cropped',
        ordered('factors', 0, MAX_SCALE))
    hflip: float = setting(0.5, 'P', 'horizontal flip probability, from 0 to 1', SHARE)
    mean: Optional[Tuple[float, float, float]] = setting(
        None, 'MEAN', 'mean of each channel, red, green and blue, of images with values from 0 to 1',
        Allowed(lambda v: all(0 <= value <= 1 for value in v), 'from 0 to 1'), none="the encoder's own")
    std: Optional[Tuple[float, float, float]] = setting(
        None, 'STD', 'standard deviation of each channel, red, green and blue', Allowed(
            lambda v: all(MIN_STD <= value <= MAX_STD for value in v), f'above 0: from {MIN_STD} to {MAX_STD}'),
        none="the encoder's own")
    eval_size: Optional[Union[int, Tuple[int, int]]] = setting(
        None, 'PIXELS', 'size of images at evaluation: their short side, or height and width; null for their own',
        Allowed(_is_size, f'a short side, or a height and a width, of at least 1 and at most {MAX_SIDE}'),
        none='their own')
    eval_every: int = setting(1000, 'N', 'iterations between evaluations on the validation images', at_least(1))
    checkpoint_every: int = setting(500, 'N', 'iterations between checkpoints', at_least(1))
    ema_decay: float = setting(
        0., 'DECAY', 'decay of the moving average of the weights, from 0 to under 1; 0 for none', UNDER_ONE)
    precision: str = setting(
        'no', 'NAME', f'mixed precision: {either(PRECISIONS)}', one_of(*PRECISIONS))
    seed: int = setting(
        0, 'N', 'random seed of weights, order and augmentation',
        Allowed(lambda v: 0 <= v < 2 ** 63, 'from 0 to under 2 ** 63'))

    def __post_init__(self) -> None:
        super().__post_init__()
        most = MAX_PIXELS // math.prod(self.crop_size)
        if self.batch_size > most:
            raise InputError(f'batch_size must be at most {most} for crops of this size, got {self.batch_size}')


__getattr__ = old_names(__name__)
