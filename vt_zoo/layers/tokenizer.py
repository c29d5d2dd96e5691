"""Tokenizers: from the pixels of a feature map to a few visual tokens (section 3.1 of the paper).

T = A^T V, where A is a softmax over the H*W pixels and V the value map of the pixels. Tokenizers differ in where the
logits of A come from.
"""
from typing import Optional

import torch
import torch.nn as nn
from timm.layers import LayerType

from .linear import PixelLinear, TokenLinear, create_logit_norm, pixel_groups

__all__ = ['FilterTokenizer', 'RecurrentTokenizer']


class FilterTokenizer(nn.Module):
    """Filter-based tokenizer, equation (1): T = softmax_HW(X W_A)^T X.

    W_A is a point-wise convolution to L channels, one learned filter a token. The X that is gathered is a value map of
    the pixels, as the paper's counts show.
    """

    def __init__(
            self,
            in_chs: int,
            token_dim: int,
            num_tokens: int = 16,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Channels C of the feature map.
            token_dim: Channels CT of the tokens of the module before, which this tokenizer does not look at.
            num_tokens: Tokens L. 16 is the paper's base model; more did not help (Table 6).
            norm_layer: Norm after each linear map.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.value = PixelLinear(in_chs, in_chs, pixel_groups(in_chs, in_chs), norm_layer, **dd)
        self.filters = nn.Conv2d(in_chs, num_tokens, 1, bias=False, **dd)
        self.logit_norm = create_logit_norm(num_tokens, norm_layer, **dd)
        self.softmax = nn.Softmax(dim=-1)
        nn.init.normal_(self.filters.weight, std=in_chs ** -0.5)

    def forward(self, x: torch.Tensor, tokens: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gather pixels into tokens.

        Args:
            x: Feature map (B, C, H, W).
            tokens: Not used: the filters are the same for every image.

        Returns:
            Tokens (B, L, C).
        """
        logits = self.logit_norm(self.filters(x))  # X W_A
        attn = self.softmax(logits.flatten(2))  # A^T: (B, L, H*W)
        return attn @ self.value(x).flatten(2).transpose(1, 2)


class RecurrentTokenizer(nn.Module):
    """Recurrent tokenizer, equation (2): W_R = T_in W_TR, T = softmax_HW(X W_R)^T X.

    The tokens of the module before make the filters. The X that meets W_R is a key map of the pixels and the X that is
    gathered a value map, as the paper's counts show. The logits are divided by sqrt(C), or they overflow float16.
    """

    def __init__(
            self,
            in_chs: int,
            token_dim: int,
            num_tokens: int = 16,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Channels C of the feature map.
            token_dim: Channels CT of the tokens of the module before.
            num_tokens: Tokens L, the same as in the module before.
            norm_layer: Norm after each linear map.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        groups = pixel_groups(in_chs, in_chs)
        self.scale = in_chs ** -0.5
        self.query = TokenLinear(token_dim, in_chs, 1, norm_layer, **dd)
        self.key = PixelLinear(in_chs, in_chs, groups, norm_layer, **dd)
        self.value = PixelLinear(in_chs, in_chs, groups, norm_layer, **dd)
        self.logit_norm = create_logit_norm(num_tokens, norm_layer, **dd)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: torch.Tensor, tokens: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gather pixels into tokens.

        Args:
            x: Feature map (B, C, H, W).
            tokens: Tokens T_in of the module before (B, L, CT).

        Returns:
            Tokens (B, L, C).

        Raises:
            ValueError: There are no tokens, as in a first module.
        """
        if tokens is None:
            raise ValueError('tokens must be those of the module before, got None')
        filters = self.query(tokens) * self.scale  # W_R
        logits = filters @ self.key(x).flatten(2)  # (X W_R)^T: (B, L, H*W)
        logits = self.logit_norm(logits.unsqueeze(2)).squeeze(2)
        # products of two activations can leave the range of float16, and softmax makes NaN of an infinity
        attn = self.softmax(torch.nan_to_num(logits, nan=float('nan')))
        return attn @ self.value(x).flatten(2).transpose(1, 2)
