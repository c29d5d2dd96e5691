"""Models for torch.hub: `torch.hub.load('path/of/a/clone', 'vt_resnet50', source='local', num_classes=10)`."""
from vt_zoo.models.vt_net import (  # noqa: F401
    vt_convnext_tiny,
    vt_efficientnet_b0,
    vt_mobilenetv4_conv_small,
    vt_net,
    vt_regnety_016,
    vt_resnet50d,
    vt_resnext50_32x4d,
    vt_tf_efficientnet_lite0,
)
from vt_zoo.models.vt_resnet import test_vt_resnet, vt_resnet18, vt_resnet34, vt_resnet50, vt_resnet101  # noqa: F401

dependencies = ['torch', 'timm', 'huggingface_hub', 'safetensors']
