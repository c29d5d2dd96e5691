"""Tokenizers, which gather the pixels of a feature map into a few visual tokens (section 3.1 of the paper).

T = A^T V, where A is a softmax over the H*W pixels and V = X W_V their values. The value map W_V runs on the gathered
tokens, A^T (X W_V) = (A^T X) W_V. Tokenizers differ in where the logits of A come from. Only the pooling tokenizer has
no A.
"""
import math
from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerType

from .attention import finite, gather, in_float32, pixel_products
from .kmeans import KMeans
from .linear import TokenLinear, create_logit_norm, pixel_groups, token_linear
from .position_code import PositionCode

__all__ = ['ClusteringTokenizer', 'FilterTokenizer', 'PoolingTokenizer', 'RecurrentTokenizer']

torch.fx.wrap('finite')
torch.fx.wrap('gather')
torch.fx.wrap('in_float32')


class AttentionTokenizer(nn.Module):
    """Base class of tokenizers that attend to the pixels: T = (softmax_HW(logits)^T X) W_V.

    The paper's counts show that there is a value map W_V. If `norm_layer` is a batch norm, the logits have one too,
    which training needs (`create_logit_norm`).

    Attributes:
        out_chs: Channels of the returned tokens: C, or C + 64 with a position code.
    """

    def __init__(
            self,
            in_chs: int,
            token_dim: int,
            num_tokens: int = 16,
            position_code: bool = False,
            norm_layer: LayerType = nn.BatchNorm2d,
            value_map: bool = True,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Channels C of the feature map.
            token_dim: Channels CT of the previous module's tokens.
            num_tokens: Number of tokens L to make. 16 is the paper's base model; more did not help (Table 6).
            position_code: Append a code of where the token comes from, as in the first version of the paper.
            norm_layer: Norm of the logits, of the filters made from tokens and of the position code.
            value_map: Use a value map, which the counts of Tables 2 to 7 include; False for equation (1) as written,
                which the counts of Tables 9 and 10 agree with.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.value = nn.Identity()
        if value_map:
            self.value = token_linear(in_chs, in_chs, pixel_groups(in_chs, in_chs), norm_layer=None, **dd)
        self.logit_norm = create_logit_norm(num_tokens, norm_layer, **dd)
        self.softmax = nn.Softmax(dim=-1)
        self.position_code = PositionCode(norm_layer=norm_layer, **dd) if position_code else None
        self.out_chs = in_chs + (PositionCode.DIM if position_code else 0)
        self.create_filters(in_chs, token_dim, num_tokens, norm_layer, **dd)

    def create_filters(self, in_chs: int, token_dim: int, num_tokens: int, norm_layer: LayerType, **dd) -> None:
        """Create the modules that make the filters of the tokens, which differ between tokenizers."""
        raise NotImplementedError

    def gather(self, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Gather pixels (B, C, H, W) into tokens (B, L, C) by logits (B, L, H*W)."""
        logits = self.logit_norm(logits.unsqueeze(2)).squeeze(2)  # the norm sees an image of one row
        attn = self.softmax(in_float32(finite(logits)))  # A^T
        tokens = self.value(gather(attn, x))
        if self.position_code is not None:
            shares = attn.to(tokens.dtype).view(x.shape[0], -1, x.shape[2], x.shape[3])
            tokens = torch.cat([tokens, self.position_code(shares)], dim=-1)
        return tokens


class FilterTokenizer(AttentionTokenizer):
    """Filter-based tokenizer, equation (1): T = softmax_HW(X W_A)^T X.

    W_A is a point-wise convolution to L channels, one learned filter per token.
    """

    def create_filters(self, in_chs: int, token_dim: int, num_tokens: int, norm_layer: LayerType, **dd) -> None:
        self.filters = nn.Conv2d(in_chs, num_tokens, 1, bias=False, **dd)
        nn.init.normal_(self.filters.weight, std=in_chs ** -0.5)

    def forward(self, x: torch.Tensor, tokens: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gather pixels into tokens.

        Args:
            x: Feature map (B, C, H, W).
            tokens: Not used: the filters are the same for every image.

        Returns:
            Tokens (B, L, C).
        """
        return self.gather(self.filters(x).flatten(2), x)  # (X W_A)^T: (B, L, H*W)


class LearnedFilters(nn.Module):
    """Add a learned filter to each of an image's own filters, one per token: W + B."""

    def __init__(self, num_tokens: int, dim: int, device=None, dtype=None) -> None:
        """
        Args:
            num_tokens: Number of tokens L.
            dim: Channels C of a filter.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_tokens, dim, device=device, dtype=dtype))

    def forward(self, filters: torch.Tensor) -> torch.Tensor:
        """Add the learned filters to those of an image (B, L, C)."""
        return filters + self.weight.expand_as(filters)  # raises if the number of tokens differs


class RecurrentTokenizer(AttentionTokenizer):
    """Recurrent tokenizer, equation (2): W_R = T_in W_TR + B, T = softmax_HW(X W_R)^T X.

    The filters are made from the previous module's tokens. B, which is not in the paper, is a learned filter for each
    token. Training starts from B alone, since a VT module calls `zero_init_last`, which starts the filters made from
    tokens at zero. Without B, the tokens of later modules are nearly the same (docs/design.md).

    The paper's counts show a key map W_K of the pixels; here it is applied to the filters instead:
    (X W_K) W_R^T = X (W_R W_K^T)^T. The logits are divided by sqrt(C), as they would overflow float16 otherwise.
    """

    def create_filters(self, in_chs: int, token_dim: int, num_tokens: int, norm_layer: LayerType, **dd) -> None:
        self.scale = in_chs ** -0.5
        self.query = TokenLinear(token_dim, in_chs, norm_layer, **dd)
        self.filters = LearnedFilters(num_tokens, in_chs, **dd)
        self.key = token_linear(in_chs, in_chs, pixel_groups(in_chs, in_chs), norm_layer=None, **dd)

    def zero_init_last(self) -> None:
        """Start the filters made from tokens at zero, so that training begins with the learned filters alone."""
        if getattr(self.query.norm, 'weight', None) is not None:
            nn.init.zeros_(self.query.norm.weight)

    def forward(self, x: torch.Tensor, tokens: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gather pixels into tokens.

        Args:
            x: Feature map (B, C, H, W).
            tokens: Tokens T_in of the previous module (B, L, CT), as many as this one makes.

        Returns:
            Tokens (B, L, C).

        Raises:
            ValueError: `tokens` is None, as in a first module.
        """
        if tokens is None:
            raise ValueError('tokens must be those of the module before, got None')
        filters = self.filters(self.query(tokens))  # W_R
        filters = self.key(filters) * self.scale  # W_R W_K^T
        return self.gather(pixel_products(filters, x), x)  # (X W_R)^T


class ClusteringTokenizer(AttentionTokenizer):
    """Clustering-based tokenizer (section 5.1, Table 3): T = softmax_HW(X W_K)^T X.

    W_K holds the centroids of a k-means over the image's pixels, without gradients. As in the paper, the logits are not
    divided by sqrt(C).
    """

    def create_filters(self, in_chs: int, token_dim: int, num_tokens: int, norm_layer: LayerType, **dd) -> None:
        self.kmeans = KMeans(num_tokens)

    def forward(self, x: torch.Tensor, tokens: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gather pixels into tokens.

        Args:
            x: Feature map (B, C, H, W).
            tokens: Not used: the centroids come from the pixels.

        Returns:
            Tokens (B, L, C).
        """
        return self.gather(pixel_products(self.kmeans(x), x), x)  # (X W_K)^T


def token_grid(num_tokens: int) -> Tuple[int, int]:
    """Rows and columns of the grid of L cells that is closest to a square.

    Raises:
        ValueError: The grid would have more than twice as many columns as rows.
    """
    rows = max(r for r in range(1, math.isqrt(num_tokens) + 1) if num_tokens % r == 0)
    if num_tokens // rows > 2 * rows:
        raise ValueError(
            'num_tokens must make a grid of at most twice as many columns as rows for the pooling tokenizer, '
            f'as 4, 8, 9, 16, 32 or 64 do, got {num_tokens}')
    return rows, num_tokens // rows


class PoolingTokenizer(nn.Module):
    """Pooling-based tokenizer (section 5.1, Table 3): interpolate the map bilinearly to a grid of L cells.

    As in the paper's counts, it has no weights, not even a value map.

    Attributes:
        out_chs: Channels C of the returned tokens.
    """

    def __init__(
            self,
            in_chs: int,
            token_dim: int,
            num_tokens: int = 16,
            position_code: bool = False,
            norm_layer: LayerType = nn.BatchNorm2d,
            value_map: bool = True,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Channels C of the feature map.
            token_dim: Not used.
            num_tokens: Number of tokens L, which must make a grid (see `token_grid`).
            position_code: Must be False, as a cell of a grid is always in the same place.
            norm_layer: Not used.
            value_map: Not used.

        Raises:
            ValueError: `num_tokens` makes no grid, or `position_code` is True.
        """
        super().__init__()
        if position_code:
            raise ValueError("position_code must be False with tokenizer='pooling', got True")
        self.grid = token_grid(num_tokens)
        self.out_chs = in_chs

    def forward(self, x: torch.Tensor, tokens: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Interpolate a feature map (B, C, H, W) to tokens (B, L, C)."""
        return F.interpolate(x, size=self.grid, mode='bilinear', align_corners=False).flatten(2).transpose(1, 2)
