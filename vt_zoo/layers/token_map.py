"""Maps of tokens in the inference form, without norms."""
from typing import Optional

import torch
import torch.nn as nn

from .fold import in_float64, new_parameter

__all__ = ['GroupedTokenMap', 'TokenAffine', 'create_token_map', 'matrix', 'merged_token_map']


class GroupedTokenMap(nn.Module):
    """Linear map of groups of a token's channels: (B, L, C_in) -> (B, L, C_out)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """
        Args:
            weight: Rows of the map of each group (groups, C_out / groups, C_in / groups).
            bias: Bias (C_out).
        """
        super().__init__()
        self.groups = weight.shape[0]
        self.weight, self.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, L, C_in) to (B, L, C_out)."""
        parts = tokens.flatten(0, 1).unflatten(1, (self.groups, -1)).transpose(0, 1)  # (groups, B*L, C_in / groups)
        mapped = torch.baddbmm(self.bias.view(self.groups, 1, -1), parts, self.weight.transpose(1, 2))
        return mapped.transpose(0, 1).reshape(tokens.shape[0], tokens.shape[1], -1)


class TokenAffine(nn.Module):
    """Scale and shift of the channels of tokens: (B, L, C) -> (B, L, C)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """
        Args:
            weight: Scale (C).
            bias: Shift (C).
        """
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scale and shift tokens (B, L, C)."""
        return tokens * self.weight + self.bias


def matrix(conv: nn.Conv2d) -> torch.Tensor:
    """A 1x1 convolution's weight as one matrix (C_out, C_in) in float64, with zeros between its groups."""
    return torch.block_diag(*in_float64(conv.weight).flatten(1).chunk(conv.groups))


def create_token_map(conv: nn.Conv2d) -> nn.Module:
    """The map of tokens that a 1x1 convolution with a bias is."""
    if conv.groups > 1:
        return GroupedTokenMap(conv.weight.flatten(1).unflatten(0, (conv.groups, -1)), conv.bias)
    return merged_token_map(conv.weight.flatten(1), conv.bias, conv.weight)


def merged_token_map(weight: torch.Tensor, bias: Optional[torch.Tensor], like: torch.Tensor) -> nn.Linear:
    """The map of tokens of a weight (C_out, C_in) and a bias (C_out), in the type of another tensor."""
    token_map = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device='meta')
    token_map.weight = new_parameter(weight.detach(), like)
    token_map.bias = None if bias is None else new_parameter(bias.detach(), like)
    return token_map
