"""Print the most likely classes of images.

All images are opened before the first is classified: one that cannot be read stops the command, by name.
"""
import argparse
import json
from contextlib import suppress
from pathlib import Path

import torch
from timm.data import create_transform, resolve_data_config
from timm.models import create_model, get_pretrained_cfg, list_models
from tqdm import tqdm

from vt_zoo.checkpoint import check_input_size, load_model
from vt_zoo.errors import InputError
from vt_zoo.images import load_image

from .arguments import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='path to an image')
    parser.add_argument(
        '--model', required=True, metavar='NAME_OR_DIR',
        help="folder in timm's hub layout, hf-hub:ORG/NAME, or the name of a model that has weights")
    parser.add_argument('--top', type=positive_int, default=5, metavar='K', help='number of classes to print per image')
    parser.add_argument('--json', action='store_true', help='print a JSON list instead of a table')
    parser.add_argument(
        '--untrained', action='store_true',
        help='allow a model whose classifier was never trained, as NAME.untrained; its answers mean nothing')


def _load(name_or_dir: str, untrained: bool) -> torch.nn.Module:
    """Load a model, one whose classifier was never trained only where `untrained`."""
    tag = ''
    if ':' not in name_or_dir and not Path(name_or_dir).is_dir() and name_or_dir.split('.')[0] in list_models(
            module='vt_resnet'):
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


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    """Print the predictions."""
    model = _load(args.model, args.untrained)
    names = model.pretrained_cfg.get('label_names') or [str(i) for i in range(model.num_classes)]
    if len(names) != model.num_classes:
        raise InputError(f'model {args.model} has {model.num_classes} classes, its config.json names {len(names)}')
    data_config = resolve_data_config({}, model=model)
    check_input_size(model, data_config['input_size'], args.model)
    transform = create_transform(**data_config)
    for path in args.images:
        load_image(path)
    results = []
    for path in tqdm(args.images, desc='predicting', disable=len(args.images) < 20 or None, leave=False):
        probabilities = model(transform(load_image(path))[None]).softmax(-1)[0]
        top = probabilities.topk(min(args.top, len(probabilities)))
        results.append({'image': path, 'top': [
            {'index': i, 'label': names[i], 'probability': round(p, 6)}
            for i, p in zip(top.indices.tolist(), top.values.tolist())]})
    if args.json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        print(result['image'])
        for entry in result['top']:
            print(f'  {100 * entry["probability"]:6.2f} %  {entry["label"]}')
