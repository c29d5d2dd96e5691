"""A model to look into, classifier or segmenter, with its own way to prepare images."""
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch
import torch.nn as nn
from PIL import Image
from timm.data import resolve_data_config

from ..data.images import image_transform
from ..errors import InputError, printable
from ..files import check_regular
from .files import load_model

__all__ = ['Subject', 'create_prepare', 'is_segmenter', 'load_subject']


@dataclass
class Subject:
    """A model and what turns an image into its input.

    Attributes:
        model: In eval mode.
        classes: Names of its classes.
        preprocessing: What `prepare` does, in timm's terms: `input_size` (C, H, W), with H and W None where images keep
            their own or get a `short_side`; `interpolation`, `crop_pct`, `crop_mode`, `mean`, `std`.
        is_segmenter: Whether it gives a class for each pixel.
    """
    model: nn.Module
    classes: List[str]
    preprocessing: Dict[str, Any]
    is_segmenter: bool

    @cached_property
    def prepare(self) -> Callable[[Image.Image], torch.Tensor]:
        """Makes a PIL image a normalised tensor (C, H, W); as `create_prepare`."""
        return create_prepare(self.preprocessing)

    def shown(self, x: torch.Tensor) -> Image.Image:
        """The image that a prepared tensor (C, H, W) stands for: what the model sees."""
        mean, std = (torch.tensor(self.preprocessing[key])[:, None, None] for key in ('mean', 'std'))
        pixels = ((x * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())


def load_subject(name_or_dir: str) -> Subject:
    """Load a model with its weights.

    Args:
        name_or_dir: What `vt_zoo.weights.files.load_model` takes, or a folder of `vt-zoo segment train`. A segmenter
            sees images at its eval_size, at their own where it has none.

    Raises:
        InputError: As `load_model`, or `load_segmentation_model`; the model has not as many classes as names for them.
    """
    if is_segmenter(Path(name_or_dir)):
        from .segmenters import load_segmentation_model

        loaded = load_segmentation_model(name_or_dir)
        fixed = isinstance(loaded.eval_size, tuple)
        preprocessing = {
            'input_size': (len(loaded.mean), *(loaded.eval_size if fixed else (None, None))),
            'short_side': None if fixed else loaded.eval_size, 'interpolation': 'bilinear', 'crop_pct': 1.0,
            'crop_mode': 'squash', 'mean': loaded.mean, 'std': loaded.std}
        return Subject(loaded.model, loaded.classes, preprocessing, True)
    model = load_model(name_or_dir)
    data_config = resolve_data_config({}, model=model)
    classes = [printable(str(n)) for n in model.pretrained_cfg.get('label_names') or range(model.num_classes)]
    if len(classes) != model.num_classes:
        raise InputError(f'model {name_or_dir} has {model.num_classes} classes, its config.json names {len(classes)}')
    return Subject(model, classes, data_config, False)


def create_prepare(preprocessing: Dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """`Subject.prepare` of `Subject.preprocessing`.

    Raises:
        InputError: It takes neither 1 nor 3 channels, or is a segmenter's and what segmentation needs is not installed.
    """
    if 'short_side' not in preprocessing:
        return image_transform(preprocessing)

    try:
        from ..segmentation.metrics import to_eval_size
        from ..segmentation.predict import prepare_image
    except ImportError as e:
        raise InputError(f"segmentation needs {e.name}: pip install 'vt_zoo[segmentation]'") from None
    size = tuple(preprocessing['input_size'][1:])
    eval_size = preprocessing['short_side'] if None in size else size

    def prepare(image: Image.Image) -> torch.Tensor:
        return to_eval_size(prepare_image(image, preprocessing['mean'], preprocessing['std'])[None], eval_size)[0]
    return prepare


def is_segmenter(folder: Path) -> bool:
    """Whether a folder holds a model of `vt-zoo segment train`."""
    check_regular(folder / 'config.json', 'file')
    try:
        return '_model_class' in json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return False
