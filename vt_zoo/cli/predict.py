"""Print the most likely classes of images.

Each result is printed as soon as it is known. An image that cannot be read gets a line with its error and does not stop
the others; the command then ends with their number and exit code 1.
"""
import argparse
from typing import Any, Dict, List

from vt_zoo.classification.predict import load_classifier, predict_images
from vt_zoo.data.image_stream import find_images, open_images
from vt_zoo.data.images import image_transform
from vt_zoo.devices import find_device
from vt_zoo.weights.loading import check_logits

from .arguments import positive_int
from .results import add_image_arguments, print_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        '--model', required=True, metavar='NAME_OR_DIR',
        help="folder of a run or in timm's hub layout, hf-hub:ORG/NAME, or the name of a model that has weights")
    parser.add_argument('--top', type=positive_int, default=5, metavar='K', help='number of classes to print per image')
    parser.add_argument(
        '--untrained', action='store_true',
        help='allow a model whose classifier was never trained, such as NAME.untrained; its answers mean nothing')
    add_image_arguments(parser, batch_size=32)


def run(args: argparse.Namespace) -> int:
    """Print the predictions."""
    device = find_device(args.device)
    loaded = load_classifier(args.model, args.untrained)
    check_logits(loaded.model, loaded.input_size, args.model)
    loaded.model.to(device)
    top = min(args.top, len(loaded.classes))
    columns = [f'{name}_{i}' for i in range(1, top + 1) for name in ('index', 'label', 'probability')]
    transform = image_transform(loaded.preprocessing, use_prefetcher=True)
    batches = open_images(find_images(args.images), transform, args.batch_size, args.workers)
    results = predict_images(loaded, batches, top)
    return print_results(args, results, ['image', *columns, 'error'], _to_row, _to_text)


def _to_row(result: Dict[str, Any]) -> List[Any]:
    return [result['image'], *(value for entry in result['top'] for value in entry.values()), '']


def _to_text(result: Dict[str, Any]) -> str:
    lines = [f'  {100 * entry["probability"]:6.2f} %  {entry["label"]}' for entry in result['top']]
    return '\n'.join([result['image'], *lines, ''])
