"""Models of the paper, registered with timm when this package is imported."""
from .vt_net import VTNet
from .vt_resnet import VTResNet
