"""What classifiers that read tokens share."""
import json
from typing import Any, Dict, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .._requirements import timm_is_at_least
from ._asked import AsksModel

# timm before 1.0.31 unpickles a file that is named, and takes model.safetensors where none is
HUB_FILE = 'model.safetensors' if timm_is_at_least('1.0.31') else None

CREATION_ARGS = (  # what every such model must be created with for its weights to fit
    'in_chans', 'output_stride', 'global_pool', 'feature_dim', 'token_dim', 'num_tokens', 'tokenizer', 'recurrent',
    'token_mixer', 'projector', 'last_projector', 'dynamic_tokens', 'position_code', 'num_heads', 'attention_values',
    'act_layer', 'norm_layer')


def check_images(x: torch.Tensor, in_chans: int) -> torch.Tensor:
    """Return x, or raise ValueError where it is not (B, in_chans, H, W) with H, W >= 32."""
    if x.ndim != 4 or x.shape[1] != in_chans or x.shape[2] < 32 or x.shape[3] < 32:
        raise ValueError(f'x must have the shape (B, {in_chans}, H, W) with H and W at least 32, got {list(x.shape)}')
    return x


class PixelTokens(nn.Module):
    """What stands in place of a VT stage that was pruned: the map as it came, and its pixels for the tokens."""

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return a feature map (B, C, H, W) and tokens (B, H*W, C)."""
        return x, x.flatten(2).transpose(1, 2)


class TokenClassifier(AsksModel):
    """Base of a model whose `forward_features` gives tokens: pooling over them, dropout, classifier."""

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens (B, L, CT) to logits (B, num_classes), or to the pooled tokens (B, CT) where `pre_logits`."""
        if self.global_pool.pool_type:
            x = self.global_pool(x.transpose(1, 2).unsqueeze(2))
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def creation_args(kwargs: Dict[str, Any], names: Sequence[str]) -> Dict[str, Any]:
    """Arguments of `CREATION_ARGS` and of these names that a model was created with and that JSON can hold.

    timm keeps them in config.json since 1.0.31.
    """
    return {name: value for name, value in kwargs.items() if name in (*CREATION_ARGS, *names) and _fits_json(value)}


def _fits_json(value: Any) -> bool:
    try:
        json.JSONEncoder().encode(value)
    except (TypeError, ValueError):
        return False
    return value is not None
