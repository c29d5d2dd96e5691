"""Linear maps and the norms that follow most of them: the building blocks of the VT module.

The paper writes every map of a VT as a matrix product and calls it a point-wise convolution. Here each one is a map
without bias, `conv`, followed by `norm`. Both are child modules that are actually called, so their hooks, adapters and
parametrizations run. Pixels are (B, C, H, W), and `conv` is a 1x1 convolution. Tokens are (B, L, C), and `conv` is the
same map as an nn.Linear, which is faster on them; their norm sees an image of height 1 and width L, so that one class
of norm, and whatever converts it (SyncBatchNorm, frozen norms), serves both.

Maps that the paper applies to all H*W pixels next to a softmax are applied to the L tokens instead, where the product
is the same: A^T (X W_V) = (A^T X) W_V, and (X W_K)(T W_TR)^T = X (T W_TR W_K^T)^T. These maps, which are the value and
key maps of a tokenizer and the query map of a projector, have no norm.
"""
import math
from functools import partial
from typing import Any, Dict, List, Optional

import torch
import torch.nn as nn
from timm.layers import FrozenBatchNormAct2d, LayerType, get_norm_layer

OF_0_1 = 'its weights are of vt_zoo 0.1, whose VT module was another one: use that version, or train again'


def pixel_groups(in_chs: int, out_chs: int, group_width: int = 64) -> int:
    """Number of groups of a map that the paper applies to pixels, each 64 output channels wide.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        group_width: Output channels per group. 64 reproduces the multiply-adds of the paper's Tables 2 to 7.

    Returns:
        The largest number of groups, at most out_chs // group_width, that divides both channel counts.
    """
    common = math.gcd(in_chs, out_chs)
    return next(groups for groups in range(max(out_chs // group_width, 1), 0, -1) if common % groups == 0)


def _tokens_to_image(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.transpose(1, 2).unsqueeze(2)  # (B, L, C) -> (B, C, 1, L), channels last in memory


def _image_to_tokens(image: torch.Tensor) -> torch.Tensor:
    return image.squeeze(2).transpose(1, 2)


class _NormedLinear(nn.Module):
    """A linear map without bias, `conv`, followed by a norm."""

    def __init__(self, conv: nn.Module, norm_layer: Optional[LayerType]) -> None:
        super().__init__()
        weight = conv.weight
        self.conv = conv
        if norm_layer is None:
            self.norm = nn.Identity()
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)  # keeps the variance
        else:
            self.norm = get_norm_layer(norm_layer)(weight.shape[0], device=weight.device, dtype=weight.dtype)
            nn.init.kaiming_normal_(weight, mode='fan_out', nonlinearity='relu')  # as timm's ResNet does

    def _load_from_state_dict(
            self,
            state_dict: Dict[str, torch.Tensor],
            prefix: str,
            local_metadata: Dict[str, Any],
            strict: bool,
            missing_keys: List[str],
            unexpected_keys: List[str],
            error_msgs: List[str],
    ) -> None:
        """Refuse weights of vt_zoo 0.1 however they are loaded, even if `strict=False` would skip their norms."""
        if isinstance(self.norm, nn.Identity) and OF_0_1 not in error_msgs and any(
                name.startswith(f'{prefix}norm.') for name in state_dict):
            error_msgs.append(OF_0_1)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


class PixelLinear(_NormedLinear):
    """Linear map of each pixel, followed by a norm: (B, C_in, H, W) -> (B, C_out, H, W)."""

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
            norm_layer: Norm over the channels of an NCHW tensor.
        """
        super().__init__(nn.Conv2d(in_chs, out_chs, 1, bias=False, device=device, dtype=dtype), norm_layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map pixels (B, C_in, H, W) to (B, C_out, H, W)."""
        return self.norm(self.conv(x))


class GroupedTokenLinear(_NormedLinear):
    """Linear map of each token, with its channels in groups, followed by a norm: (B, L, C_in) -> (B, L, C_out)."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            groups: int,
            norm_layer: Optional[LayerType] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            groups: Number of groups of channels, each of which is mapped separately.
            norm_layer: Norm over the channels of an NCHW tensor; None for no norm.
        """
        super().__init__(
            nn.Conv2d(in_chs, out_chs, 1, groups=groups, bias=False, device=device, dtype=dtype), norm_layer)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, L, C_in) to (B, L, C_out)."""
        return _image_to_tokens(self.norm(self.conv(_tokens_to_image(tokens))))


class TokenLinear(_NormedLinear):
    """Linear map of each token, followed by a norm: (B, L, C_in) -> (B, L, C_out)."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            norm_layer: Optional[LayerType] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            norm_layer: Norm over the channels of an NCHW tensor; None for no norm.
        """
        super().__init__(nn.Linear(in_chs, out_chs, bias=False, device=device, dtype=dtype), norm_layer)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, L, C_in) to (B, L, C_out)."""
        return _image_to_tokens(self.norm(_tokens_to_image(self.conv(tokens))))


def token_linear(
        in_chs: int,
        out_chs: int,
        groups: int = 1,
        norm_layer: Optional[LayerType] = nn.BatchNorm2d,
        device=None,
        dtype=None,
) -> nn.Module:
    """Create a linear map of tokens and its norm, with grouped channels if `groups` is more than one."""
    if groups == 1:
        return TokenLinear(in_chs, out_chs, norm_layer, device=device, dtype=dtype)
    return GroupedTokenLinear(in_chs, out_chs, groups, norm_layer, device=device, dtype=dtype)


class TokenNorm(nn.Module):
    """Norm over the channels of tokens: (B, L, C) -> (B, L, C)."""

    def __init__(self, dim: int, norm_layer: LayerType = nn.BatchNorm2d, device=None, dtype=None) -> None:
        """
        Args:
            dim: Token channels.
            norm_layer: Norm over the channels of an NCHW tensor. A batch norm takes its statistics over images and
                tokens.
        """
        super().__init__()
        self.norm = get_norm_layer(norm_layer)(dim, device=device, dtype=dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Normalise tokens (B, L, C)."""
        return _image_to_tokens(self.norm(_tokens_to_image(tokens)))


def create_logit_norm(num_tokens: int, norm_layer: LayerType = nn.BatchNorm2d, device=None, dtype=None) -> nn.Module:
    """Create the norm of a tokenizer's logits (B, L, H, W): one scale per token, normalised over a batch.

    It prevents spikes of the loss in the first epochs, while the learning rate rises. (A batch norm also has a shift,
    but it is constant over the pixels, so the softmax over them cancels it.) Only a batch norm can do this: other norms
    mix tokens, so with them the logits stay as they are.

    Args:
        num_tokens: Number of tokens L.
        norm_layer: The norm used in the rest of the module.

    Returns:
        A batch norm over L channels, or an identity.
    """
    norm_layer = get_norm_layer(norm_layer)
    norm_class = norm_layer.func if isinstance(norm_layer, partial) else norm_layer
    if issubclass(norm_class, (nn.modules.batchnorm._BatchNorm, FrozenBatchNormAct2d)):
        return norm_layer(num_tokens, device=device, dtype=dtype)
    return nn.Identity()
