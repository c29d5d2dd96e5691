"""What classifiers that read tokens share."""
import json
from typing import Any, Dict, Sequence

import torch
import torch.nn.functional as F

from ._asked import AsksModel


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
    """Arguments of these names that a model was created with and that JSON can hold.

    timm keeps them in config.json since 1.0.31.
    """
    return {name: value for name, value in kwargs.items() if name in names and _fits_json(value)}


def _fits_json(value: Any) -> bool:
    try:
        json.JSONEncoder().encode(value)
    except (TypeError, ValueError):
        return False
    return value is not None
