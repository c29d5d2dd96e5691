"""Linear maps followed by a norm: the one building block of the VT module.

The paper writes every map of a VT as a matrix product and calls it a point-wise convolution. Here each is a map without
bias, `conv`, and the norm that follows it, both children that are called: hooks, adapters and parametrizations of them
run. Pixels are (B, C, H, W) and `conv` is a 1x1 convolution. Tokens are (B, L, C) and `conv` is the same map as
nn.Linear, which is faster on them; their norm sees an image of height 1 and width L, so that one class of norm, and
whatever converts it (SyncBatchNorm, frozen norms), serves both.
"""
import math
from functools import partial

import torch
import torch.nn as nn
from timm.layers import FrozenBatchNormAct2d, LayerType, get_norm_layer

from .fold import fixed_affine, fold_norm, new_parameter
from .token_map import TokenAffine, create_token_map

__all__ = [
    'GroupedTokenLinear', 'PixelLinear', 'TokenLinear', 'TokenNorm', 'create_logit_norm', 'finite', 'merge_heads',
    'pixel_groups', 'pixel_products', 'split_heads']


def pixel_groups(in_chs: int, out_chs: int, group_width: int = 64) -> int:
    """Number of groups of a 1x1 convolution on pixels, 64 output channels wide each.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        group_width: Output channels of a group. 64 reproduces the multiply-adds of the paper's Tables 2 to 7.

    Returns:
        The largest number of groups, at most out_chs // group_width, that divides both channel counts.
    """
    common = math.gcd(in_chs, out_chs)
    return next(groups for groups in range(max(out_chs // group_width, 1), 0, -1) if common % groups == 0)


def _tokens_to_image(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.transpose(1, 2).unsqueeze(2)  # (B, L, C) -> (B, C, 1, L), channels last in memory


def _image_to_tokens(image: torch.Tensor) -> torch.Tensor:
    return image.squeeze(2).transpose(1, 2)


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, N, C) -> (B * heads, N, C / heads)."""
    if num_heads == 1:
        return x
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2).flatten(0, 1)


def merge_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B * heads, N, C / heads) -> (B, N, C)."""
    if num_heads == 1:
        return x
    return x.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)


def finite(logits: torch.Tensor) -> torch.Tensor:
    """Logits within float16's range: products of two activations can leave it, and softmax makes NaN of an infinity."""
    return torch.nan_to_num(logits) if logits.dtype == torch.float16 else logits


def pixel_products(tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Products of tokens (B, L, C) with the pixels of a feature map (B, C, H, W): (B, L, H*W)."""
    return torch.bmm(x.flatten(2).transpose(1, 2), tokens.transpose(1, 2)).transpose(1, 2)


class PixelLinear(nn.Module):
    """Linear map of each pixel and a norm: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            groups: int = 1,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            groups: Groups of channels that are mapped apart.
            norm_layer: Norm over channels of an NCHW tensor.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, 1, groups=groups, bias=False, **dd)
        self.norm = get_norm_layer(norm_layer)(out_chs, **dd)
        nn.init.kaiming_normal_(self.conv.weight, mode='fan_out', nonlinearity='relu')  # as timm's ResNet does

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map pixels (B, C_in, H, W) to (B, C_out, H, W)."""
        return self.norm(self.conv(x))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Fold the norm into the map, exact in eval mode; timm's `reparameterize_model` calls it.

        Returns:
            The map alone, or this module where its norm is not the same affine map for every input.
        """
        return fold_norm(self.conv, self.norm) or self


class GroupedTokenLinear(PixelLinear):
    """Linear map of groups of each token's channels and a norm: (B, L, C_in) -> (B, L, C_out)."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, L, C_in) to (B, L, C_out)."""
        return _image_to_tokens(self.norm(self.conv(_tokens_to_image(tokens))))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Fold the norm into the map as `PixelLinear` does, to a `GroupedTokenMap`."""
        conv = fold_norm(self.conv, self.norm)
        return self if conv is None else create_token_map(conv)


class TokenLinear(nn.Module):
    """Linear map of each token and a norm: (B, L, C_in) -> (B, L, C_out)."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            norm_layer: Norm over channels of an NCHW tensor.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv = nn.Linear(in_chs, out_chs, bias=False, **dd)
        self.norm = get_norm_layer(norm_layer)(out_chs, **dd)
        nn.init.kaiming_normal_(self.conv.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, L, C_in) to (B, L, C_out)."""
        return _image_to_tokens(self.norm(_tokens_to_image(self.conv(tokens))))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Also take the weights of vt_zoo 0.1, where `conv` was a 1x1 convolution, (C_out, C_in, 1, 1)."""
        weight = state_dict.get(f'{prefix}conv.weight')
        if weight is not None and weight.ndim == 4:
            state_dict[f'{prefix}conv.weight'] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Fold the norm into the map as `PixelLinear` does, to an nn.Linear."""
        return fold_norm(self.conv, self.norm) or self


class TokenNorm(nn.Module):
    """Norm over the channels of tokens: (B, L, C) -> (B, L, C)."""

    def __init__(self, dim: int, norm_layer: LayerType = nn.BatchNorm2d, device=None, dtype=None) -> None:
        """
        Args:
            dim: Token channels.
            norm_layer: Norm over channels of an NCHW tensor. A batch norm takes its statistics over images and tokens.
        """
        super().__init__()
        self.norm = get_norm_layer(norm_layer)(dim, device=device, dtype=dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Normalise tokens (B, L, C)."""
        return _image_to_tokens(self.norm(_tokens_to_image(tokens)))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Make a scale and a shift of a norm that is nothing else in eval mode."""
        affine = fixed_affine(self.norm)
        return self if affine is None else TokenAffine(*(new_parameter(x, self.norm.running_mean) for x in affine))


def create_logit_norm(num_tokens: int, norm_layer: LayerType = nn.BatchNorm2d, device=None, dtype=None) -> nn.Module:
    """Create the norm of a tokenizer's logits (B, L, H, W): one scale a token, learned over a batch.

    It is what keeps the first epochs free of spikes of the loss while the learning rate rises. (The shift that a batch
    norm also has is constant over the pixels, so the softmax over them cancels it.) Only a batch norm can do this:
    other norms mix tokens, so with them the logits stay as they are.

    Args:
        num_tokens: Tokens L.
        norm_layer: The norm of the rest of the module.

    Returns:
        A batch norm over L channels, or an identity.
    """
    norm_layer = get_norm_layer(norm_layer)
    norm_class = norm_layer.func if isinstance(norm_layer, partial) else norm_layer
    if issubclass(norm_class, (nn.modules.batchnorm._BatchNorm, FrozenBatchNormAct2d)):
        return norm_layer(num_tokens, device=device, dtype=dtype)
    return nn.Identity()
