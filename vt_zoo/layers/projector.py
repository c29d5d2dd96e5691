"""Projector: from the tokens back to the pixels (section 3.3 of the paper)."""
import torch
import torch.nn as nn
from timm.layers import DropPath, LayerType

from .linear import PixelLinear, TokenLinear, TokenNorm, merge_heads, pixel_groups, split_heads

__all__ = ['Projector']


class Projector(nn.Module):
    """Projector, equation (5): X_out = X_in + softmax_L((X_in W_Q)(T W_K)^T) T.

    Where the channels of X_in, T and X_out differ, a linear map stands on the T that is added and on the skip; where
    they are equal there is none. The logits are divided by the square root of the output channels.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            token_dim: int,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.,
            num_heads: int = 1,
            attention_values: bool = False,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Channels C_in of the incoming feature map.
            out_chs: Channels C_out of the outgoing feature map.
            token_dim: Token channels CT.
            norm_layer: Norm after each linear map.
            drop_path: Stochastic depth rate of the projection.
            num_heads: Heads of the attention, each on its share of the channels (first version of the paper).
            attention_values: Put a value map on T also where the channels are equal (first version of the paper).

        Raises:
            ValueError: The output channels cannot be divided into so many heads.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if out_chs % num_heads:
            raise ValueError(f'num_heads must divide feature_dim = {out_chs}, got {num_heads}')
        self.num_heads = num_heads
        self.scale = (out_chs // num_heads) ** -0.5
        self.query = PixelLinear(in_chs, out_chs, pixel_groups(in_chs, out_chs), norm_layer, **dd)
        self.key = TokenLinear(token_dim, out_chs, 1, norm_layer, **dd)
        self.softmax = nn.Softmax(dim=-1)
        if token_dim != out_chs or attention_values:
            self.value = TokenLinear(token_dim, out_chs, 1, norm_layer, **dd)
        else:
            self.value = TokenNorm(token_dim, norm_layer, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.skip = PixelLinear(in_chs, out_chs, 1, norm_layer, **dd) if in_chs != out_chs else nn.Identity()

    def zero_init_last(self) -> None:
        """Start the projection at zero, so that the outgoing map begins as the skip."""
        if getattr(self.value.norm, 'weight', None) is not None:
            nn.init.zeros_(self.value.norm.weight)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Write the tokens into the feature map.

        Args:
            x: Feature map X_in (B, C_in, H, W).
            tokens: Tokens T (B, L, CT).

        Returns:
            Feature map X_out (B, C_out, H, W).
        """
        query = split_heads(self.query(x).flatten(2).transpose(1, 2), self.num_heads)
        key = split_heads(self.key(tokens) * self.scale, self.num_heads)
        attn = self.softmax(query @ key.transpose(-2, -1))  # softmax_L((X W_Q)(T W_K)^T): (B, heads, H*W, L)
        projection = merge_heads(attn @ split_heads(self.value(tokens), self.num_heads))
        return self.skip(x) + self.drop_path(projection.unflatten(1, (x.shape[2], x.shape[3])).permute(0, 3, 1, 2))
