"""Self-attention of timm's Vision Transformers, for the locality ratio of Figure 5."""
from typing import List, Tuple

import torch
import torch.nn as nn

__all__ = ['capture_self_attention', 'patch_grid']


def _attention_modules(model: nn.Module) -> List[nn.Module]:
    return [m for m in model.modules() if hasattr(m, 'fused_attn') and hasattr(m, 'attn_drop')]


def patch_grid(model: nn.Module, images: torch.Tensor) -> Tuple[Tuple[int, int], int]:
    """(rows, columns) of the patches of images (B, C, H, W), and the number of class and register tokens before them.

    Raises:
        ValueError: The model is not one of timm's ViTs.
    """
    embed = getattr(model, 'patch_embed', None)
    if not hasattr(embed, 'patch_size') or not _attention_modules(model):
        raise ValueError(f'model must be a Vision Transformer of timm, {type(model).__name__} is not one')
    rows, columns = (n // p for n, p in zip(images.shape[-2:], embed.patch_size))
    return (rows, columns), getattr(model, 'num_prefix_tokens', 0)


@torch.no_grad()
def capture_self_attention(model: nn.Module, images: torch.Tensor) -> List[torch.Tensor]:
    """Run a ViT on images and record the attention of each layer.

    timm's fused attention does not expose its weights, so it is switched off for this run and restored afterwards.
    (timm's `AttentionExtract` silently returns nothing unless fused attention was off when the model was created.)

    Args:
        model: Vision Transformer of timm.
        images: Images (B, C, H, W), preprocessed as the model expects.

    Returns:
        Attention (B, heads, N, N) of each layer, which sums to one over the last dimension.

    Raises:
        ValueError: The model is not one of timm's ViTs.
    """
    grid, prefix = patch_grid(model, images)
    modules = _attention_modules(model)
    fused = [m.fused_attn for m in modules]
    maps: List[torch.Tensor] = []
    handles = [m.attn_drop.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0])) for m in modules]
    try:
        for m in modules:
            m.fused_attn = False
        model(images)
    finally:
        for m, was in zip(modules, fused):
            m.fused_attn = was
        for handle in handles:
            handle.remove()
    tokens = prefix + grid[0] * grid[1]
    if not maps or any(m.shape[-2:] != (tokens, tokens) for m in maps):
        raise ValueError(f'model must attend from each of its {tokens} tokens to each, {type(model).__name__} does not')
    return maps
