"""The VT module: tokenizer, transformer, projector (Figure 1 of the paper)."""
from typing import Optional, Tuple, Type

import torch
import torch.nn as nn
from timm.layers import LayerType

from .linear import TokenLinear, TokenNorm
from .projector import Projector
from .tokenizer import FilterTokenizer
from .transformer import TokenTransformer

__all__ = ['VTModule']


class VTModule(nn.Module):
    """Visual Transformer module: gather pixels into tokens, relate the tokens, write them back to the pixels.

    The order of the pixels has no meaning to it: permuted pixels give the same tokens and an equally permuted map.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            token_dim: int = 1024,
            num_tokens: int = 16,
            tokenizer: Type[nn.Module] = FilterTokenizer,
            projector: bool = True,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Channels C_in of the incoming feature map.
            out_chs: Channels C_out of the outgoing feature map.
            token_dim: Token channels CT. 1024 is the paper's.
            num_tokens: Tokens L. 16 is the paper's.
            tokenizer: Class of the tokenizer.
            projector: Own a projector; a module without one returns the feature map as it came.
            act_layer: Activation of the transformer.
            norm_layer: Norm over channels of an NCHW tensor, after each linear map.
            drop_path: Stochastic depth rate of each residual branch.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.tokenizer = tokenizer(in_chs, token_dim, num_tokens, norm_layer=norm_layer, **dd)
        if in_chs != token_dim:
            self.embed = TokenLinear(in_chs, token_dim, norm_layer=norm_layer, **dd)
        else:
            self.embed = TokenNorm(token_dim, norm_layer, **dd)
        self.transformer = TokenTransformer(token_dim, act_layer, norm_layer, drop_path, **dd)
        self.projector = Projector(in_chs, out_chs, token_dim, norm_layer, drop_path, **dd) if projector else None

    def forward(
            self,
            x: torch.Tensor,
            tokens: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Run the module.

        Args:
            x: Feature map (B, C_in, H, W).
            tokens: Tokens of the module before (B, L, CT); the first module has none.

        Returns:
            The refined feature map (B, C_out, H, W), or x where there is no projector, and the tokens (B, L, CT).
        """
        tokens = self.transformer(self.embed(self.tokenizer(x, tokens)))
        if self.projector is not None:
            x = self.projector(x, tokens)
        return x, tokens
