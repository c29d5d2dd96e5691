"""VT-FPN and the panoptic FPN for semantic segmentation, in segmentation_models_pytorch's manner.

Needs the extra `segmentation`: it is not imported by `import vt_zoo`.
"""
from vt_zoo.layers import VTNeck

from .decoder import FPNNeck, PanopticDecoder
from .model import VTFPN, PanopticFPN

__all__ = ['VTFPN', 'FPNNeck', 'PanopticDecoder', 'PanopticFPN', 'VTNeck']
