"""Pictures of what tokens look at. matplotlib is imported where a picture is drawn (extra `figures`)."""
from pathlib import Path
from typing import List, Sequence, Union

import torch
import torch.nn.functional as F
from PIL import Image

from vt_zoo.checkpoint import whole
from vt_zoo.errors import InputError

__all__ = ['draw_token_attention']


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
    try:
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib: pip install 'vt_zoo[figures]'") from None

    attention = attention.float().cpu() * attention.shape[-2] * attention.shape[-1]
    top = attention.quantile(0.995).item()
    num_tokens = attention.shape[1]
    figure = Figure(figsize=(0.62 * (num_tokens + 1) + 1.4, 0.66 * len(images) + 0.8), layout='constrained')
    axes = figure.subplots(len(images), num_tokens + 1, squeeze=False)
    for row, image, title, maps in zip(axes, images, titles, attention):
        row[0].imshow(image)
        row[0].set_ylabel(title, rotation=0, ha='right', va='center', fontsize=9)
        grey = image.convert('L')
        maps = F.interpolate(maps[None], size=(image.height, image.width), mode='bilinear')[0].numpy()
        for ax, values in zip(row[1:], maps):
            ax.imshow(grey, cmap='gray')
            alpha = 0.2 + 0.65 * (values / top).clip(0, 1) ** 0.5  # the image shows through where attention is low
            drawn = ax.imshow(values, cmap='inferno', norm=PowerNorm(0.5, vmin=0, vmax=top), alpha=alpha)
    for i, ax in enumerate(axes[0]):
        ax.set_title('image' if i == 0 else str(i), fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, pad=0.01)
    bar.set_label('attention / uniform (square-root scale)', fontsize=9)
    figure.supxlabel('token', fontsize=9)
    with whole(path) as new:
        figure.savefig(new, dpi=130)
