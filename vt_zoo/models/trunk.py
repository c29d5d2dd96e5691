"""Trunks of VTNet: a convolutional timm model up to its feature map of stride 16."""
from typing import Any, Tuple

import timm
import torch.nn as nn
from timm.models import FeatureListNet, is_model
from timm.models._features import FeatureGetterNet
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features

STRIDE = 16


def count_levels(name: str) -> int:
    """Number of a model's feature maps down to stride 16.

    Raises:
        ValueError: timm has no such model, or the model has no feature map of stride 16.
    """
    if not is_model(name):
        raise ValueError(f'trunk must be the name of a model of timm, got {name!r}')
    try:
        probe = timm.create_model(name, features_only=True, device='meta')
    except (AssertionError, RuntimeError, TypeError, AttributeError) as e:
        raise ValueError(f'trunk must be a model that timm gives feature maps of, got {name!r}') from e
    strides = probe.feature_info.reduction()
    if sorted(set(strides)) != strides or STRIDE not in strides:
        raise ValueError(
            f'trunk must be a convolutional model with a feature map of stride {STRIDE} among others, got {name!r} '
            f'with strides {", ".join(map(str, dict.fromkeys(strides)))}')
    known = FeatureListNet, FeatureGetterNet, EfficientNetFeatures, MobileNetV3Features
    if type(probe) not in known or str(getattr(probe, 'output_fmt', 'NCHW')) not in ('NCHW', 'Format.NCHW'):
        raise ValueError(f'trunk must be a model that timm cuts at a map (B, C, H, W) of stride {STRIDE}, got {name!r}')
    return strides.index(STRIDE) + 1


def create_trunk(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a trunk, which maps images (B, in_chans, H, W) to a list of feature maps (B, C, H / stride, W / stride).

    Args:
        name: A convolutional timm model, with a tag for weights other than its default ones.
        pretrained: Load timm's weights.
        **kwargs: Arguments of the timm model.

    Returns:
        timm's own modules down to the map of stride 16, with `feature_info`.

    Raises:
        ValueError: timm has no such model, or the model has no feature map of stride 16.
    """
    levels = count_levels(name)
    trunk = timm.create_model(name, pretrained, features_only=True, out_indices=tuple(range(levels)), **kwargs)
    if isinstance(trunk, (EfficientNetFeatures, MobileNetV3Features)):  # these keep the blocks after the last map
        last = trunk.feature_info.module_name()[-1]
        trunk.blocks = trunk.blocks[:int(last.split('.')[1]) + 1]
    return trunk


def timms_modules(trunk: nn.Module) -> Tuple[str, nn.Module]:
    """Return the prefix of the names of the timm model's modules in a trunk, and the module that holds them."""
    return ('model.', trunk.model) if isinstance(trunk, FeatureGetterNet) else ('', trunk)
