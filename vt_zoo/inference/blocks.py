"""timm's own inference forms of blocks that have one, such as RepVGG's, MobileOne's and FastViT's."""
import torch.nn as nn


def reparameterize_blocks(model: nn.Module) -> None:
    """Put timm's blocks in a model, in place, into their inference form.

    timm's `reparameterize_model` does the same, but also calls blocks that are in it already, and FastViT's then raise.
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
