"""Projector: from the tokens back to the pixels (section 3.3 of the paper)."""
import torch
import torch.nn as nn
from timm.layers import DropPath, LayerType

from .fold import in_float64
from .linear import PixelLinear, TokenLinear, TokenNorm, finite, pixel_groups, pixel_products, split_heads
from .token_map import matrix, merged_token_map

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
            query_group_width: int = 64,
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
            query_group_width: Output channels of a group of the query map. 64 reproduces Tables 2 to 7, 16 Tables 9
                and 10.

        Raises:
            ValueError: The output channels cannot be divided into so many heads.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if out_chs % num_heads:
            raise ValueError(f'num_heads must divide feature_dim = {out_chs}, got {num_heads}')
        self.num_heads = num_heads
        self.scale = (out_chs // num_heads) ** -0.5
        self.query = PixelLinear(in_chs, out_chs, pixel_groups(in_chs, out_chs, query_group_width), norm_layer, **dd)
        self.key = TokenLinear(token_dim, out_chs, norm_layer, **dd)
        self.softmax = nn.Softmax(dim=-2)
        if token_dim != out_chs or attention_values:
            self.value = TokenLinear(token_dim, out_chs, norm_layer, **dd)
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
        attn = self.softmax(finite(self._logits(x, tokens)))  # softmax_L((X W_Q)(T W_K)^T): (B * heads, L, H*W)
        value = self.drop_path(self.value(tokens))  # the projection is linear in it: the same as dropping that
        return _add_mixed(self.skip(x), attn, split_heads(value, self.num_heads), self.num_heads)

    def _logits(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B * heads, L, H*W) of the pixels, for each token."""
        key = self.key(tokens)
        if self.query is None:
            return pixel_products(key[..., :-1], x) + key[..., -1:]
        query = self.query(x).flatten(2).unflatten(1, (self.num_heads, -1)).flatten(0, 1)  # (B * heads, C / heads, H*W)
        return torch.bmm(split_heads(key * self.scale, self.num_heads), query)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Merge the query map into the key map, which then makes a filter of C_in channels and a bias from each token.

        Exact in eval mode: (X W_Q + b)(T W_K)^T = X (T W_K W_Q^T)^T + b (T W_K)^T. With several heads, or norms that
        cannot be folded into their maps, it stays as it is. timm's `reparameterize_model` calls it.
        """
        if self.num_heads > 1 or not isinstance(self.query, PixelLinear):
            return
        query, key = self.query.fuse(), self.key.fuse()
        if query is self.query or key is self.key:
            return
        back = torch.cat([matrix(query).T, in_float64(query.bias)[None]])  # C_out -> C_in and a bias
        # what the key's bias adds is the same for all tokens, so the softmax over them cancels it
        self.query, self.key = None, merged_token_map(self.scale * back @ in_float64(key.weight), None, key.weight)


def _add_mixed(x: torch.Tensor, attn: torch.Tensor, value: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Add values (B * heads, L, C / heads), mixed by attn (B * heads, L, H*W), to a map x (B, C, H, W).

    One product that writes the sum, in the memory format of x: a map of its own for the mixture costs more time than
    the arithmetic.
    """
    if num_heads == 1 and not x.is_contiguous():
        mixed = torch.baddbmm(x.flatten(2).transpose(1, 2), attn.transpose(1, 2), value).transpose(1, 2)
    else:
        parts = x.flatten(2).unflatten(1, (num_heads, -1)).flatten(0, 1)  # (B * heads, C / heads, H*W)
        mixed = torch.baddbmm(parts, value.transpose(1, 2), attn).unflatten(0, (-1, num_heads)).flatten(1, 2)
    return mixed.view(x.shape)


torch.fx.wrap('finite')
torch.fx.wrap('_add_mixed')
