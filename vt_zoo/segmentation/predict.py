"""Segmenting image files: a picture to look at and a file of class indices to compute with."""
import colorsys
from pathlib import Path
from typing import List, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from ..checkpoint import whole
from ..errors import InputError
from ..images import load_image
from .evaluate import segment
from .model_files import LoadedModel

__all__ = ['draw_overlay', 'palette', 'predict_classes', 'predict_files', 'prepare_image']

Color = Tuple[int, int, int]


def palette(num_classes: int) -> List[Color]:
    """A colour (red, green, blue) for each class: hues as far apart as can be, in three steps of brightness."""
    golden = 0.618033988749895  # of the circle: whatever the number of classes, neighbours are far apart
    colors = []
    for i in range(num_classes):
        rgb = colorsys.hsv_to_rgb(i * golden % 1, (0.9, 0.6, 0.75)[i % 3], (0.95, 1.0, 0.6)[i % 3])
        colors.append(tuple(round(255 * c) for c in rgb))
    return colors


def prepare_image(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """An RGB image as a model of this mean and std takes it, normalised, (3, H, W)."""
    x = F.normalize(F.to_dtype(F.to_image(image), torch.float32, scale=True), mean, std)
    return x.as_subclass(torch.Tensor)


@torch.inference_mode()
def predict_classes(loaded: LoadedModel, image: Image.Image) -> np.ndarray:
    """Class of each pixel of an RGB image, uint8 (H, W)."""
    device = next(loaded.model.parameters()).device
    x = prepare_image(image, loaded.mean, loaded.std)[None].to(device)
    logits = segment(loaded.model, x, tuple(x.shape[-2:]), loaded.eval_size)
    return logits.argmax(1)[0].to(torch.uint8).cpu().numpy()


def draw_overlay(image: Image.Image, classes: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Lay the colours of the classes over an image and name them, with their share of the pixels, on the right."""
    colors = palette(len(names))
    blended = Image.blend(image, Image.fromarray(np.array(colors, dtype=np.uint8)[classes]), 0.55)
    shares = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
    present = [i for i in np.argsort(-shares) if shares[i] > 0]
    lines = [f'{names[i]}  {100 * shares[i]:.1f} %' for i in present]
    font = ImageFont.load_default()
    height = 14
    legend = 24 + max(round(font.getlength(line)) for line in lines)
    picture = Image.new('RGB', (image.width + legend, max(image.height, height * len(lines) + 6)), 'white')
    picture.paste(blended, (0, 0))
    draw = ImageDraw.Draw(picture)
    for row, (i, line) in enumerate(zip(present, lines)):
        top = 4 + row * height
        draw.rectangle((image.width + 5, top, image.width + 14, top + 9), fill=colors[i], outline='black')
        draw.text((image.width + 18, top - 1), line, fill='black', font=font)
    return picture


def predict_files(
        loaded: LoadedModel,
        images: Sequence[Union[str, Path]],
        out: Union[str, Path],
        progress: bool = True,
) -> List[Tuple[Path, Path]]:
    """Segment image files.

    Args:
        loaded: The model.
        images: Files; all are opened before the first is segmented.
        out: Folder to write to: of each image NAME the overlay `NAME_overlay.png`, and `NAME_classes.png`, a palette
            image of the image's size whose values are class indices. Files of these names are replaced.
        progress: Show a progress bar.

    Returns:
        The two paths for each image.

    Raises:
        InputError: An image cannot be read, or two have the same name.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    by_name = {}
    for path in map(Path, images):
        if path.stem in by_name:
            raise InputError(f'images {by_name[path.stem]} and {path} would be written to the same name {path.stem}')
        by_name[path.stem] = path
        load_image(path)
    colors = [c for color in palette(len(loaded.classes)) for c in color]
    written = []
    bar = tqdm(by_name.items(), desc='segmenting', disable=not progress or len(by_name) < 3 or None, leave=False)
    for name, path in bar:
        image = load_image(path)
        classes = predict_classes(loaded, image)
        mask = Image.fromarray(classes)
        mask.putpalette(colors)
        paths = out / f'{name}_overlay.png', out / f'{name}_classes.png'
        for target, picture in zip(paths, (draw_overlay(image, classes, loaded.classes), mask)):
            with whole(target) as new:
                picture.save(new)
        written.append(paths)
    return written
