"""Inference forms of the VT stage and of VT-FPN's neck, exact in eval mode.

Batch norms are affine there and fold into the maps before them. The scale of the logits' norm goes onto the tokenizer's
filters, in a recurrent tokenizer as a parameter of its own, `scale`; its shift is one for all pixels and cancels in the
softmax over them. A clustering tokenizer keeps the norm, as its filters are an image's. (What can run on the L tokens
instead of on all H*W pixels does so in training already, see `vt_zoo.layers.linear`.) Norms that depend on their input,
parts of other classes than those of `vt_zoo.layers` (subclasses too), and layers that a hook, an adapter, a
parametrization or offloading acts on stay as they are.
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
            conv: The 1x1 convolution that it does on tokens.
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
    """A trained VT stage in its inference form; the feature map and the tokens are those of its eval mode.

    Its modules are the stage's, with the norms of its maps folded.

    Attributes:
        out_chs: Channels of the feature map that it returns.
    """

    def __init__(self, stage: VTStage) -> None:
        """
        Args:
            stage: The trained stage, which is left as it is.

        Raises:
            TypeError: It is no VTStage.
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
        """Refine a feature map (B, C_in, H, W): the refined map (B, C_out, H, W) and the tokens (B, L, CT)."""
        for module in self:
            x, tokens = module(x, tokens)
        assert tokens is not None  # there is a module
        return x, tokens


def fold_neck(neck: VTNeck) -> VTNeck:
    """The inference form of VT-FPN's neck, which is left as it is.

    Raises:
        TypeError: It is no VTNeck.
    """
    if not isinstance(neck, VTNeck):
        raise TypeError(f'neck must be a VTNeck, got {type(neck).__name__}')
    return fold_maps(copy.deepcopy(neck)).train(neck.training)


def fold_maps(part: nn.Module) -> nn.Module:
    """A part of a VT module with each norm folded into the map before it; its children are replaced in place."""
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
        tokenizer.filters = copy.deepcopy(tokenizer.filters)  # may be another tokenizer's too
        tokenizer.filters.weight = new_parameter(scale[:, None, None, None] * in_float64(weight), weight)
    else:
        return
    tokenizer.logit_norm = nn.Identity()


def _folded(layer: nn.Module) -> nn.Module:
    """A layer of `vt_zoo.layers.linear` without its norm, or the layer where the norm cannot go."""
    if isinstance(layer, TokenNorm):
        affine = fixed_affine(layer.norm)
        return layer if affine is None else TokenAffine(*(new_parameter(x, layer.norm.running_mean) for x in affine))
    conv = fold_norm(layer.conv, layer.norm)
    if conv is None and type(layer.norm) is nn.Identity and runs_alone(layer.norm) and is_plain(layer.conv):
        conv = layer.conv  # a map without a norm
    if conv is None:
        return layer
    return GroupedTokenMap(conv) if isinstance(layer, GroupedTokenLinear) else conv
