"""The transformer over the tokens (section 3.2 of the paper)."""
import math
from typing import Optional

import torch
import torch.nn as nn
from timm.layers import DropPath, LayerType, get_act_layer

from .attention import finite, merge_heads, split_heads
from .linear import TokenLinear, TokenNorm, token_linear

__all__ = ['TokenTransformer']

torch.fx.wrap('finite')


class TokenTransformer(nn.Module):
    """Token transformer, equations (3) and (4).

    T' = T + softmax_L((T K)(T Q)^T) T, then T_out = T' + relu(T' F_1) F_2. There is no value map in (3). Keys and
    queries have half as many channels as a token, in groups, as the paper's counts show; the logits are divided by the
    square root of that width. Heads and a value map come from the first version of the paper.
    """

    def __init__(
            self,
            dim: int,
            num_tokens: Optional[int] = None,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.,
            num_heads: int = 1,
            attention_values: bool = False,
            key_groups: int = 2,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Token channels CT.
            num_tokens: Not used, as any number of tokens can be related.
            act_layer: Activation between F_1 and F_2. The paper uses ReLU.
            norm_layer: Norm after each linear map and after the attention.
            drop_path: Stochastic depth rate of both residual branches.
            num_heads: Attention heads, each on its share of the channels.
            attention_values: Apply a value map W_V to the tokens that the attention mixes.
            key_groups: Groups of channels in the key and query maps. 2 reproduces Tables 2 to 7, 1 reproduces Tables 9
                and 10.

        Raises:
            ValueError: `num_heads` does not divide the channels of keys or tokens.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        key_dim = max(dim // 2, 1)
        groups = math.gcd(dim, key_dim, key_groups)
        if dim % num_heads or key_dim % num_heads:
            raise ValueError(f'num_heads must divide token_dim / 2 = {key_dim}, got {num_heads}')
        self.num_heads = num_heads
        self.scale = (key_dim // num_heads) ** -0.5
        self.key = token_linear(dim, key_dim, groups, norm_layer, **dd)
        self.query = token_linear(dim, key_dim, groups, norm_layer, **dd)
        self.value = TokenLinear(dim, dim, norm_layer, **dd) if attention_values else nn.Identity()
        self.softmax = nn.Softmax(dim=-1)
        self.norm = TokenNorm(dim, norm_layer, **dd)
        self.fc1 = TokenLinear(dim, dim, norm_layer, **dd)
        self.act = get_act_layer(act_layer)()
        self.fc2 = TokenLinear(dim, dim, norm_layer, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def zero_init_last(self) -> None:
        """Start both residual branches at zero. Without it, training at the paper's learning rates diverges."""
        for norm in (self.norm.norm, self.fc2.norm):
            if getattr(norm, 'weight', None) is not None:
                nn.init.zeros_(norm.weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Relate tokens T_in (B, L, CT) to each other, giving tokens T_out (B, L, CT)."""
        key = split_heads(self.key(tokens) * self.scale, self.num_heads)
        query = split_heads(self.query(tokens), self.num_heads)
        value = split_heads(self.value(tokens), self.num_heads)
        attn = self.softmax(finite(key @ query.transpose(1, 2)))  # softmax_L((T K)(T Q)^T): (B * heads, L, L)
        tokens = tokens + self.drop_path(self.norm(merge_heads(attn @ value, self.num_heads)))
        return tokens + self.drop_path(self.fc2(self.act(self.fc1(tokens))))
