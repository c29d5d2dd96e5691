"""Models, registered with timm when this package is imported."""
from typing import List

import timm

from .vt_net import VTNet
from .vt_resnet import VTResNet


def list_classifiers() -> List[str]:
    """Names of the package's classifiers, without tags."""
    return timm.list_models(module=['vt_net', 'vt_resnet'])
