"""VT modules that compute in the paper's order, with the same weights and outputs: maps of pixels on the pixels.

The layers of vt_zoo put value, key and query maps on the tokens, where they cost less. The paper counts them on all
pixels, so what is compared with its counts is counted in this form.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from vt_zoo.layers import ClusteringTokenizer, FilterTokenizer, Projector, RecurrentTokenizer
from vt_zoo.layers.attention import add_mixed, gather, pixel_products, split_heads

__all__ = ['in_paper_order']


def on_pixels(layer: nn.Module, x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """A map of tokens without a norm, or its transpose, on the pixels of x (B, C, H, W)."""
    if isinstance(layer, nn.Identity):
        return x
    groups = getattr(layer.conv, 'groups', 1)
    weight = layer.conv.weight.flatten(1)
    if transposed:
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return F.conv2d(x, weight[:, :, None, None], groups=groups)


class _GatherValues:
    """T = A^T (X W_V)."""

    def gather(self, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        attn = self.softmax(self.logit_norm(logits.unsqueeze(2)).squeeze(2))
        tokens = gather(attn, on_pixels(self.value, x))
        if self.position_code is None:
            return tokens
        return torch.cat([tokens, self.position_code(attn.view(*attn.shape[:2], *x.shape[2:]))], dim=-1)


class _Filter(_GatherValues, FilterTokenizer):
    pass


class _Clustering(_GatherValues, ClusteringTokenizer):
    pass


class _Recurrent(_GatherValues, RecurrentTokenizer):
    """A = softmax((X W_K) W_R)."""

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        filters = self.filters(self.query(tokens)) * self.scale
        return self.gather(pixel_products(filters, on_pixels(self.key, x, transposed=True)), x)


class _Projector(Projector):
    """X + softmax((X W_Q)(T W_K)^T) T."""

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        query = on_pixels(self.query, x, transposed=True).flatten(2).transpose(1, 2)
        query, key = (split_heads(t, self.num_heads) for t in (query, self.key(tokens)))
        attn = self.softmax(torch.bmm(query, key.transpose(1, 2)).transpose(1, 2) * self.scale)
        return add_mixed(self.skip(x), attn, self.value(tokens), self.num_heads)


_FORMS = {
    FilterTokenizer: _Filter, ClusteringTokenizer: _Clustering, RecurrentTokenizer: _Recurrent, Projector: _Projector}


def in_paper_order(model: nn.Module) -> nn.Module:
    """Make the VT modules of a model, in place, compute in the paper's order."""
    for module in model.modules():
        module.__class__ = _FORMS.get(type(module), type(module))
    return model
