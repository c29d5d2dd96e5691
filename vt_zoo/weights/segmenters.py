"""Segmentation models as files: `save_pretrained`'s folder, whose config.json also says how to use the model."""
import contextlib
import io
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg

from ..data.label_map import read_label_map
from ..errors import InputError, first_line
from ..segmentation.settings import SegmentSettings
from .files import whole, why_weights_do_not_fit

__all__ = ['LoadedModel', 'create_segmentation_model', 'encoder_statistics', 'load_segmentation_model',
           'save_segmentation_model']


@dataclass
class LoadedModel:
    """A model in eval mode and what goes with its weights."""
    model: nn.Module
    classes: List[str]
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    eval_size: Optional[Union[int, Tuple[int, int]]]
    label_map: Optional[Dict[Union[int, str], int]] = None  # of the masks that it was trained on


def _classes() -> Dict[str, type]:
    if sys.flags.optimize > 1:
        raise InputError(
            'segmentation_models_pytorch cannot be imported without docstrings: leave out -OO, or PYTHONOPTIMIZE=2')
    try:
        from ..models.vt_fpn import VTFPN, PanopticFPN
    except ImportError as e:
        raise InputError(f"segmentation needs {e.name}: pip install 'vt_zoo[segmentation]'") from None
    return {'vt_fpn': VTFPN, 'panoptic_fpn': PanopticFPN}


def create_segmentation_model(settings: SegmentSettings, num_classes: int) -> nn.Module:
    """Create the model that settings name.

    Raises:
        InputError: There is no such encoder, or its weights cannot be had.
    """
    kwargs: Dict[str, Any] = {'pyramid_channels': settings.pyramid_channels, 'head_channels': settings.head_channels}
    if settings.arch == 'vt_fpn':
        kwargs.update(num_tokens=settings.num_tokens, token_dim=settings.token_dim)
    weights = None
    if settings.encoder_weights:
        weights = True if settings.encoder_name.startswith('tu-') else 'imagenet'
    try:
        return _classes()[settings.arch](
            encoder_name=settings.encoder_name, encoder_weights=weights, classes=num_classes, **kwargs)
    except InputError:
        raise
    except Exception as e:  # timm, segmentation_models_pytorch and the hub's client each raise their own
        raise InputError(f'encoder {settings.encoder_name!r} cannot be made: {first_line(e)[:200]}') from e


def encoder_statistics(encoder_name: str) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """Mean and std that an encoder was trained with; ImageNet's where that is not known."""
    cfg = get_pretrained_cfg(encoder_name[3:], allow_unregistered=True) if encoder_name.startswith('tu-') else None
    if cfg is None:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return tuple(cfg.mean), tuple(cfg.std)


def save_segmentation_model(
        path: Union[str, Path],
        loaded: LoadedModel,
        dataset: Optional[str] = None,
        metrics: Optional[Dict[str, Any]] = None,
        training: Optional[Dict[str, Any]] = None,
) -> None:
    """Write a model: `save_pretrained`'s files, whole or not at all, with class names and preprocessing in config.json.

    Args:
        path: Folder to write; one that stands there is replaced.
        loaded: Model and what goes with it.
        dataset: For the model card: what it was trained on.
        metrics: For the model card: names and values of measures.
        training: How the weights came about, JSON-able, for config.json.
    """
    config = {
        **loaded.model.config, '_model_class': type(loaded.model).__name__, 'encoder_weights': None,
        '_classes': loaded.classes, '_mean': loaded.mean, '_std': loaded.std, '_eval_size': loaded.eval_size,
        **({'_label_map': loaded.label_map} if loaded.label_map else {}),
        **({'_training': training} if training else {})}
    with whole(path) as new:
        loaded.model.save_pretrained(new, config=config, dataset=dataset, metrics=metrics)


def load_segmentation_model(path: Union[str, Path]) -> LoadedModel:
    """Load a model that `save_segmentation_model` wrote.

    Args:
        path: Its folder.

    Raises:
        InputError: There is no such folder, a file is missing or damaged, or the weights are those of another model.
    """
    path = Path(path)
    for name in ('config.json', 'model.safetensors'):
        if not (path / name).is_file():
            raise InputError(f'model folder {path} holds no {name}' if path.is_dir() else
                             f'model folder {path} does not exist')
    classes = {c.__name__: c for c in _classes().values()}
    try:
        config = json.loads((path / 'config.json').read_text(encoding='utf-8'))
        kind = config['_model_class']
        if kind not in classes:
            raise InputError(f'model folder {path} holds a {kind}, allowed are {", ".join(classes)}')
        # huggingface_hub prints that it loads, segmentation_models_pytorch warns of each tensor before it raises
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            model = classes[kind].from_pretrained(path)
        size = config['_eval_size']
        loaded = LoadedModel(
            model, list(config['_classes']), tuple(map(float, config['_mean'])), tuple(map(float, config['_std'])),
            tuple(size) if isinstance(size, list) else size, read_label_map(config.get('_label_map')))
    except InputError:
        raise
    except KeyError as e:
        raise InputError(f'config.json of model folder {path} has no {e}: it is not of `vt-zoo segment train`') from e
    except Exception as e:  # a damaged file makes the libraries raise nearly anything
        reason = why_weights_do_not_fit(e) if 'loading state_dict' in str(e) else first_line(e)
        raise InputError(f'model folder {path} cannot be loaded: {reason}') from e
    num_classes = model.config['classes']
    if len(loaded.classes) != num_classes:
        raise InputError(f'model folder {path} has {num_classes} classes, its config.json names {len(loaded.classes)}')
    return loaded
