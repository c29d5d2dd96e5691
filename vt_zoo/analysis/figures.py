"""Pictures of what tokens look at. matplotlib is imported only when a picture is drawn (extra `figures`).

Attention is drawn as a multiple of uniform attention 1 / (H * W), on one square-root scale for the whole picture. The
colour map is inferno, which can be read with any kind of colour vision.
"""
import unicodedata
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vt_zoo.errors import InputError
from vt_zoo.files import whole
from vt_zoo.fonts import find_font_file, warn_of

__all__ = ['draw_interaction', 'draw_locality', 'draw_token', 'draw_token_attention', 'overlay_tokens']


def draw_token_attention(
        images: Sequence[Image.Image],
        attention: torch.Tensor,
        titles: List[str],
        path: Union[str, Path],
) -> None:
    """Draw the attention of each token over a few images, with one row per image and one column per token.

    Args:
        images: B images as the model saw them.
        attention: A of a tokenizer (B, L, H, W), as `capture_tokens` returns it. It is drawn as a multiple of uniform
            attention 1 / (H * W), on one square-root scale for all images.
        titles: Text beside each image.
        path: PNG or SVG file to write.

    Raises:
        InputError: matplotlib is not installed.
    """
    maps = _multiple_of_uniform(attention)
    _save(_draw_grid(images, maps, titles, 9, 0.8), path)


def draw_interaction(
        image: Image.Image,
        attention: torch.Tensor,
        interaction: torch.Tensor,
        title: str,
        path: Union[str, Path],
) -> None:
    """Draw Figure 6 of the paper for one image: where each token looks (top), and which pixels it then meets (bottom).

    Args:
        image: The image as the model saw it.
        attention: A of a tokenizer (L, H, W).
        interaction: A-hat of the same tokens (L, H, W), from `vt_zoo.analysis.metrics.interaction_map`.
        title: Title of the picture.
        path: PNG or SVG file to write.

    Raises:
        InputError: matplotlib is not installed.
    """
    both = _multiple_of_uniform(torch.stack([attention, interaction]))
    figure = _draw_grid([image, image], both, ['A', 'Â'], 11, 1)
    title, how = _written(title)
    figure.suptitle(title, fontsize=10, **how)
    _save(figure, path)


def draw_token(
        image: Image.Image,
        attention: torch.Tensor,
        interaction: Optional[torch.Tensor],
        token: int,
) -> Image.Image:
    """Draw a large picture of one token: where it looks and, beside it, which pixels it then meets.

    Args:
        image: The image as the model saw it.
        attention: A of a tokenizer (L, H, W). It sets the scale, so that pictures of different tokens are comparable.
        interaction: A-hat of the same tokens (L, H, W); None to leave it out.
        token: Index of the token.

    Raises:
        InputError: matplotlib is not installed.
    """
    maps = torch.stack([maps[token] for maps in (attention, interaction) if maps is not None])
    figure = _figure((6.6, 3.3))
    axes = figure.subplots(1, len(maps), squeeze=False)
    colors = _colors(_multiple_of_uniform(attention))
    _draw_maps(axes[0], image, _multiple_of_uniform(maps), colors)
    for ax, title in zip(axes[0], ('A: where it looks', 'Â: what it then meets')):
        ax.set_title(title, fontsize=10)
    _finish(figure, axes, colors)
    picture = BytesIO()
    figure.savefig(picture, dpi=130)
    return Image.open(picture)


def overlay_tokens(image: Image.Image, attention: torch.Tensor) -> List[Image.Image]:
    """Lay the attention of each token over the image, in the style of the other pictures and on one scale for all.

    Args:
        image: The image as the model saw it.
        attention: A of a tokenizer (L, H, W).

    Returns:
        L pictures of the same size as the image.

    Raises:
        InputError: matplotlib is not installed.
    """
    attention = _multiple_of_uniform(attention)
    pictures = _overlays(image, attention, _colors(attention))
    return [Image.fromarray((255 * picture).round().astype(np.uint8)) for picture in pictures]


def draw_locality(ratios: torch.Tensor, uniform: float, title: str, path: Union[str, Path]) -> None:
    """Draw Figure 5 of the paper: the locality ratio by layer, with its spread over the heads.

    Args:
        ratios: Ratio of each layer and head (layers, heads), from `vt_zoo.analysis.metrics.locality`.
        uniform: Ratio of uniform attention, drawn as a baseline.
        title: Title of the picture.
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
    ax.set(xlabel='layer', ylabel='attention in 3x3 neighbourhood', ylim=(0, 1.35 * top))
    title, how = _written(title)
    ax.set_title(title, fontsize=10, **how)
    ax.set_xticks(layers)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9, loc='upper right')
    _save(figure, path)


def _figure(size: Tuple[float, float]):
    with _needed():
        from matplotlib.figure import Figure
    return Figure(figsize=size, layout='constrained')


@contextmanager
def _needed() -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise InputError("pictures need matplotlib: pip install 'vt_zoo[figures]'") from None


def _written(text: str) -> Tuple[str, Dict[str, Any]]:
    """Prepare text for matplotlib: not parsed as a formula, and in a font that has its letters, or else escaped."""
    text, how = unicodedata.normalize('NFC', text), {'parse_math': False}
    if text.isascii() and text.isprintable():
        return text, how
    file = find_font_file(text, shapes=False)
    if file is None:
        warn_of((text,))
        return ascii(text)[1:-1], how
    from matplotlib.font_manager import FontProperties
    return text, {**how, 'fontproperties': FontProperties(fname=str(file))}


def _multiple_of_uniform(attention: torch.Tensor) -> torch.Tensor:
    return attention.float().cpu() * attention.shape[-2] * attention.shape[-1]


def _colors(attention: torch.Tensor):
    """Colour scale for multiples of uniform attention; only the highest half percent of values is beyond its end."""
    with _needed():
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import PowerNorm
    values = attention.flatten()
    top = values.kthvalue(max(int(0.995 * values.numel()), 1)).values.item()
    return ScalarMappable(PowerNorm(0.5, vmin=0, vmax=top), 'inferno')


def _overlays(image: Image.Image, maps: torch.Tensor, colors) -> Iterator[np.ndarray]:
    """Lay each map (L, H, W) over the image in grey, giving pictures (height, width, 3) of values 0 to 1."""
    grey = np.asarray(image.convert('L'))[..., None] / 255
    for values in F.interpolate(maps[None], size=(image.height, image.width), mode='bilinear')[0].numpy():
        alpha = 0.2 + 0.65 * colors.norm(values).clip(0, 1)[..., None]  # the image shows through where attention is low
        yield alpha * colors.to_rgba(values)[..., :3] + (1 - alpha) * grey


def _draw_maps(axes, image: Image.Image, maps: torch.Tensor, colors) -> None:
    """Draw one of the maps (L, H, W) in each of the axes, over the image in grey."""
    for ax, picture in zip(axes, _overlays(image, maps, colors)):
        ax.imshow(picture)


def _draw_grid(images: Sequence[Image.Image], maps: torch.Tensor, titles: Sequence[str], font: int, margin: float):
    """Draw a figure with a row for each image: the image, then each of its maps (B, L, H, W) over it."""
    num_tokens = maps.shape[1]
    stretch = (images[0].width / images[0].height) ** 0.5  # cells have the images' shape
    figure = _figure((0.63 * stretch * (num_tokens + 1) + 1.4, 0.57 / stretch * len(images) + margin))
    axes = figure.subplots(len(images), num_tokens + 1, squeeze=False)
    colors = _colors(maps)
    for row, image, title, of_image in zip(axes, images, titles, maps):
        row[0].imshow(image)
        title, how = _written(title)
        row[0].set_ylabel(title, rotation=0, ha='right', va='center', fontsize=font, **how)
        _draw_maps(row[1:], image, of_image, colors)
    for i, ax in enumerate(axes[0]):
        ax.set_title('image' if i == 0 else str(i), fontsize=9)
    figure.supxlabel('token', fontsize=9)
    _finish(figure, axes, colors)
    return figure


def _finish(figure, axes, colors) -> None:
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    bar = figure.colorbar(colors, ax=axes, shrink=0.8, pad=0.01)
    bar.set_label('attention / uniform\n(square-root scale)', fontsize=9 if figure.get_figheight() > 1.8 else 7)


def _save(figure, path: Union[str, Path]) -> None:
    with whole(path) as new:
        figure.savefig(new, dpi=130)
