"""Models, registered with timm when this package is imported."""
import sys
from typing import Dict, List

import timm
import torch.nn as nn

from ..errors import InputError
from .vt_net import VTNet
from .vt_resnet import VTResNet

__all__ = ['VTNet', 'VTResNet', 'list_classifiers']


def list_classifiers() -> List[str]:
    """Names of the package's classifiers, without tags."""
    return timm.list_models(module=['vt_net', 'vt_resnet'])


def segmenter_classes() -> Dict[str, type[nn.Module]]:
    """Classes of the package's segmenters, by the name of their architecture.

    Raises:
        InputError: The packages that segmentation needs are not installed.
    """
    if sys.flags.optimize > 1:
        raise InputError(
            'segmentation_models_pytorch cannot be imported without docstrings: leave out -OO, or PYTHONOPTIMIZE=2')
    try:
        from .vt_fpn import VTFPN, PanopticFPN
    except ImportError as e:
        raise InputError(f"segmentation needs {e.name}: pip install 'vt_zoo[segmentation]'") from None
    return {'vt_fpn': VTFPN, 'panoptic_fpn': PanopticFPN}
