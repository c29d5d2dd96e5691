"""The projector, which writes tokens back to the pixels (section 3.3 of the paper)."""
import torch
import torch.nn as nn
from timm.layers import DropPath, LayerType

from .attention import add_mixed, apart, finite, pixel_products
from .linear import PixelLinear, TokenLinear, TokenNorm, pixel_groups, token_linear

__all__ = ['Projector']

torch.fx.wrap('add_mixed')
torch.fx.wrap('apart')
torch.fx.wrap('finite')


class Projector(nn.Module):
    """Projector, equation (5): X_out = X_in + softmax_L((X_in W_Q)(T W_K)^T) T.

    W_Q, which the paper applies to the pixels, is applied to the tokens: (X_in W_Q)(T W_K)^T = X_in (T W_K W_Q^T)^T.

    If T and X_out differ in channels, the T that is added goes through a linear map; so does the skip if X_in and
    X_out differ. The logits are divided by the square root of the output channels.
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
            query_group_width: int = 64,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Channels C_in of the incoming feature map.
            out_chs: Channels C_out of the outgoing feature map.
            token_dim: Token channels CT.
            norm_layer: Norm after each linear map except the query map.
            drop_path: Stochastic depth rate of the projection.
            num_heads: Attention heads, each on its share of the channels (first version of the paper).
            attention_values: Apply a value map to T even if the channels are equal (first version of the paper).
            query_group_width: Output channels per group of the query map. 64 reproduces Tables 2 to 7, 16 reproduces
                Tables 9 and 10.

        Raises:
            ValueError: `num_heads` does not divide the output channels.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if out_chs % num_heads:
            raise ValueError(f'num_heads must divide feature_dim = {out_chs}, got {num_heads}')
        self.num_heads = num_heads
        self.scale = (out_chs // num_heads) ** -0.5
        self.key = TokenLinear(token_dim, out_chs, norm_layer, **dd)
        self.query = token_linear(
            out_chs, in_chs, pixel_groups(in_chs, out_chs, query_group_width), norm_layer=None, **dd)
        self.softmax = nn.Softmax(dim=-2)
        if token_dim != out_chs or attention_values:
            self.value = TokenLinear(token_dim, out_chs, norm_layer, **dd)
        else:
            self.value = TokenNorm(token_dim, norm_layer, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.skip = PixelLinear(in_chs, out_chs, norm_layer, **dd) if in_chs != out_chs else nn.Identity()

    def zero_init_last(self) -> None:
        """Start the projection at zero, so that the outgoing map is the skip at first."""
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
        filters = self.query(apart(self.key(tokens), self.num_heads)) * self.scale  # T W_K W_Q^T: (B, heads * L, C_in)
        logits = pixel_products(filters, x).unflatten(1, (self.num_heads, -1)).flatten(0, 1)
        attn = self.softmax(finite(logits))  # softmax_L((X W_Q)(T W_K)^T): (B * heads, L, H*W)
        value = self.drop_path(self.value(tokens))  # same as dropping the projection, which is linear in it
        return add_mixed(self.skip(x), attn, value, self.num_heads)
