"""Attention between tokens and pixels, shared by tokenizer, transformer and projector.

float16 is the reason why `torch.softmax` alone is not enough. A product of two activations can overflow float16, and
softmax turns an infinity into NaN, so `finite` clamps the logits to the range. With tens of thousands of pixels, the
share of a single one is too small for a normal float16 number, so the softmax over pixels is taken `in_float32`;
`gather` multiplies the shares by 16, which brings most of them into the range, and divides the product by 16 again.

`finite`, `in_float32`, `gather`, `add_mixed` and `apart` branch on types and shapes, which torch.fx cannot trace, so
each module that calls them registers them with `torch.fx.wrap`.
"""
import torch


def finite(logits: torch.Tensor) -> torch.Tensor:
    """Replace NaN and infinities in float16 logits by finite values; other types are returned unchanged."""
    return torch.nan_to_num(logits) if logits.dtype == torch.float16 else logits


def in_float32(logits: torch.Tensor) -> torch.Tensor:
    """Convert float16 logits to float32; other types are returned unchanged."""
    return logits.float() if logits.dtype == torch.float16 else logits


def gather(attn: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A^T V: gather pixel values (B, C, H, W) into tokens (B, L, C) by their shares A^T (B, L, H*W)."""
    pixels = values.flatten(2).transpose(1, 2)
    if attn.dtype == values.dtype:
        return torch.bmm(attn, pixels)
    none = pixels.new_zeros(1, 1, 1)
    return torch.baddbmm(none, (16 * attn).to(values.dtype), pixels, beta=0, alpha=1 / 16)  # it accumulates in float32


def pixel_products(tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(X T^T)^T: dot products (B, L, H*W) of tokens (B, L, C) with the pixels of a feature map (B, C, H, W)."""
    return torch.bmm(x.flatten(2).transpose(1, 2), tokens.transpose(1, 2)).transpose(1, 2)


def apart(tokens: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Repeat tokens (B, L, C) once per head, with zeros in the channels of all other heads: (B, heads * L, C)."""
    if num_heads == 1:
        return tokens
    own = torch.eye(num_heads, device=tokens.device, dtype=tokens.dtype).repeat_interleave(
        tokens.shape[-1] // num_heads, dim=1)  # (heads, C)
    return (tokens.unsqueeze(1) * own.unsqueeze(1)).flatten(1, 2)


def add_mixed(x: torch.Tensor, attn: torch.Tensor, value: torch.Tensor, num_heads: int = 1) -> torch.Tensor:
    """X + A^T V: add token values (B, L, C), mixed by shares (B * heads, L, H*W), to a feature map (B, C, H, W).

    A single matrix product writes the sum in the memory format of x: a separate map for the mixture would cost more
    time than the arithmetic.
    """
    value = split_heads(value, num_heads)
    if num_heads == 1 and not x.is_contiguous():
        mixed = torch.baddbmm(x.flatten(2).transpose(1, 2), attn.transpose(1, 2), value).transpose(1, 2)
    else:
        parts = x.flatten(2).unflatten(1, (num_heads, -1)).flatten(0, 1)  # (B * heads, C / heads, H*W)
        mixed = torch.baddbmm(parts, value.transpose(1, 2), attn).unflatten(0, (-1, num_heads)).flatten(1, 2)
    return mixed.view(x.shape)


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, N, C) -> (B * heads, N, C / heads)."""
    if num_heads == 1:
        return x
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2).flatten(0, 1)


def merge_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B * heads, N, C / heads) -> (B, N, C)."""
    if num_heads == 1:
        return x
    return x.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)
