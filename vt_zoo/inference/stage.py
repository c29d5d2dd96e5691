"""Inference forms of the VT stage and of VT-FPN's neck, exact in eval mode.

Batch norms are affine there and fold into the maps before them. A softmax stands between linear maps, and the shares
that it makes sum to one, so maps of all H*W pixels become maps of the L tokens:

    tokenizer, value     A^T (X W_V + b_V) W_E + b_E = (A^T X) (W_V W_E) + b_V W_E + b_E
    tokenizer, key       (X W_K + b_K) W_R = X (W_K W_R) + b_K W_R, where W_R = (T W_TR)^T
    projector, query     (X W_Q + b_Q) (T W_K)^T = X (T W_K W_Q^T)^T + b_Q (T W_K)^T

In the second line the last term is one for all pixels, so that the softmax over them cancels it, as it does the shift
of the logits' norm, whose scale goes onto the filters. In the third each token has a bias of its own, which the softmax
over the tokens sees; it cancels what is one for all tokens, that is what the bias of W_K would add.

Each of these is done where the layers allow it. Several heads, norms that depend on their input, parts of other classes
than those of `vt_zoo.layers` (subclasses too), and layers that a hook, an adapter, a parametrization or offloading acts
on stay as they are.
"""
import copy
from typing import Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import DropPath

from vt_zoo.layers import (
    ClusteringTokenizer,
    DynamicVTModule,
    FilterTokenizer,
    Projector,
    RecurrentTokenizer,
    TokenModule,
    VTModule,
    VTNeck,
    VTStage,
)
from vt_zoo.layers.attention import add_mixed, finite, pixel_products
from vt_zoo.layers.linear import GroupedTokenLinear, PixelLinear, TokenLinear, TokenNorm

from .fold import fixed_affine, fold_norm, in_float64, is_plain, new_parameter, runs_alone, scaled

__all__ = ['InferenceProjector', 'InferenceStage', 'merge_neck']

torch.fx.wrap('add_mixed')
torch.fx.wrap('finite')


class GroupedTokenMap(nn.Module):
    """Linear map of groups of a token's channels: (B, L, C_in) -> (B, L, C_out)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """
        Args:
            conv: The 1x1 convolution with a bias that it does on tokens.
        """
        super().__init__()
        self.groups = conv.groups
        self.weight = new_parameter(conv.weight.detach().flatten(1).unflatten(0, (conv.groups, -1)), conv.weight)
        self.bias = new_parameter(conv.bias.detach(), conv.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, L, C_in) to (B, L, C_out)."""
        parts = tokens.flatten(0, 1).unflatten(1, (self.groups, -1)).transpose(0, 1)  # (groups, B*L, C_in / groups)
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


class InferenceProjector(nn.Module):
    """Projector whose tokens make filters of the incoming map: X_out = X_in W_S + softmax_L(X_in F^T + f) (T W_V).

    F | f = T (W_K [W_Q^T | b_Q]) / sqrt(C_out), one map of the tokens.
    """

    def __init__(self, filters: nn.Linear, softmax: nn.Softmax, value: nn.Module, skip: nn.Module) -> None:
        """
        Args:
            filters: Map of a token's CT channels to C_in of a filter and one of a bias.
            softmax: Over the tokens.
            value: Map of a token to C_out channels.
            skip: Map of the incoming feature map to C_out channels.
        """
        super().__init__()
        self.filters, self.softmax, self.value, self.skip = filters, softmax, value, skip

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Write tokens (B, L, CT) into a feature map (B, C_in, H, W): (B, C_out, H, W)."""
        filters = self.filters(tokens)
        attn = self.softmax(finite(pixel_products(filters[..., :-1], x) + filters[..., -1:]))  # (B, L, H*W)
        return add_mixed(self.skip(x), attn, self.value(tokens))


class InferenceStage(nn.ModuleList):
    """A trained VT stage in its inference form; the feature map and the tokens are those of its eval mode.

    Its modules are the stage's, with parts replaced: `fold_maps`, `merge_tokenizer` and `merge_projector` say by what.

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
            if type(module) in (VTModule, DynamicVTModule):
                merge_tokenizer(module)
                module.projector = merge_projector(module.projector)
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


def merge_neck(neck: VTNeck) -> VTNeck:
    """The inference form of VT-FPN's neck, which is left as it is.

    Raises:
        TypeError: It is no VTNeck.
    """
    if not isinstance(neck, VTNeck):
        raise TypeError(f'neck must be a VTNeck, got {type(neck).__name__}')
    merged = fold_maps(copy.deepcopy(neck))
    merged.projectors = nn.ModuleList(merge_projector(projector) for projector in merged.projectors)
    for tokenizer in merged.tokenizers:
        merge_logit_norm(tokenizer)
    return merged.train(neck.training)


def fold_maps(part: nn.Module) -> nn.Module:
    """A part of a VT module with each norm folded into the map before it; its children are replaced in place."""
    if type(part) in (PixelLinear, GroupedTokenLinear, TokenLinear, TokenNorm):
        return _folded(part) if runs_alone(part) else part
    for name, child in part.named_children():
        setattr(part, name, fold_maps(child))
    return part


def _folded(layer: nn.Module) -> nn.Module:
    """A layer of `vt_zoo.layers.linear` without its norm, or the layer where the norm cannot go."""
    if isinstance(layer, TokenNorm):
        affine = fixed_affine(layer.norm)
        return layer if affine is None else TokenAffine(*(new_parameter(x, layer.norm.running_mean) for x in affine))
    conv = fold_norm(layer.conv, layer.norm)
    if conv is None:
        return layer
    return _token_map(conv) if isinstance(layer, GroupedTokenLinear) else conv


def merge_tokenizer(module: VTModule) -> None:
    """Move the value and key maps of a module's tokenizer to the tokens, in place, where their norms are folded."""
    tokenizer, embed = module.tokenizer, module.embed
    if type(tokenizer) not in (FilterTokenizer, RecurrentTokenizer, ClusteringTokenizer):
        return
    if not _is_softmax(tokenizer.softmax):
        return
    merge_logit_norm(tokenizer)
    if isinstance(tokenizer, RecurrentTokenizer) and _can_merge(tokenizer.key) and _can_merge(tokenizer.query):
        back = _matrix(tokenizer.key).T
        weight, bias = (back @ in_float64(x) for x in (tokenizer.query.weight, tokenizer.query.bias))
        tokenizer.query, tokenizer.key = _linear(weight, bias, tokenizer.query.weight), nn.Identity()
    value = tokenizer.value
    if not (_can_merge(value) and runs_alone(tokenizer)):
        return
    if _can_merge(embed):
        weight, bias = in_float64(embed.weight), in_float64(value.bias)
        of_pixels, of_code = weight.tensor_split([value.out_channels], dim=1)
        merged = torch.cat([of_pixels @ _matrix(value), of_code], dim=1)
        module.embed = _linear(merged, in_float64(embed.bias) + of_pixels @ bias, embed.weight)
    elif isinstance(embed, TokenAffine) and tokenizer.position_code is None:
        module.embed = _token_map(scaled(value, in_float64(embed.weight), in_float64(embed.bias)))
    else:
        return
    tokenizer.value = nn.Identity()


def merge_logit_norm(tokenizer: nn.Module) -> None:
    """Put the scale of the logits' norm onto the tokenizer's filters, in place, where there are filters."""
    affine = fixed_affine(getattr(tokenizer, 'logit_norm', None))
    if affine is None or not _is_softmax(tokenizer.softmax):
        return
    if type(tokenizer) is FilterTokenizer and is_plain(tokenizer.filters):
        weight = tokenizer.filters.weight
        tokenizer.filters = copy.deepcopy(tokenizer.filters)
        tokenizer.filters.weight = new_parameter(affine[0][:, None, None, None] * in_float64(weight), weight)
    elif type(tokenizer) is RecurrentTokenizer:
        tokenizer.scale = new_parameter(affine[0][:, None] * tokenizer.scale, tokenizer.logit_norm.running_mean)
    else:
        return
    tokenizer.logit_norm = nn.Identity()


def merge_projector(projector: Optional[nn.Module]) -> Optional[nn.Module]:
    """A projector whose query map is merged into its key map, or the projector where its norms or options forbid it."""
    if type(projector) is not Projector or projector.num_heads > 1 or not _is_softmax(projector.softmax):
        return projector
    if not (runs_alone(projector) and runs_alone(projector.drop_path)):
        return projector
    query, key = projector.query, projector.key
    if not (_can_merge(query) and _can_merge(key)):
        return projector
    back = torch.cat([_matrix(query).T, in_float64(query.bias)[None]])  # [W_Q^T | b_Q]
    filters = _linear(projector.scale * back @ in_float64(key.weight), None, key.weight)
    return InferenceProjector(filters, projector.softmax, projector.value, projector.skip)


def _is_softmax(module: nn.Module) -> bool:
    """Whether a module gives shares that sum to one, which no hook changes."""
    return type(module) is nn.Softmax and runs_alone(module)


def _can_merge(layer: Optional[nn.Module]) -> bool:
    """Whether a layer is a map of pixels or tokens, its norm folded into it."""
    return is_plain(layer) and layer.bias is not None and getattr(layer, 'kernel_size', (1, 1)) == (1, 1)


def _matrix(conv: nn.Conv2d) -> torch.Tensor:
    """A 1x1 convolution's weight as one matrix (C_out, C_in) in float64, with zeros between its groups."""
    return torch.block_diag(*in_float64(conv.weight).flatten(1).chunk(conv.groups))


def _token_map(conv: nn.Conv2d) -> nn.Module:
    """The map of tokens that a 1x1 convolution with a bias is."""
    return GroupedTokenMap(conv) if conv.groups > 1 else _linear(conv.weight.flatten(1), conv.bias, conv.weight)


def _linear(weight: torch.Tensor, bias: Optional[torch.Tensor], like: torch.Tensor) -> nn.Linear:
    """The map of tokens of a weight (C_out, C_in) and a bias (C_out), in the type of another tensor."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device='meta')
    linear.weight = new_parameter(weight.detach(), like)
    linear.bias = None if bias is None else new_parameter(bias.detach(), like)
    return linear
