"""The VT neck: one transformer relates the tokens of all levels of a pyramid (section 4 of the paper, Figure 4)."""
from typing import List, Sequence

import torch
import torch.nn as nn
from timm.layers import LayerType

from .linear import TokenLinear
from .projector import Projector
from .tokenizer import FilterTokenizer
from .transformer import TokenTransformer

__all__ = ['VTNeck']


class VTNeck(nn.Module):
    """Neck of VT-FPN: each level is gathered into tokens, and one transformer relates the tokens of all levels.

    Each level has its own tokenizer, equation (1), and projector, equation (5), and gets its own tokens back.
    """

    def __init__(
            self,
            in_chs: Sequence[int],
            pyramid_channels: int = 256,
            num_tokens: int = 8,
            token_dim: int = 1024,
            norm_layer: LayerType = nn.BatchNorm2d,
    ) -> None:
        """
        Args:
            in_chs: Channels of the encoder's maps, from fine to coarse.
            pyramid_channels: Channels C of each level. 256 reproduces the costs of Tables 9 and 10.
            num_tokens: Number of tokens L of each level. The paper uses 8 (section 4).
            token_dim: Channels CT of a token. The paper uses 1024 (section 4).
            norm_layer: Norm of the linear maps, over the channels of an NCHW tensor: a class, or timm's name of one.
                The laterals have none.
        """
        super().__init__()
        levels = range(len(in_chs))
        self.num_tokens = num_tokens
        self.laterals = nn.ModuleList([nn.Conv2d(chs, pyramid_channels, 1) for chs in in_chs])
        self.tokenizers = nn.ModuleList([
            FilterTokenizer(pyramid_channels, token_dim, num_tokens, value_map=False, norm_layer=norm_layer)
            for _ in levels])
        self.embeds = nn.ModuleList([TokenLinear(pyramid_channels, token_dim, norm_layer=norm_layer) for _ in levels])
        self.transformer = TokenTransformer(token_dim, norm_layer=norm_layer, key_groups=1)
        self.projectors = nn.ModuleList([
            Projector(pyramid_channels, pyramid_channels, token_dim, norm_layer, query_group_width=16) for _ in levels])
        for conv in self.laterals:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)
        for part in (self.transformer, *self.projectors):
            part.zero_init_last()

    def forward(self, features: List[torch.Tensor]) -> List[torch.Tensor]:
        """Turn the encoder's maps (B, C_i, H_i, W_i), from fine to coarse, into levels (B, C, H_i, W_i)."""
        maps: List[torch.Tensor] = []
        gathered: List[torch.Tensor] = []
        for i, (lateral, tokenizer, embed) in enumerate(zip(self.laterals, self.tokenizers, self.embeds)):
            maps.append(lateral(features[i]))
            gathered.append(embed(tokenizer(maps[i])))
        tokens = self.transformer(torch.cat(gathered, dim=1)).split(self.num_tokens, dim=1)
        return [projector(maps[i], tokens[i]) for i, projector in enumerate(self.projectors)]
