"""Maps of tokens in the inference form, without norms."""
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from .fold import in_float64, new_parameter

__all__ = ['GroupedTokenMap', 'TokenAffine', 'TokenMap', 'create_token_map', 'matrix', 'merged_token_map']


def _in_columns(tokens: torch.Tensor) -> bool:
    """Whether to map tokens (B, L, C) by the product W T^T, where a token is a column in memory, and not by T W^T.

    On CPUs it takes half the time in float32, and less in bfloat16, for the 16 tokens of one image, and from 64 on the
    same, when the sums of tokens in two orders that it brings take longer. Compilers pack the weights of T W^T.
    """
    return not torch.compiler.is_compiling() and tokens.shape[0] * tokens.shape[1] <= 48


def _map(tokens: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    if not _in_columns(tokens):
        return F.linear(tokens, weight, bias)
    columns = tokens.flatten(0, 1).t()
    mapped = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return mapped.t().view(tokens.shape[0], tokens.shape[1], -1)


def _map_groups(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    groups = weight.shape[0]
    parts = tokens.flatten(0, 1).unflatten(1, (groups, -1)).permute(1, 2, 0)  # (groups, C_in / groups, B*L)
    bias = bias.view(groups, -1, 1)
    if _in_columns(tokens):
        mapped = torch.baddbmm(bias, weight, parts).flatten(0, 1).t()
    else:
        mapped = torch.baddbmm(bias.mT, parts.mT, weight.mT).transpose(0, 1).flatten(1)
    return mapped.view(tokens.shape[0], tokens.shape[1], -1)


torch.fx.wrap('_map')
torch.fx.wrap('_map_groups')


class TokenMap(nn.Linear):
    """Linear map of each token: (B, L, C_in) -> (B, L, C_out)."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, L, C_in) to (B, L, C_out)."""
        return _map(tokens, self.weight, self.bias)


class GroupedTokenMap(nn.Module):
    """Linear map of groups of a token's channels: (B, L, C_in) -> (B, L, C_out)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """
        Args:
            weight: Rows of the map of each group (groups, C_out / groups, C_in / groups).
            bias: Bias (C_out).
        """
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, L, C_in) to (B, L, C_out)."""
        return _map_groups(tokens, self.weight, self.bias)


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
        return torch.addcmul(self.bias, tokens, self.weight)


def matrix(conv: nn.Conv2d) -> torch.Tensor:
    """A 1x1 convolution's weight as one matrix (C_out, C_in) in float64, with zeros between its groups."""
    return torch.block_diag(*in_float64(conv.weight).flatten(1).chunk(conv.groups))


def create_token_map(conv: nn.Conv2d) -> nn.Module:
    """The map of tokens that a 1x1 convolution with a bias is."""
    if conv.groups > 1:
        return GroupedTokenMap(conv.weight.flatten(1).unflatten(0, (conv.groups, -1)), conv.bias)
    return merged_token_map(conv.weight.flatten(1), conv.bias, conv.weight)


def merged_token_map(weight: torch.Tensor, bias: Optional[torch.Tensor], like: torch.Tensor) -> TokenMap:
    """The map of tokens of a weight (C_out, C_in) and a bias (C_out), in the type of another tensor."""
    token_map = TokenMap(weight.shape[1], weight.shape[0], bias=bias is not None, device='meta')
    token_map.weight = new_parameter(weight.detach(), like)
    token_map.bias = None if bias is None else new_parameter(bias.detach(), like)
    return token_map
