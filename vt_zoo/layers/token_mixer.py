"""Simpler ways to relate tokens, with which the paper compares its transformer (Table 5)."""
import torch
import torch.nn as nn
from timm.layers import LayerType

from .linear import TokenLinear

__all__ = ['GraphMixer', 'LinearMixer']


class LinearMixer(nn.Module):
    """Linear map of each token, without interaction between tokens ("none" in Table 5): T_out = T W."""

    def __init__(
            self,
            dim: int,
            num_tokens: int,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.,
            num_heads: int = 1,
            attention_values: bool = False,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Token channels CT.
            num_tokens: Not used.
            act_layer: Not used.
            norm_layer: Norm after the linear map.
            drop_path: Not used, as there is no residual branch.
            num_heads: Must be 1, as there is no attention.
            attention_values: Must be False.

        Raises:
            ValueError: `num_heads` is not 1 or `attention_values` is True.
        """
        super().__init__()
        if num_heads != 1 or attention_values:
            raise ValueError(
                "num_heads and attention_values are for token_mixer='transformer', "
                f'got {num_heads} and {attention_values}')
        self.linear = TokenLinear(dim, dim, norm_layer=norm_layer, device=device, dtype=dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, L, CT) to tokens (B, L, CT)."""
        return self.linear(tokens)


class GraphMixer(LinearMixer):
    """Graph convolution with a learned adjacency ("GraphConv" in Table 5): T_out = (G T) W, G of L x L.

    G is the same for every image, so node l always stands for the same concept. It starts as the identity.
    """

    def __init__(self, dim: int, num_tokens: int, *args, device=None, dtype=None, **kwargs) -> None:
        """See `LinearMixer` for the arguments."""
        super().__init__(dim, num_tokens, *args, device=device, dtype=dtype, **kwargs)
        self.adjacency = nn.Parameter(torch.eye(num_tokens, device=device, dtype=dtype))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mix tokens (B, L, CT) into tokens (B, L, CT)."""
        return self.linear(self.adjacency @ tokens)
