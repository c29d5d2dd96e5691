"""Models of the paper, registered with timm when this package is imported."""
from .vt_resnet import VTResNet
