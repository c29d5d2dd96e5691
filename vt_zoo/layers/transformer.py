"""Transformer over the tokens (section 3.2 of the paper)."""
import math

import torch
import torch.nn as nn
from timm.layers import DropPath, LayerType, get_act_layer

from .linear import TokenLinear, TokenNorm

__all__ = ['TokenTransformer']


class TokenTransformer(nn.Module):
    """Token transformer, equations (3) and (4).

    T' = T + softmax_L((T K)(T Q)^T) T, then T_out = T' + relu(T' F_1) F_2. There is no value map in (3). Keys and
    queries have half of the token's channels, in two groups, as the paper's counts show; the logits are divided by the
    square root of that width.
    """

    def __init__(
            self,
            dim: int,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Token channels CT.
            act_layer: Activation between F_1 and F_2. ReLU is the paper's.
            norm_layer: Norm after each linear map and after the attention.
            drop_path: Stochastic depth rate of both residual branches.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        key_dim = max(dim // 2, 1)
        groups = math.gcd(dim, key_dim, 2)
        self.scale = key_dim ** -0.5
        self.key = TokenLinear(dim, key_dim, groups, norm_layer, **dd)
        self.query = TokenLinear(dim, key_dim, groups, norm_layer, **dd)
        self.softmax = nn.Softmax(dim=-1)
        self.norm = TokenNorm(dim, norm_layer, **dd)
        self.fc1 = TokenLinear(dim, dim, 1, norm_layer, **dd)
        self.act = get_act_layer(act_layer)()
        self.fc2 = TokenLinear(dim, dim, 1, norm_layer, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def zero_init_last(self) -> None:
        """Start both residual branches at zero. Without it training at the paper's learning rates diverges."""
        for norm in (self.norm.norm, self.fc2.norm):
            if getattr(norm, 'weight', None) is not None:
                nn.init.zeros_(norm.weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Relate the tokens.

        Args:
            tokens: Tokens T_in (B, L, CT).

        Returns:
            Tokens T_out (B, L, CT).
        """
        logits = (self.key(tokens) * self.scale) @ self.query(tokens).transpose(1, 2)  # (T K)(T Q)^T: (B, L, L)
        tokens = tokens + self.drop_path(self.norm(self.softmax(logits) @ tokens))
        return tokens + self.drop_path(self.fc2(self.act(self.fc1(tokens))))
