"""Predicting the most likely classes of image files."""
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List

import torch
from timm.models import create_model, get_pretrained_cfg

from ..data.image_stream import OpenedImage
from ..errors import InputError
from ..models import list_classifiers
from ..weights.loading import CLASSIFICATION, Loaded, as_classifier, load

__all__ = ['load_classifier', 'predict_images']


def load_classifier(name_or_dir: str, untrained: bool = False) -> Loaded:
    """Load a trained classifier.

    Args:
        name_or_dir: As in `vt_zoo.load`.
        untrained: Also allow a model whose classifier was never trained, such as NAME.untrained; its random weights are
            the same each time.

    Raises:
        InputError: As in `vt_zoo.load`; or the model is a segmenter, or was never trained.
    """
    tag = ''
    if ':' not in name_or_dir and not Path(name_or_dir).is_dir() and name_or_dir.split('.')[0] in list_classifiers():
        with suppress(RuntimeError):  # an unknown tag, for which `load` gives a better error
            tag = get_pretrained_cfg(name_or_dir).tag or ''
    if tag.startswith(('untrained', 'trunk_')):
        if not untrained:
            raise InputError(
                f'the classifier of model {name_or_dir} was never trained: train it with `vt-zoo finetune`, or add '
                '--untrained to see what it answers')
        torch.manual_seed(0)
        if tag == 'untrained':
            return as_classifier(create_model(name_or_dir).eval(), name_or_dir)
    return load(name_or_dir, CLASSIFICATION)


@torch.inference_mode()
def predict_images(loaded: Loaded, batches: Iterator[List[OpenedImage]], top: int) -> Iterator[Dict[str, Any]]:
    """Classify images as they are read.

    Args:
        loaded: The classifier, which runs on the device of its weights.
        batches: Batches of opened images (C, H, W) of values 0 to 255, at the model's size.
        top: Number of classes to return for each image.

    Yields:
        For each image, `image` and `top`, a list of classes with `index`, `label` and `probability`, most likely first;
        or `image` and `error`.

    Raises:
        InputError: A batch does not fit into the device's memory.
    """
    parameter = next(loaded.model.parameters())
    like = {'device': parameter.device, 'dtype': parameter.dtype}
    mean, std = (255 * torch.tensor(loaded.preprocessing[key], **like)[:, None, None] for key in ('mean', 'std'))
    for batch in batches:
        images = [opened.content for opened in batch if opened.error is None]
        found = iter(())
        if images:
            try:
                x = torch.stack(images).to(**like).sub_(mean).div_(std)
                best = loaded.model(x).softmax(-1).topk(top)
            except torch.OutOfMemoryError as e:
                raise InputError(
                    f'batch-size {len(images)} does not fit into the memory of {parameter.device}: try less') from e
            found = zip(best.indices.tolist(), best.values.tolist())
        for opened in batch:
            if opened.error is not None:
                yield {'image': opened.source.path, 'error': opened.error}
                continue
            yield {'image': opened.source.path, 'top': [
                {'index': i, 'label': loaded.classes[i], 'probability': round(p, 6)} for i, p in zip(*next(found))]}
