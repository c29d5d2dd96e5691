"""Print the most likely classes of images.

Results come while the images are read. One that cannot be read gets a line with its error and the others go on; the
exit code is then 1, and the number of such images is said at the end.
"""
import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List

import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import create_model, get_pretrained_cfg

from vt_zoo.data.image_stream import OpenedImage, find_images, open_images
from vt_zoo.data.images import image_transform
from vt_zoo.devices import find_device
from vt_zoo.errors import InputError
from vt_zoo.models import list_classifiers
from vt_zoo.weights.files import check_input_size, load_model

from .arguments import positive_int
from .results import add_image_arguments, print_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        '--model', required=True, metavar='NAME_OR_DIR',
        help="folder in timm's hub layout, hf-hub:ORG/NAME, or the name of a model that has weights")
    parser.add_argument('--top', type=positive_int, default=5, metavar='K', help='number of classes to print per image')
    parser.add_argument(
        '--untrained', action='store_true',
        help='allow a model whose classifier was never trained, as NAME.untrained; its answers mean nothing')
    add_image_arguments(parser, batch_size=32)


def _load(name_or_dir: str, untrained: bool) -> nn.Module:
    """Load a model, one whose classifier was never trained only where `untrained`."""
    tag = ''
    if ':' not in name_or_dir and not Path(name_or_dir).is_dir() and name_or_dir.split('.')[0] in list_classifiers():
        with suppress(RuntimeError):  # an unknown tag, of which `load_model` says more
            tag = get_pretrained_cfg(name_or_dir).tag or ''
    if tag.startswith(('untrained', 'trunk_')):
        if not untrained:
            raise InputError(
                f'the classifier of model {name_or_dir} was never trained: train it with `vt-zoo finetune`, or add '
                '--untrained to see what it answers')
        torch.manual_seed(0)
        if tag == 'untrained':
            return create_model(name_or_dir).eval()
    return load_model(name_or_dir)


def run(args: argparse.Namespace) -> int:
    """Print the predictions."""
    device = find_device(args.device)
    model = _load(args.model, args.untrained)
    names = model.pretrained_cfg.get('label_names') or [str(i) for i in range(model.num_classes)]
    if len(names) != model.num_classes:
        raise InputError(f'model {args.model} has {model.num_classes} classes, its config.json names {len(names)}')
    data_config = resolve_data_config({}, model=model)
    check_input_size(model, data_config['input_size'], args.model)
    transform = image_transform(data_config, use_prefetcher=True)
    top = min(args.top, model.num_classes)
    columns = [f'{name}_{i}' for i in range(1, top + 1) for name in ('index', 'label', 'probability')]
    batches = open_images(find_images(args.images), transform, args.batch_size, args.workers)
    results = _classify(model.to(device), batches, data_config, names, top)
    return print_results(args, results, ['image', *columns, 'error'], _to_row, _to_text)


@torch.inference_mode()
def _classify(
        model: nn.Module,
        batches: Iterator[List[OpenedImage]],
        data_config: Dict[str, Any],
        names: List[str],
        top: int,
) -> Iterator[Dict[str, Any]]:
    """Classify images (C, H, W) of values 0 to 255."""
    parameter = next(model.parameters())
    like = {'device': parameter.device, 'dtype': parameter.dtype}
    mean, std = (255 * torch.tensor(data_config[key], **like)[:, None, None] for key in ('mean', 'std'))
    for batch in batches:
        images = [opened.content for opened in batch if opened.error is None]
        found = iter(())
        if images:
            try:
                x = torch.stack(images).to(**like).sub_(mean).div_(std)
                best = model(x).softmax(-1).topk(top)
            except torch.OutOfMemoryError as e:
                raise InputError(
                    f'batch-size {len(images)} does not fit into the memory of {parameter.device}: give less') from e
            found = zip(best.indices.tolist(), best.values.tolist())
        for opened in batch:
            if opened.error is not None:
                yield {'image': opened.source.path, 'error': opened.error}
                continue
            yield {'image': opened.source.path, 'top': [
                {'index': i, 'label': names[i], 'probability': round(p, 6)} for i, p in zip(*next(found))]}


def _to_row(result: Dict[str, Any]) -> List[Any]:
    return [result['image'], *(value for entry in result['top'] for value in entry.values()), '']


def _to_text(result: Dict[str, Any]) -> str:
    lines = [f'  {100 * entry["probability"]:6.2f} %  {entry["label"]}' for entry in result['top']]
    return '\n'.join([result['image'], *lines, ''])
