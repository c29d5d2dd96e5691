"""VT-FPN and the panoptic FPN for semantic segmentation, as models of segmentation_models_pytorch.

They need the extra `segmentation`; `import vt_zoo` does not import this package.
"""
from vt_zoo.layers import VTNeck

from .decoder import FPNNeck, PanopticDecoder
from .model import VTFPN, PanopticFPN

__all__ = ['VTFPN', 'FPNNeck', 'PanopticDecoder', 'PanopticFPN', 'VTNeck']
