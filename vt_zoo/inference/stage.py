"""Inference forms of the VT stage and VT-FPN's neck, which are exact in eval mode.

In eval mode, batch norms are affine and can be folded into the maps before them. The scale of the logits' norm is
folded into the tokenizer's filters or, in a recurrent tokenizer, becomes a parameter of its own, `scale`; the shift is
the same for all pixels and cancels in the softmax over them. A clustering tokenizer keeps its norm, as its filters
depend on the image. (Whatever can run on the L tokens instead of all H*W pixels already does so in training, see
`vt_zoo.layers.linear`.) The following stay as they are: norms that depend on their input, parts whose class is not one
of `vt_zoo.layers` (even if it is a subclass), and layers with a hook, an adapter, a parametrization or offloading.
"""
import copy
from typing import Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import DropPath

from vt_zoo.layers import FilterTokenizer, RecurrentTokenizer, TokenModule, VTModule, VTNeck, VTStage
from vt_zoo.layers.linear import GroupedTokenLinear, PixelLinear, TokenLinear, TokenNorm

from .fold import fixed_affine, fold_norm, in_float64, is_plain, new_parameter, runs_alone

__all__ = ['InferenceStage', 'fold_neck']


class GroupedTokenMap(nn.Module):
    """Linear map of groups of a token's channels: (B, L, C_in) -> (B, L, C_out)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """
        Args:
            conv: The 1x1 convolution to apply to tokens.
        """
        super().__init__()
        self.groups = conv.groups
        self.weight = new_parameter(conv.weight.detach().flatten(1).unflatten(0, (conv.groups, -1)), conv.weight)
        self.bias = None if conv.bias is None else new_parameter(conv.bias.detach(), conv.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, L, C_in) to (B, L, C_out)."""
        parts = tokens.flatten(0, 1).unflatten(1, (self.groups, -1)).transpose(0, 1)  # (groups, B*L, C_in / groups)
        if self.bias is None:
            mapped = torch.bmm(parts, self.weight.transpose(1, 2))
        else:
            mapped = torch.baddbmm(self.bias.view(self.groups, 1, -1), parts, self.weight.transpose(1, 2))
        return mapped.transpose(0, 1).reshape(tokens.shape[0], tokens.shape[1], -1)


class TokenAffine(nn.Module):
    """Scale and shift of the channels of tokens: (B, L, C) -> (B, L, C)."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        """
        Args:
            weight: Scale (C).
            bias: Shift (C).
        """
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scale and shift tokens (B, L, C)."""
        return tokens * self.weight + self.bias


class InferenceStage(nn.ModuleList):
    """A trained VT stage in its inference form, which returns the same feature map and tokens as in eval mode.

    Its modules are copies of the stage's, with the norms folded into the maps.

    Attributes:
        out_chs: Channels of the returned feature map.
    """

    def __init__(self, stage: VTStage) -> None:
        """
        Args:
            stage: The trained stage, which is not changed.

        Raises:
            TypeError: `stage` is not a VTStage.
        """
        if not isinstance(stage, VTStage):
            raise TypeError(f'stage must be a VTStage, got {type(stage).__name__}')
        super().__init__(copy.deepcopy(module) for module in stage)
        self.out_chs = stage.out_chs
        for module in self:
            if isinstance(module, (VTModule, TokenModule)):
                fold_maps(module)
            for part in module.modules():
                if isinstance(getattr(part, 'drop_path', None), DropPath) and runs_alone(part.drop_path):
                    part.drop_path = nn.Identity()
        self.train(stage.training)

    def forward(self, x: torch.Tensor, tokens: Optional[torch.Tensor] = None) -> Tuple[torch.Tensor, torch.Tensor]:
        """Refine a feature map (B, C_in, H, W); return the refined map (B, C_out, H, W) and the tokens (B, L, CT)."""
        for module in self:
            x, tokens = module(x, tokens)
        assert tokens is not None  # there is at least one module
        return x, tokens


def fold_neck(neck: VTNeck) -> VTNeck:
    """Create the inference form of VT-FPN's neck, which itself is not changed.

    Raises:
        TypeError: `neck` is not a VTNeck.
    """
    if not isinstance(neck, VTNeck):
        raise TypeError(f'neck must be a VTNeck, got {type(neck).__name__}')
    return fold_maps(copy.deepcopy(neck)).train(neck.training)


def fold_maps(part: nn.Module) -> nn.Module:
    """Fold each norm in a part of a VT module into the map before it, replacing its children in place."""
    if type(part) in (PixelLinear, GroupedTokenLinear, TokenLinear, TokenNorm):
        return _folded(part) if runs_alone(part) else part
    for name, child in part.named_children():
        setattr(part, name, fold_maps(child))
    if type(part) in (FilterTokenizer, RecurrentTokenizer):
        _fold_logit_norm(part)
    return part


def _fold_logit_norm(tokenizer: nn.Module) -> None:
    affine = fixed_affine(tokenizer.logit_norm)
    if affine is None or type(tokenizer.softmax) is not nn.Softmax or not runs_alone(tokenizer.softmax):
        return
    scale = affine[0]
    if isinstance(tokenizer, RecurrentTokenizer):
        tokenizer.scale = new_parameter(scale[:, None] * tokenizer.scale, tokenizer.logit_norm.running_mean)
    elif is_plain(tokenizer.filters):
        weight = tokenizer.filters.weight
        tokenizer.filters = copy.deepcopy(tokenizer.filters)  # they may be shared with another tokenizer
        tokenizer.filters.weight = new_parameter(scale[:, None, None, None] * in_float64(weight), weight)
    else:
        return
    tokenizer.logit_norm = nn.Identity()


def _folded(layer: nn.Module) -> nn.Module:
    """Return a layer of `vt_zoo.layers.linear` with its norm folded in, or the layer itself if that is not possible."""
    if isinstance(layer, TokenNorm):
        affine = fixed_affine(layer.norm)
        return layer if affine is None else TokenAffine(*(new_parameter(x, layer.norm.running_mean) for x in affine))
    conv = fold_norm(layer.conv, layer.norm)
    if conv is None and type(layer.norm) is nn.Identity and runs_alone(layer.norm) and is_plain(layer.conv):
        conv = layer.conv  # a map without a norm
    if conv is None:
        return layer
    return GroupedTokenMap(conv) if isinstance(layer, GroupedTokenLinear) else conv
