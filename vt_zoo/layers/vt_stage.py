"""The VT stage: a sequence of VT modules that replaces the last stage of a convolutional backbone."""
from functools import partial
from typing import Dict, Optional, Sequence, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.layers import LayerType
from torch.utils.checkpoint import checkpoint

from ._checks import check_choice, check_norm, check_positive
from .projector import Projector
from .token_mixer import GraphMixer, LinearMixer
from .tokenizer import ClusteringTokenizer, FilterTokenizer, PoolingTokenizer, RecurrentTokenizer
from .transformer import TokenTransformer
from .vt_module import DynamicVTModule, TokenModule, VTModule

__all__ = ['VTStage']

TOKENIZERS: Dict[str, Tuple[Type[nn.Module], Type[nn.Module]]] = {  # in the first module, in those after it
    'filter': (FilterTokenizer, RecurrentTokenizer),
    'pooling': (PoolingTokenizer, PoolingTokenizer),
    'clustering': (ClusteringTokenizer, RecurrentTokenizer),
}
TOKEN_MIXERS: Dict[str, Type[nn.Module]] = {
    'transformer': TokenTransformer,
    'graph': GraphMixer,
    'none': LinearMixer,
}
FEW_TOKENS = 2  # with more tokens than this, those of a single image differ enough for batch norms


def _check_different(x: torch.Tensor, num_tokens: int) -> None:
    """Raise ValueError if all maps of a batch (B, C, H, W) are the same except for rounding."""
    if len(x) > 1 and (x - x[:1]).abs().max() <= 1e-6 * x.abs().max():
        raise ValueError(
            f'num_tokens={num_tokens} cannot be trained on a batch of {len(x)} equal images: batch norms divide by the '
            'variance of the tokens, which is zero')


torch.fx.wrap('_check_different')


class VTStage(nn.ModuleList):
    """A sequence of VT modules: the first makes tokens from the feature map alone, later ones also use previous tokens.

    Attributes:
        out_chs: Channels of the returned feature map.
        grad_checkpointing: Recompute the modules' activations in the backward pass, which saves memory.
    """

    def __init__(
            self,
            in_chs: int,
            feature_dim: int,
            depth: int = 3,
            token_dim: int = 1024,
            num_tokens: int = 16,
            tokenizer: str = 'filter',
            recurrent: bool = True,
            token_mixer: str = 'transformer',
            projector: bool = True,
            last_projector: bool = True,
            dynamic_tokens: bool = False,
            position_code: bool = False,
            num_heads: int = 1,
            attention_values: bool = False,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: Union[float, Sequence[float]] = 0.,
            zero_init_last: bool = True,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Channels C_in of the incoming feature map.
            feature_dim: Channels C_out of the refined feature map. 512 for ResNet-18 and 34, the channels of the
                replaced stage, reproduces Tables 2 to 7 (section 4 says 256); the paper uses 1024 for ResNet-50 and
                101.
            depth: Number of VT modules. The paper uses as many as the replaced stage had blocks: 2 or 3.
            token_dim: Channels CT of a token. The paper uses 1024 (section 4).
            num_tokens: Number of tokens L. The paper uses 16; 32 and 64 did not help (Table 6). With 1 or 2, `forward`
                raises ValueError in training if all images of a batch are equal.
            tokenizer: 'filter' (equation 1) or 'clustering' in the first module, with `RecurrentTokenizer` after it;
                or 'pooling' in every module (Table 3), which needs a `num_tokens` that makes a grid.
            recurrent: Use recurrent tokenizers after the first module; False for filters in every module (Table 4).
            token_mixer: 'transformer' (equations 3 and 4), 'graph' (a learned L x L adjacency and a linear map) or
                'none' (a linear map) (Table 5).
            projector: Write the tokens back to the map. If False, modules after the first work on tokens only
                (Table 7).
            last_projector: Write the last module's tokens back too. Should be False if nothing reads the map, as in a
                classifier on tokens, since the projector's weights would get no gradient.
            dynamic_tokens: Modules after the first make half of the tokens anew and keep the other half. Like the next
                three arguments, this is from the first version of the paper.
            position_code: Append a code of the token coefficients A to the tokens.
            num_heads: Heads of the transformer and the projector.
            attention_values: Use value maps W_V in the transformer and the projector. (All tokenizers but 'pooling'
                have one in any case.)
            act_layer: Activation of the transformers.
            norm_layer: Norm of the linear maps, over the channels of an NCHW tensor: a class, or timm's name of one.
            drop_path: Stochastic depth rate of the residual branches: one for all modules, or one per module.
            zero_init_last: Start residual branches, and the filters made from tokens, at zero. Without it, training at
                the paper's learning rates diverges.

        Raises:
            ValueError: An argument is not allowed.
        """
        super().__init__()
        check_choice('tokenizer', tokenizer, list(TOKENIZERS))
        check_choice('token_mixer', token_mixer, list(TOKEN_MIXERS))
        for name, value in dict(
                in_chs=in_chs, feature_dim=feature_dim, depth=depth, token_dim=token_dim, num_tokens=num_tokens,
                num_heads=num_heads).items():
            check_positive(name, value)
        if tokenizer != 'filter' and not recurrent:
            raise ValueError(f"recurrent=False is for tokenizer='filter', got tokenizer={tokenizer!r}")
        if dynamic_tokens and (tokenizer == 'pooling' or not recurrent):
            raise ValueError(
                f'dynamic_tokens=True needs recurrent tokenizers, got tokenizer={tokenizer!r}, recurrent={recurrent}')
        if dynamic_tokens and depth == 1:
            raise ValueError('dynamic_tokens=True needs modules after the first, got a stage of one module')
        if not projector and (dynamic_tokens or not recurrent):
            raise ValueError(
                'projector=False leaves modules after the first without a tokenizer and a map, got '
                f'dynamic_tokens={dynamic_tokens}, recurrent={recurrent}')
        rates = list(drop_path) if isinstance(drop_path, (list, tuple)) else [float(drop_path)] * depth
        if len(rates) != depth:
            raise ValueError(f'drop_path must be one rate or one for each of {depth} modules, got {drop_path!r}')
        if not all(0 <= rate < 1 for rate in rates):
            raise ValueError(f'drop_path must be at least 0 and below 1, got {drop_path!r}')
        check_norm(norm_layer)

        self.few_tokens = num_tokens if num_tokens <= FEW_TOKENS else 0
        self.grad_checkpointing = False
        attention = dict(num_heads=num_heads, attention_values=attention_values)
        first_tokenizer, next_tokenizer = TOKENIZERS[tokenizer]
        shared = dict(
            token_dim=token_dim, num_tokens=num_tokens,
            token_mixer=partial(TOKEN_MIXERS[token_mixer], act_layer=act_layer, **attention),
            norm_layer=norm_layer, zero_init_last=zero_init_last, device=device, dtype=dtype)
        for i, rate in enumerate(rates):
            if i > 0 and not projector:
                self.append(TokenModule(drop_path=rate, **shared))
                continue
            module_class = DynamicVTModule if i > 0 and dynamic_tokens else VTModule
            make_tokens = first_tokenizer if i == 0 else next_tokenizer if recurrent else FilterTokenizer
            projects = projector and (last_projector or i < depth - 1)
            self.append(module_class(
                in_chs,
                feature_dim,
                tokenizer=partial(make_tokens, position_code=position_code),
                projector=partial(Projector, **attention) if projects else None,
                drop_path=rate,
                **shared,
            ))
            in_chs = feature_dim if projects else in_chs
        self.out_chs = in_chs

    def __getitem__(self, idx: Union[int, slice]) -> nn.Module:
        """Return a module, or a stage of the modules in a slice."""
        if not isinstance(idx, slice):
            return super().__getitem__(idx)
        part = VTStage.__new__(VTStage)
        nn.ModuleList.__init__(part, list(self)[idx])
        part.few_tokens, part.grad_checkpointing = self.few_tokens, self.grad_checkpointing
        part.out_chs, part.training = self.out_chs, self.training
        return part

    @torch.jit.unused
    def _check_norms(self, x: torch.Tensor) -> None:
        if any(m.training and isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules()):
            _check_different(x, self.few_tokens)

    def forward(
            self,
            x: torch.Tensor,
            tokens: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Refine a feature map.

        Args:
            x: Feature map (B, C_in, H, W).
            tokens: Tokens (B, L, CT) of a previous stage; needed if the first module has a recurrent tokenizer.

        Returns:
            The refined feature map (B, C_out, H, W) and the tokens of the last module (B, L, CT).
        """
        if self.few_tokens and not torch.jit.is_scripting() and not torch.compiler.is_compiling():
            self._check_norms(x)
        for module in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, tokens = checkpoint(module, x, tokens, use_reentrant=False)
            else:
                x, tokens = module(x, tokens)
        assert tokens is not None  # there is at least one module
        return x, tokens
