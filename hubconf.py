"""Models for torch.hub: `torch.hub.load('path/of/a/clone', 'vt_resnet50', source='local', num_classes=10)`."""
from vt_zoo.models.vt_resnet import test_vt_resnet, vt_resnet18, vt_resnet34, vt_resnet50, vt_resnet101  # noqa: F401

dependencies = ['torch', 'timm', 'huggingface_hub', 'safetensors']
