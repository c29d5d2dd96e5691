"""Maps of tokens in the inference form, without norms."""
from typing import Optional, Sequence

import torch
import torch.nn as nn

from .fold import in_float64, new_parameter

__all__ = ['GroupedTokenMap', 'TokenAffine', 'create_token_map', 'matrix', 'merged_token_map']


class GroupedTokenMap(nn.Module):
    """Linear map of groups of a token's channels: (B, L, C_in) -> (B, L, C_out)."""

    def __init__(self, maps: Sequence[nn.Linear]) -> None:
        """
        Args:
            maps: The map of each group, C_in / groups -> C_out / groups.
        """
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, L, C_in) to (B, L, C_out)."""
        parts = tokens.chunk(len(self.maps), dim=-1)
        return torch.cat([token_map(parts[i]) for i, token_map in enumerate(self.maps)], dim=-1)


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
    weights, biases = conv.weight.flatten(1).chunk(conv.groups), conv.bias.chunk(conv.groups)
    maps = [merged_token_map(weight, bias, weight) for weight, bias in zip(weights, biases)]
    return GroupedTokenMap(maps) if conv.groups > 1 else maps[0]


def merged_token_map(weight: torch.Tensor, bias: Optional[torch.Tensor], like: torch.Tensor) -> nn.Linear:
    """The map of tokens of a weight (C_out, C_in) and a bias (C_out), in the type of another tensor."""
    token_map = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device='meta')
    token_map.weight = new_parameter(weight.detach(), like)
    token_map.bias = None if bias is None else new_parameter(bias.detach(), like)
    return token_map
