"""Inference forms of timm's own blocks, such as those of RepVGG, MobileOne and FastViT."""
import torch.nn as nn


def reparameterize_blocks(model: nn.Module) -> None:
    """Turn timm's blocks in a model into their inference form, in place.

    timm's `reparameterize_model` does the same, but also calls blocks that already have it, and FastViT's then raise.
    """
    for name, block in model.named_children():
        if getattr(block, 'reparam_conv', None) is not None:
            continue
        if hasattr(block, 'fuse'):
            setattr(model, name, block.fuse())
        elif hasattr(block, 'reparameterize'):
            block.reparameterize()
        else:
            reparameterize_blocks(block)
