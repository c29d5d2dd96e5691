"""The VT module: tokenizer, transformer, projector (Figure 1 of the paper)."""
from typing import Callable, Optional, Tuple

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

    The module does not depend on the order of the pixels: permuted pixels give the same tokens and a map permuted in
    the same way. (This does not hold with a pooling or clustering tokenizer or a position code, which depend on where
    a pixel is.)
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            token_dim: int = 1024,
            num_tokens: int = 16,
            tokenizer: Callable[..., nn.Module] = FilterTokenizer,
            token_mixer: Callable[..., nn.Module] = TokenTransformer,
            projector: Optional[Callable[..., nn.Module]] = Projector,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.,
            zero_init_last: bool = True,
            device=None,
            dtype=None,
    ) -> None:
        """
        The three parts are classes, or partials of them that hold further arguments, such as
        `partial(TokenTransformer, num_heads=4)`.

        Args:
            in_chs: Channels C_in of the incoming feature map.
            out_chs: Channels C_out of the outgoing feature map.
            token_dim: Token channels CT. The paper uses 1024.
            num_tokens: Number of tokens L. The paper uses 16.
            tokenizer: Class of the tokenizer.
            token_mixer: Class of the module that relates the tokens.
            projector: Class of the projector; a module without one (None) returns the feature map unchanged.
            norm_layer: Norm of the linear maps, over the channels of an NCHW tensor: a class, or timm's name of one.
            drop_path: Stochastic depth rate of each residual branch.
            zero_init_last: Start residual branches, and the filters made from tokens, at zero. Without it, training at
                the paper's learning rates diverges.

        Raises:
            ValueError: `projector` is True or False, which it was in 0.1.
        """
        if isinstance(projector, bool):
            raise ValueError(f'projector must be a class, a partial of one, or None for none, got {projector}')
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.tokenizer = tokenizer(in_chs, token_dim, self.new_tokens(num_tokens), norm_layer=norm_layer, **dd)
        if self.tokenizer.out_chs != token_dim:
            self.embed = TokenLinear(self.tokenizer.out_chs, token_dim, norm_layer=norm_layer, **dd)
        else:
            self.embed = TokenNorm(token_dim, norm_layer, **dd)
        branch = dict(norm_layer=norm_layer, drop_path=drop_path, **dd)
        self.transformer = token_mixer(token_dim, num_tokens, **branch)
        self.projector = projector(in_chs, out_chs, token_dim, **branch) if projector is not None else None
        if zero_init_last:
            _start_at_zero(self)

    @staticmethod
    def new_tokens(num_tokens: int) -> int:
        """Number of tokens that the tokenizer makes, out of the `num_tokens` that the module relates."""
        return num_tokens

    def tokenize(self, x: torch.Tensor, tokens: Optional[torch.Tensor]) -> torch.Tensor:
        """Make tokens (B, L, CT) from the feature map and the previous module's tokens."""
        return self.embed(self.tokenizer(x, tokens))

    def forward(
            self,
            x: torch.Tensor,
            tokens: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Run the module.

        Args:
            x: Feature map (B, C_in, H, W).
            tokens: Tokens of the previous module (B, L, CT); None in the first module.

        Returns:
            The refined feature map (B, C_out, H, W), or x if there is no projector, and the tokens (B, L, CT).
        """
        tokens = self.transformer(self.tokenize(x, tokens))
        if self.projector is not None:
            x = self.projector(x, tokens)
        return x, tokens


class DynamicVTModule(VTModule):
    """VT module with the dynamic tokens of the paper's first version: half of the tokens are new, the others are kept.

    T_in is split into two halves. The first half makes the filters that extract the new tokens, the second half is
    kept, and the transformer relates both.
    """

    @staticmethod
    def new_tokens(num_tokens: int) -> int:
        """Half of `num_tokens`.

        Raises:
            ValueError: `num_tokens` is odd.
        """
        if num_tokens % 2:
            raise ValueError(f'num_tokens must be even with dynamic_tokens=True, got {num_tokens}')
        return num_tokens // 2

    def tokenize(self, x: torch.Tensor, tokens: Optional[torch.Tensor]) -> torch.Tensor:
        """Make half of the tokens (B, L, CT) anew and keep the other half."""
        if tokens is None:
            raise ValueError('tokens must be those of the module before, got None')
        guide, kept = tokens.chunk(2, dim=1)
        return torch.cat([self.embed(self.tokenizer(x, guide)), kept], dim=1)


class TokenModule(nn.Module):
    """Module that relates tokens without looking at pixels: all modules but the first if there are no projectors.

    See Table 7 of the paper.
    """

    projector = None

    def __init__(
            self,
            token_dim: int = 1024,
            num_tokens: int = 16,
            token_mixer: Callable[..., nn.Module] = TokenTransformer,
            zero_init_last: bool = True,
            **kwargs,
    ) -> None:
        """
        Args:
            token_dim: Token channels CT.
            num_tokens: Number of tokens L.
            token_mixer: Class of the module that relates the tokens.
            zero_init_last: Start residual branches at zero.
            **kwargs: Other arguments of `token_mixer`.
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
        """Return the feature map unchanged and the related tokens (B, L, CT)."""
        if tokens is None:
            raise ValueError('tokens must be those of the module before, got None')
        return x, self.transformer(tokens)
