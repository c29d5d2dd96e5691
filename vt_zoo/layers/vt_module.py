"""The VT module: tokenizer, transformer, projector (Figure 1 of the paper)."""
from typing import Optional, Tuple, Type

import torch
import torch.nn as nn
from timm.layers import LayerType

from .linear import TokenLinear, TokenNorm
from .projector import Projector
from .tokenizer import FilterTokenizer
from .transformer import TokenTransformer

__all__ = ['DynamicVTModule', 'TokenModule', 'VTModule']


def _start_at_zero(module: nn.Module) -> None:
    """Start the residual branches of a module's parts at zero."""
    for part in module.children():
        if hasattr(part, 'zero_init_last'):
            part.zero_init_last()


class VTModule(nn.Module):
    """Visual Transformer module: gather pixels into tokens, relate the tokens, write them back to the pixels.

    The order of the pixels has no meaning to it: permuted pixels give the same tokens and an equally permuted map.
    (A pooling or clustering tokenizer and a position code look at places, and with them it does not hold.)
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            token_dim: int = 1024,
            num_tokens: int = 16,
            tokenizer: Type[nn.Module] = FilterTokenizer,
            token_mixer: Type[nn.Module] = TokenTransformer,
            projector: bool = True,
            position_code: bool = False,
            num_heads: int = 1,
            attention_values: bool = False,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.,
            zero_init_last: bool = True,
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
            token_mixer: Class of what relates the tokens.
            projector: Own a projector; a module without one returns the feature map as it came.
            position_code: Append a position code to the tokens (first version of the paper).
            num_heads: Heads of the transformer and the projector (first version of the paper).
            attention_values: Value maps in the transformer and the projector (first version of the paper).
            act_layer: Activation of the transformer.
            norm_layer: Norm over channels of an NCHW tensor, after linear maps (`vt_zoo.layers.linear` says which).
            drop_path: Stochastic depth rate of each residual branch.
            zero_init_last: Start residual branches, and the filters that tokens make, at zero. Without it training
                at the paper's learning rates diverges.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        shared = dict(
            norm_layer=norm_layer, drop_path=drop_path, num_heads=num_heads, attention_values=attention_values, **dd)
        self.tokenizer = tokenizer(
            in_chs, token_dim, self.new_tokens(num_tokens), position_code=position_code, norm_layer=norm_layer, **dd)
        if self.tokenizer.out_chs != token_dim:
            self.embed = TokenLinear(self.tokenizer.out_chs, token_dim, norm_layer=norm_layer, **dd)
        else:
            self.embed = TokenNorm(token_dim, norm_layer, **dd)
        self.transformer = token_mixer(token_dim, num_tokens, act_layer=act_layer, **shared)
        self.projector = Projector(in_chs, out_chs, token_dim, **shared) if projector else None
        if zero_init_last:
            _start_at_zero(self)

    @staticmethod
    def new_tokens(num_tokens: int) -> int:
        """Tokens that the tokenizer makes, of `num_tokens` that the module relates."""
        return num_tokens

    def tokenize(self, x: torch.Tensor, tokens: Optional[torch.Tensor]) -> torch.Tensor:
        """Make tokens (B, L, CT) from the feature map and the tokens of the module before."""
        return self.embed(self.tokenizer(x, tokens))

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
        tokens = self.transformer(self.tokenize(x, tokens))
        if self.projector is not None:
            x = self.projector(x, tokens)
        return x, tokens


class DynamicVTModule(VTModule):
    """VT module with the dynamic tokens of the paper's first version: it makes half of the tokens anew.

    T_in is split in two halves. The first makes the filters that extract the new tokens, the second is kept, and the
    transformer relates both.
    """

    @staticmethod
    def new_tokens(num_tokens: int) -> int:
        """Half of the tokens.

        Raises:
            ValueError: Their number is odd.
        """
        if num_tokens % 2:
            raise ValueError(f'num_tokens must be even with dynamic_tokens=True, got {num_tokens}')
        return num_tokens // 2

    def tokenize(self, x: torch.Tensor, tokens: Optional[torch.Tensor]) -> torch.Tensor:
        """Make half of the tokens anew and keep the other half: (B, L, CT)."""
        if tokens is None:
            raise ValueError('tokens must be those of the module before, got None')
        guide, kept = tokens.chunk(2, dim=1)
        return torch.cat([self.embed(self.tokenizer(x, guide)), kept], dim=1)


class TokenModule(nn.Module):
    """Module that relates tokens and does not look at pixels: what follows the first without projectors (Table 7)."""

    projector = None

    def __init__(
            self,
            token_dim: int = 1024,
            num_tokens: int = 16,
            token_mixer: Type[nn.Module] = TokenTransformer,
            zero_init_last: bool = True,
            **kwargs,
    ) -> None:
        """
        Args:
            token_dim: Token channels CT.
            num_tokens: Tokens L.
            token_mixer: Class of what relates the tokens.
            zero_init_last: Start residual branches at zero.
            **kwargs: Its other arguments.
        """
        super().__init__()
        self.transformer = token_mixer(token_dim, num_tokens, **kwargs)
        if zero_init_last:
            _start_at_zero(self)

    def forward(
            self,
            x: torch.Tensor,
            tokens: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the feature map as it came and the related tokens (B, L, CT)."""
        if tokens is None:
            raise ValueError('tokens must be those of the module before, got None')
        return x, self.transformer(tokens)
