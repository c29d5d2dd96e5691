"""Segmenting image files, with a picture to look at and a file of class indices to compute with."""
import colorsys
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as F

from ..data.image_stream import OpenedImage, Source, open_images
from ..data.images import prepare_image
from ..errors import InputError
from ..files import check_output_folder, whole
from ..fonts import drawable
from ..weights.loading import Loaded
from .metrics import segment

__all__ = ['Segmented', 'draw_overlay', 'palette', 'predict_classes', 'predict_files']

Color = Tuple[int, int, int]


@dataclass
class Segmented:
    """Result of segmenting an image file.

    Attributes:
        path: The file.
        overlay: Picture of the classes over the image; None if there was an error.
        classes: Image of class indices; None if there was an error.
        error: One sentence that describes the error; None if the image was segmented.
    """
    path: str
    overlay: Optional[Path] = None
    classes: Optional[Path] = None
    error: Optional[str] = None


def palette(num_classes: int) -> List[Color]:
    """Choose a colour (red, green, blue) for each class, with hues as far apart as possible and three brightnesses."""
    golden = 0.618033988749895  # share of the colour circle: neighbours are far apart for any number of classes
    colors = []
    for i in range(num_classes):
        rgb = colorsys.hsv_to_rgb(i * golden % 1, (0.9, 0.6, 0.75)[i % 3], (0.95, 1.0, 0.6)[i % 3])
        colors.append(tuple(round(255 * c) for c in rgb))
    return colors


def predict_classes(loaded: Loaded, image: Image.Image) -> np.ndarray:
    """Predict the class of each pixel of an RGB image, uint8 (H, W)."""
    return _predict_same_size(loaded, F.pil_to_tensor(image)[None])[0]


@torch.inference_mode()
def _predict_same_size(loaded: Loaded, images: torch.Tensor) -> np.ndarray:
    """Predict the class of each pixel (B, H, W) of images (B, 3, H, W), both uint8."""
    mean, std = loaded.preprocessing['mean'], loaded.preprocessing['std']
    x = prepare_image(images.to(next(loaded.model.parameters()).device), mean, std)
    logits = segment(loaded.model, x, tuple(x.shape[-2:]), loaded.eval_size)
    return logits.argmax(1).to(torch.uint8).cpu().numpy()


def draw_overlay(image: Image.Image, classes: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Lay the colours of the classes over an image, and list their names and shares of the pixels on the right.

    If no font on the machine has the letters of a name, the number of the class is drawn, and a warning names it.
    """
    colors = palette(len(names))
    blended = Image.blend(image, Image.fromarray(np.array(colors, dtype=np.uint8)[classes]), 0.55)
    shares = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
    present = [i for i in np.argsort(-shares) if shares[i] > 0]
    texts = drawable([names[i] for i in present], [f'class {i}' for i in present])
    lines = [(f'{name}  {100 * shares[i]:.1f} %', font) for i, (name, font) in zip(present, texts)]
    height = 14
    legend = 24 + max(round(font.getlength(line)) for line, font in lines)
    picture = Image.new('RGB', (image.width + legend, max(image.height, height * len(lines) + 6)), 'white')
    picture.paste(blended, (0, 0))
    draw = ImageDraw.Draw(picture)
    for row, (i, (line, font)) in enumerate(zip(present, lines)):
        top = 4 + row * height
        draw.rectangle((image.width + 5, top, image.width + 14, top + 9), fill=colors[i], outline='black')
        draw.text((image.width + 18, top - 1), line, fill='black', font=font)
    return picture


def predict_files(
        loaded: Loaded,
        sources: Iterable[Optional[Source]],
        out: Union[str, Path],
        batch_size: int = 1,
        workers: int = 1,
) -> Iterator[Segmented]:
    """Segment image files, one batch at a time, as the results are consumed.

    Args:
        loaded: The model.
        sources: Files, as from `vt_zoo.data.image_stream.find_images`.
        out: Folder to write to. For each image NAME, it gets the overlay `NAME_overlay.png`, and `NAME_classes.png`, a
            palette image of the image's size whose values are class indices, in the subfolders given by the sources'
            names. Existing files of these names are replaced, but not those of an earlier image of the same call: the
            later image gets an error.
        batch_size: Number of images to read at a time; those of the same size go through the model together.
        workers: Number of threads that open files.

    Yields:
        What was written for each image, or why nothing was. To tell names apart, 16 bytes are kept for each.

    Raises:
        InputError: `out` is a file.
        OSError: `out` cannot be written.
    """
    out, colors, seen = Path(out), [c for color in palette(len(loaded.classes)) for c in color], set()
    check_output_folder(out)
    for batch in open_images(sources, F.pil_to_tensor, batch_size, workers):
        for opened in batch:
            if opened.error is None and _digest(opened.source) in seen:
                opened.error = (
                    f'image {opened.source.path} would be written to the same name as an earlier one, '
                    f'{_target(out, opened.source, "overlay")}')
            elif opened.error is None:
                seen.add(_digest(opened.source))
        classes = _predict_batch(loaded, batch)
        for i, opened in enumerate(batch):
            if opened.error is not None:
                yield Segmented(opened.source.path, error=opened.error)
                continue
            image = F.to_pil_image(opened.content)
            mask = Image.fromarray(classes[i])
            mask.putpalette(colors)
            paths = [_target(out, opened.source, kind) for kind in ('overlay', 'classes')]
            for target, picture in zip(paths, (draw_overlay(image, classes[i], loaded.classes), mask)):
                with whole(target) as new:
                    picture.save(new)
            yield Segmented(opened.source.path, *paths)


def _stem(source: Source) -> str:
    return os.path.splitext(source.name)[0]


def _digest(source: Source) -> bytes:
    return hashlib.blake2b(os.fsencode(_stem(source)), digest_size=16).digest()


def _target(out: Path, source: Source, kind: str) -> Path:
    return out / f'{_stem(source)}_{kind}.png'


def _predict_batch(loaded: Loaded, batch: List[OpenedImage]) -> Dict[int, np.ndarray]:
    """Predict classes, by the image's index in the batch; images of a size that cannot be used get an error."""
    by_size: Dict[torch.Size, List[int]] = {}
    for i, opened in enumerate(batch):
        if opened.error is None:
            by_size.setdefault(opened.content.shape, []).append(i)
    classes = {}
    for indices in by_size.values():
        try:
            classes.update(zip(indices, _predict_same_size(loaded, torch.stack([batch[i].content for i in indices]))))
        except InputError as e:
            for i in indices:
                batch[i].error = f'image {batch[i].source.path} cannot be segmented: {e}'
    return classes
