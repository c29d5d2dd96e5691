"""Metrics of what tokens attend to (section 6 of the paper), computed from the records of `vt_zoo.analysis.records`.

All of them take and return torch tensors, and average only over what their documentation says.
"""
import math
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from .records import VTRecord

__all__ = [
    'attention_correlation', 'attention_entropy', 'attention_spread', 'effective_rank', 'foreground_ratio',
    'foreground_share', 'interaction_map', 'locality', 'record_interaction', 'resize_attention', 'token_cosine',
    'token_similarity', 'uniform_locality']


def attention_entropy(attention: torch.Tensor, normalize: bool = False) -> torch.Tensor:
    """Entropy of each token's attention over the pixels: E = -sum_ij A_ij log A_ij (section 6 of the paper).

    Args:
        attention: A (B, L, H, W), which sums to one over the pixels.
        normalize: Divide by log(H * W), the entropy of uniform attention, so that values are from 0 (one pixel) to 1
            for maps of any size. The paper compares nats with log(473 * 473) = 12.318, although A is defined on the
            smaller feature map.

    Returns:
        Entropy (B, L), in nats unless normalised.
    """
    attention = attention.flatten(2)
    entropy = -torch.xlogy(attention, attention).sum(-1)
    return entropy / math.log(attention.shape[-1]) if normalize and attention.shape[-1] > 1 else entropy


def resize_attention(attention: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Interpolate attention (B, L, H, W) to another size (height, width); it again sums to one over the pixels."""
    resized = F.interpolate(attention, size=tuple(size), mode='bilinear', align_corners=False)
    return resized / resized.sum((-2, -1), keepdim=True)


def interaction_map(attention: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
    """Pixels that each token meets in the transformer: A-hat_l = sum over l' of W(l, l') A(l') (section 6).

    Args:
        attention: A (B, L', H, W). For VT-FPN, that of all levels, resized to one size (`resize_attention`) and
            concatenated over the tokens.
        relation: W of the transformer (B, L, L').

    Returns:
        A-hat (B, L, H, W), which sums to one over the pixels.
    """
    return torch.einsum('blm,bmhw->blhw', relation, attention)


def record_interaction(records: Sequence[VTRecord], index: int) -> Optional[torch.Tensor]:
    """Compute A-hat (B, L, H, W) of a record's tokens, at the size of its own A.

    The result is None if the record has no A or no relation, or if A covers only some of its tokens, as with dynamic
    tokens. The transformer of VT-FPN relates the tokens of all levels, so its A-hat includes the A of each level,
    resized.
    """
    record = records[index]
    if record.attention is None or record.relation is None:
        return None
    related = [r for r in records if r.relation is record.relation]
    size = record.attention.shape[-2:]
    attention = torch.cat([resize_attention(r.attention, size) for r in related], dim=1)
    first = sum(r.attention.shape[1] for r in related[:related.index(record)])
    if attention.shape[1] != record.relation.shape[2]:
        return None
    rows = record.relation[:, first:first + record.attention.shape[1]]
    return interaction_map(attention, rows)


def foreground_share(attention: torch.Tensor, foreground: torch.Tensor) -> torch.Tensor:
    """Share of each token's attention that lies on the foreground.

    Args:
        attention: A (B, L, H, W), which sums to one over the pixels.
        foreground: Mask (B, h, w) of any size, or the share of foreground, 0 to 1, in each pixel; resized to H x W by
            averaging over the area of each pixel of A.

    Returns:
        Share (B, L), 0 to 1. For uniform attention, it is the share of the image that is foreground.
    """
    return (attention * _cover(foreground, attention)[:, None]).sum((-2, -1))


def foreground_ratio(attention: torch.Tensor, foreground: torch.Tensor) -> torch.Tensor:
    """Ratio of the mean attention to foreground and background pixels; the paper gives 1.283 on LIP (section 6).

    Args:
        attention: A (B, L, H, W), which sums to one over the pixels.
        foreground: As in `foreground_share`.

    Returns:
        Ratio (B, L), which is 1 for uniform attention; NaN for an image without foreground or without background.
    """
    area = _cover(foreground, attention).mean((-2, -1))[:, None]
    share = foreground_share(attention, foreground)
    return (share / area) / ((1 - share) / (1 - area))


def _cover(foreground: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(foreground[:, None].to(attention.dtype), attention.shape[-2:])[:, 0]


def attention_spread(attention: torch.Tensor) -> torch.Tensor:
    """How far a token's attention is spread: the mean distance of its pixels from the centre of attention.

    `D = sum_ij A_ij |(i, j) - c|` with `c = sum_ij A_ij (i, j)`, as a share of the map's diagonal.

    Args:
        attention: A (B, L, H, W), which sums to one over the pixels.

    Returns:
        Distance (B, L), which is 0 if all attention is on one pixel, 0.27 for uniform attention on a large square map.
    """
    height, width = attention.shape[-2:]
    rows = torch.arange(height).to(attention)[:, None]
    columns = torch.arange(width).to(attention)
    row, column = ((attention * places).sum((-2, -1), keepdim=True) for places in (rows, columns))
    return (attention * torch.hypot(rows - row, columns - column)).sum((-2, -1)) / math.hypot(height, width)


def token_similarity(attention: torch.Tensor) -> torch.Tensor:
    """Which tokens look at the same pixels: mean cosine similarity of the attention of each pair of tokens.

    Args:
        attention: A (N, L, H, W) of the images of a data set.

    Returns:
        Similarity (L, L), the mean over the N images; 1 on the diagonal and for tokens that always attend alike.
    """
    directions = F.normalize(attention.flatten(2), dim=-1)
    return (directions @ directions.transpose(1, 2)).mean(0)


def attention_correlation(attention: torch.Tensor) -> torch.Tensor:
    """Whether tokens look at the same pixels: mean correlation of the attention of two different tokens.

    Uniform attention is subtracted first, so that attending softly to everything does not count as looking at the same
    pixels.

    Args:
        attention: A (B, L, H, W), which sums to one over the pixels.

    Returns:
        Correlation (B), from -1 to 1; NaN if there is only one token.
    """
    return token_cosine(attention.flatten(2) - 1 / (attention.shape[-2] * attention.shape[-1]))


def token_cosine(tokens: torch.Tensor) -> torch.Tensor:
    """Whether tokens say the same thing: mean cosine similarity of two different tokens (B, L, CT) of an image.

    Returns:
        Cosine (B), from -1 to 1; NaN if there is only one token.
    """
    directions = F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)
    num_tokens = tokens.shape[1]
    own = directions.square().sum((1, 2))
    return (directions.sum(1).square().sum(-1) - own) / (num_tokens * (num_tokens - 1) or math.nan)


def effective_rank(tokens: torch.Tensor) -> torch.Tensor:
    """Number of directions in which the tokens of an image differ: effective rank of the tokens around their mean.

    It is the exponential of the entropy of the squared singular values, as shares of their sum (Roy and Vetterli,
    2007).

    Args:
        tokens: T (B, L, CT).

    Returns:
        Rank (B), from 1 to the smaller of L - 1 and CT if the tokens differ, 0 if they are all the same, NaN if one of
        them is not finite.
    """
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))  # half precision has no SVD
    finite = tokens.isfinite().all(-1).all(-1)
    tokens = tokens.where(finite[:, None, None], 0.)
    tokens = tokens / tokens.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(tokens.dtype).tiny)
    squares = torch.linalg.svdvals(tokens - tokens.mean(1, keepdim=True)).square()
    total = squares.sum(-1, keepdim=True)
    rounding = tokens.shape[1] * torch.finfo(tokens.dtype).eps  # of the mean
    differ = total[:, 0] > rounding ** 2 * tokens.square().sum((1, 2))
    shares = squares / total.clamp_min(torch.finfo(squares.dtype).tiny)
    return (torch.exp(-torch.xlogy(shares, shares).sum(-1)) * differ).where(finite, math.nan)


def locality(attention: torch.Tensor, grid: Tuple[int, int], prefix_tokens: int = 0) -> torch.Tensor:
    """Locality ratio of self-attention over patches: the share within the 3x3 neighbourhood (Figure 5).

    R = mean over patches (i, j) of P_ij / T_ij, where P sums the attention of (i, j) to x in {i-1, i, i+1} and y in
    {j-1, j, j+1}, cut off at the border, and T sums it over all patches (section 6 of the paper).

    Args:
        attention: Self-attention of one layer (B, heads, N, N), with N = prefix_tokens + rows * columns.
        grid: (rows, columns) of the patches.
        prefix_tokens: Number of class and register tokens before the patches, which are left out of both sums.

    Returns:
        Ratio (B, heads).
    """
    patches = attention[..., prefix_tokens:, prefix_tokens:]
    near = _neighbours(grid).to(attention.device)
    return ((patches * near).sum(-1) / patches.sum(-1)).mean(-1)


def uniform_locality(grid: Tuple[int, int]) -> float:
    """Locality ratio of uniform attention, which is 0.0416 for 14x14 patches."""
    return (_neighbours(grid).double().sum(-1) / (grid[0] * grid[1])).mean().item()


def _neighbours(grid: Tuple[int, int]) -> torch.Tensor:
    """Whether two patches touch, if only at a corner, or are the same: bool (N, N)."""
    places: List[torch.Tensor] = [
        index.flatten() for index in torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing='ij')]
    return ((places[0][:, None] - places[0]).abs() <= 1) & ((places[1][:, None] - places[1]).abs() <= 1)
