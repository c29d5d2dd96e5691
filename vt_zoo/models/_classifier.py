"""Code shared by classifiers that read tokens."""
import json
from typing import Any, Dict, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .._requirements import timm_is_at_least
from ._asked import AsksModel

# timm before 1.0.31 unpickles a file if it is given a name, and takes model.safetensors if it is given none
HUB_FILE = 'model.safetensors' if timm_is_at_least('1.0.31') else None

CREATION_ARGS = (  # arguments that every such model must be created with for its weights to fit
    'in_chans', 'output_stride', 'global_pool', 'feature_dim', 'token_dim', 'num_tokens', 'tokenizer', 'recurrent',
    'token_mixer', 'projector', 'last_projector', 'dynamic_tokens', 'position_code', 'num_heads', 'attention_values',
    'act_layer', 'norm_layer')


def check_images(x: torch.Tensor, in_chans: int) -> torch.Tensor:
    """Return x, or raise ValueError if it is not (B, in_chans, H, W) with H, W >= 32."""
    if x.ndim != 4 or x.shape[1] != in_chans or x.shape[2] < 32 or x.shape[3] < 32:
        raise ValueError(f'x must have the shape (B, {in_chans}, H, W) with H and W at least 32, got {list(x.shape)}')
    return x


class PixelTokens(nn.Module):
    """Stand-in for a pruned VT stage: returns the feature map unchanged, and its pixels as the tokens."""

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return a feature map (B, C, H, W) and tokens (B, H*W, C)."""
        return x, x.flatten(2).transpose(1, 2)


class TokenClassifier(AsksModel):
    """Base class of a model whose `forward_features` returns tokens: adds pooling, dropout and a classifier."""

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map tokens (B, L, CT) to logits (B, num_classes), or to the pooled tokens (B, CT) if `pre_logits`."""
        if self.global_pool.pool_type:
            x = self.global_pool(x.transpose(1, 2).unsqueeze(2))
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def project_to_features(kwargs: Dict[str, Any]) -> None:
    """Give the last VT module a projector where its map is read, by `features_only=True`.

    Raises:
        ValueError: There are to be no projectors.
    """
    if kwargs.get('features_only', False):
        if not kwargs.get('projector', True):
            raise ValueError('features_only=True needs projectors, which refine the map, got projector=False')
        kwargs.setdefault('last_projector', True)


def creation_args(kwargs: Dict[str, Any], names: Sequence[str]) -> Dict[str, Any]:
    """Select the arguments that a model was created with which are in `CREATION_ARGS` or `names` and fit into JSON.

    timm has kept them in config.json since 1.0.31.
    """
    return {name: value for name, value in kwargs.items() if name in (*CREATION_ARGS, *names) and _fits_json(value)}


def _fits_json(value: Any) -> bool:
    try:
        json.JSONEncoder().encode(value)
    except (TypeError, ValueError):
        return False
    return value is not None
