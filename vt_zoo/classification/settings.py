"""Settings of training a classifier."""
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

from ..errors import MAX_SIDE, InputError, either, short
from ..training.settings import (
    LEARNING_RATE,
    SHARE,
    UNDER_ONE,
    Settings,
    at_least,
    documented,
    one_of,
    ordered,
    setting,
)

__all__ = ['FinetuneSettings']

PRECISIONS = ('auto', 'float32', 'bfloat16', 'float16')


def _read_model_kwargs(value: Any) -> Dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) and key.isidentifier() for key in value):
        raise InputError(f'model_kwargs must be arguments of the model, as {{trunk: regnety_016}}, got {short(value)}')
    return dict(value)


@documented
@dataclass
class FinetuneSettings(Settings):
    """Settings that decide the outcome of `vt-zoo finetune`, named as in timm's train.py.

    The defaults follow section 5.1 of the paper (SGD with momentum 0.9, weight decay 4e-5), but with a learning rate
    for small batches, and a cosine schedule instead of steps, since runs here are short.

    Raises:
        InputError: A value is not of its field's type, or not allowed.
    """
    COMMAND = 'vt-zoo finetune'
    FOLDER = 'finetune'

    model: str = setting(
        'vt_resnet18', 'NAME_OR_DIR',
        'name of the model to train, NAME.TAG or a folder for its weights, NAME.untrained for new ones')
    model_kwargs: Dict[str, Any] = setting(
        {}, 'KEY=VALUE', 'arguments of the model, e.g. trunk=regnety_016 for the model vt_net',
        read=_read_model_kwargs)
    epochs: int = setting(30, 'N', 'number of epochs to train', at_least(1))
    batch_size: int = setting(32, 'N', 'batch size in images, of all processes together', at_least(1))
    img_size: Optional[int] = setting(
        None, 'PIXELS', 'height and width of the input', at_least(1, MAX_SIDE), none="the model's own")
    opt: str = setting('momentum', 'NAME', 'optimizer of timm, e.g. momentum, rmsproptf or adamw')
    lr: float = setting(0.05, 'LR', 'peak learning rate', LEARNING_RATE)
    weight_decay: float = setting(4e-5, 'W', 'weight decay, from 0 to under 1', UNDER_ONE)
    warmup_epochs: int = setting(2, 'N', 'number of epochs in which the learning rate rises', at_least(0))
    smoothing: float = setting(0.1, 'P', 'label smoothing, from 0 to under 1', UNDER_ONE)
    drop: float = setting(0., 'P', 'dropout rate before the classifier', UNDER_ONE)
    drop_path: float = setting(0., 'P', 'drop path (stochastic depth) rate', UNDER_ONE)
    model_ema_decay: float = setting(
        0.998, 'DECAY', 'decay of the moving average of the weights, from 0 to under 1', UNDER_ONE)
    scale: Tuple[float, float] = setting(
        (0.35, 1.0), 'SHARE', 'smallest and largest area of a random crop, as a share of the image',
        ordered('numbers', 0, 1))
    ratio: Tuple[float, float] = setting(
        (3 / 4, 4 / 3), 'RATIO', 'smallest and largest aspect ratio of a random crop, width by height',
        ordered('numbers', 0.1, 10, inclusive=True))
    hflip: float = setting(0.5, 'P', 'horizontal flip probability, from 0 to 1', SHARE)
    color_jitter: float = setting(0.4, 'X', 'color jitter factor, from 0 to under 1', UNDER_ONE)
    aa: Optional[str] = setting(None, 'POLICY', 'AutoAugment policy of timm, e.g. rand-m9-mstd0.5')
    val_fraction: float = setting(
        0.2, 'P', 'share of the images to hold out if DATA_DIR has no val/, from 0 to under 1', UNDER_ONE)
    seed: int = setting(0, 'N', 'random seed of weights, order and augmentation', at_least(0))
    precision: str = setting(
        'auto', 'NAME',
        f'precision of training: {either(PRECISIONS)}; auto is mixed precision on cuda, '
        'else float32', one_of(*PRECISIONS))
