"""Pictures of what tokens look at. matplotlib is imported where a picture is drawn (extra `figures`).

Attention is drawn as a multiple of uniform attention 1 / (H * W) in the colour map inferno, which readers with any kind
of colour vision can tell apart, on one square-root scale for a whole picture.
"""
from pathlib import Path
from typing import List, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from PIL import Image

from vt_zoo.checkpoint import whole
from vt_zoo.errors import InputError

__all__ = ['draw_interaction', 'draw_locality', 'draw_token_attention']


def draw_token_attention(
        images: Sequence[Image.Image],
        attention: torch.Tensor,
        titles: List[str],
        path: Union[str, Path],
) -> None:
    """Draw the attention of each token over a few images, one row an image, one column a token.

    Args:
        images: B images as the model saw them.
        attention: A of a tokenizer (B, L, H, W), as `capture` returns it. It is drawn as a multiple of uniform
            attention 1 / (H * W), on one square-root scale for all.
        titles: What to write beside each image.
        path: PNG or SVG file to write.

    Raises:
        InputError: matplotlib is not installed.
    """
    attention = _multiple_of_uniform(attention)
    num_tokens = attention.shape[1]
    figure = _figure((0.62 * (num_tokens + 1) + 1.4, 0.66 * len(images) + 0.8))
    axes = figure.subplots(len(images), num_tokens + 1, squeeze=False)
    top = _top(attention)
    for row, image, title, maps in zip(axes, images, titles, attention):
        row[0].imshow(image)
        row[0].set_ylabel(title, rotation=0, ha='right', va='center', fontsize=9)
        drawn = _draw_maps(row[1:], image, maps, top)
    for i, ax in enumerate(axes[0]):
        ax.set_title('image' if i == 0 else str(i), fontsize=9)
    _finish(figure, axes, drawn, path)


def draw_interaction(
        image: Image.Image,
        attention: torch.Tensor,
        interaction: torch.Tensor,
        title: str,
        path: Union[str, Path],
) -> None:
    """Draw Figure 6 of the paper for one image: above where each token looks, below which pixels it then meets.

    Args:
        image: The image as the model saw it.
        attention: A of a tokenizer (L, H, W).
        interaction: A-hat of the same tokens (L, H, W), by `vt_zoo.analysis.metrics.interaction_map`.
        title: What to write over the picture.
        path: PNG or SVG file to write.

    Raises:
        InputError: matplotlib is not installed.
    """
    both = _multiple_of_uniform(torch.stack([attention, interaction]))
    num_tokens = attention.shape[0]
    figure = _figure((0.62 * (num_tokens + 1) + 1.4, 2.3))
    axes = figure.subplots(2, num_tokens + 1, squeeze=False)
    top = _top(both)
    for row, name, maps in zip(axes, ('A', 'Â'), both):
        row[0].imshow(image)
        row[0].set_ylabel(name, rotation=0, ha='right', va='center', fontsize=11)
        drawn = _draw_maps(row[1:], image, maps, top)
    for i, ax in enumerate(axes[0]):
        ax.set_title('image' if i == 0 else str(i), fontsize=9)
    figure.suptitle(title, fontsize=10)
    _finish(figure, axes, drawn, path)


def draw_locality(ratios: torch.Tensor, uniform: float, title: str, path: Union[str, Path]) -> None:
    """Draw Figure 5 of the paper: the locality ratio against the layer, with its spread over the heads.

    Args:
        ratios: Ratio of each layer and head (layers, heads), by `vt_zoo.analysis.metrics.locality`.
        uniform: Ratio of uniform attention, drawn as the baseline.
        title: What to write over the picture.
        path: PNG or SVG file to write.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure = _figure((6.2, 3.6))
    ax = figure.subplots()
    layers = range(1, len(ratios) + 1)
    mean, std = ratios.mean(1), ratios.std(1, correction=0)
    ax.fill_between(layers, mean - std, mean + std, color='#0072b2', alpha=0.2, linewidth=0)
    ax.plot(layers, mean, 'o-', color='#0072b2', markersize=4, label='mean of the heads, ± standard deviation')
    ax.axhline(uniform, color='#d55e00', linestyle='--', label=f'uniform attention, {uniform:.4f}')
    top = max((mean + std).max().item(), uniform)
    ax.set(xlabel='layer', ylabel='attention in 3x3 neighbourhood', ylim=(0, 1.35 * top), title=title)
    ax.title.set_fontsize(10)
    ax.set_xticks(layers)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9, loc='upper right')
    _save(figure, path)


def _figure(size: Tuple[float, float]):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib: pip install 'vt_zoo[figures]'") from None
    return Figure(figsize=size, layout='constrained')


def _multiple_of_uniform(attention: torch.Tensor) -> torch.Tensor:
    return attention.float().cpu() * attention.shape[-2] * attention.shape[-1]


def _top(attention: torch.Tensor) -> float:
    """End of the colour scale: all but the highest half percent is below it."""
    values = attention.flatten()
    return values.kthvalue(max(int(0.995 * values.numel()), 1)).values.item()


def _draw_maps(axes, image: Image.Image, maps: torch.Tensor, top: float):
    """Draw a map (L, H, W) in each axes over the image in grey, and give what a colour bar needs."""
    from matplotlib.colors import PowerNorm

    grey = image.convert('L')
    maps = F.interpolate(maps[None], size=(image.height, image.width), mode='bilinear')[0].numpy()
    for ax, values in zip(axes, maps):
        ax.imshow(grey, cmap='gray')
        alpha = 0.2 + 0.65 * (values / top).clip(0, 1) ** 0.5  # the image shows through where attention is low
        drawn = ax.imshow(values, cmap='inferno', norm=PowerNorm(0.5, vmin=0, vmax=top), alpha=alpha)
    return drawn


def _finish(figure, axes, drawn, path: Union[str, Path]) -> None:
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, pad=0.01)
    bar.set_label('attention / uniform\n(square-root scale)', fontsize=9)
    figure.supxlabel('token', fontsize=9)
    _save(figure, path)


def _save(figure, path: Union[str, Path]) -> None:
    with whole(path) as new:
        figure.savefig(new, dpi=130)
