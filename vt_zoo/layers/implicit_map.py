"""What a VT module asks of a feature map: products with its pixels and weighted sums of them.

Both are linear, so a map that projectors have written to need not exist in memory for them. X_out = X S^T + Q^T U has
the products F X_out^T = (F S) X^T + (F U^T) Q and the sums A X_out = (A X) S^T + (A Q^T) U.
"""
from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['ImplicitMap', 'pixel_products', 'pixel_sums']


class ImplicitMap:
    """Feature map X_out = X S^T + Q^T U of B images, H x W pixels and C channels, which is not written out."""

    def __init__(
            self,
            x: torch.Tensor,
            skip: Optional[torch.Tensor] = None,
            shares: Optional[torch.Tensor] = None,
            values: Optional[torch.Tensor] = None,
    ) -> None:
        """
        Args:
            x: Map X (B, C_in, H, W).
            skip: Map S of the pixels (C, C_in), None for the identity.
            shares: Q, the shares of K tokens in each pixel (B, K, H*W), None where no projector has written yet.
            values: U, what the K tokens write (B, K, C).
        """
        self.x, self.skip, self.shares, self.values = x, skip, shares, values

    @property
    def shape(self) -> Tuple[int, int, int, int]:
        """(B, C, H, W)."""
        batch, channels, height, width = self.x.shape
        return batch, channels if self.skip is None else self.skip.shape[0], height, width

    def write(self, skip: nn.Module, shares: torch.Tensor, values: torch.Tensor) -> 'ImplicitMap':
        """The map after a projector.

        Args:
            skip: Its skip, nn.Identity or a 1x1 convolution.
            shares: Shares of its tokens in each pixel (B, L, H*W), which sum to one.
            values: What its tokens write (B, L, C).
        """
        whole, old = self.skip, self.values
        if isinstance(skip, nn.Conv2d):
            weight = skip.weight.flatten(1)
            whole = weight if whole is None else weight @ whole
            old = None if old is None else F.linear(old, weight)
            values = values if skip.bias is None else values + skip.bias
        if self.shares is not None:
            shares, values = torch.cat([self.shares, shares], dim=1), torch.cat([old, values], dim=1)
        return ImplicitMap(self.x, whole, shares, values)

    def products(self, tokens: torch.Tensor) -> torch.Tensor:
        """As `pixel_products`."""
        products = _products(tokens if self.skip is None else tokens @ self.skip, self.x)
        if self.shares is None:
            return products
        return torch.baddbmm(products, _row_products(self.values, tokens).transpose(1, 2), self.shares)

    def sums(self, attn: torch.Tensor) -> torch.Tensor:
        """As `pixel_sums`."""
        sums = _sums(attn, self.x)
        if self.skip is not None:
            sums = F.linear(sums, self.skip)
        if self.shares is None:
            return sums
        return torch.baddbmm(sums, torch.bmm(attn, self.shares.transpose(1, 2)), self.values)


def pixel_products(tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Products of tokens with the pixels of a map, in the order of its memory.

    Args:
        tokens: Tokens (B, L, C), or (L, C) for the same with every image.
        x: Feature map (B, C, H, W), or an `ImplicitMap`.

    Returns:
        Products (B, L, H*W).
    """
    if not torch.jit.is_scripting():  # noqa: SIM102, a script has no such class
        if isinstance(x, ImplicitMap):
            return x.products(tokens)
    return _products(tokens, x)


def pixel_sums(attn: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Weighted sums of the pixels of a map.

    Args:
        attn: Weights (B, L, H*W).
        x: Feature map (B, C, H, W), or an `ImplicitMap`.

    Returns:
        Sums (B, L, C).
    """
    if not torch.jit.is_scripting():  # noqa: SIM102, a script has no such class
        if isinstance(x, ImplicitMap):
            return x.sums(attn)
    return _sums(attn, x)


def _products(tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    pixels = x.flatten(2)
    if x.is_contiguous():
        return tokens @ pixels
    return _row_products(pixels.transpose(1, 2), tokens).transpose(1, 2)


def _row_products(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(B, N, C) and (B, L, C) or (L, C) -> (B, N, L)."""
    return F.linear(rows, tokens) if tokens.ndim == 2 else torch.bmm(rows, tokens.transpose(1, 2))


def _sums(attn: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.bmm(attn, x.flatten(2).transpose(1, 2))


torch.fx.wrap('_products')
torch.fx.wrap('_row_products')
