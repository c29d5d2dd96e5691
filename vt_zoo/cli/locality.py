"""Measure how local the attention of a Vision Transformer is, layer by layer (Figure 5 of the paper).

The ratio is the share of a patch's attention that stays in its 3x3 neighbourhood. --random measures a model with random
weights, which also works where there are none to download; table and picture then say so.
"""
import argparse
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import resolve_data_config

from vt_zoo.analysis.figures import draw_locality
from vt_zoo.analysis.metrics import locality, uniform_locality
from vt_zoo.analysis.vit_attention import capture_self_attention, patch_grid
from vt_zoo.data.images import image_transform, load_image
from vt_zoo.errors import InputError
from vt_zoo.weights.loading import check_name, load_model

from .arguments import whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add('images', nargs='*', metavar='IMAGE', help='path to an image (default: noise)')
    add('--model', required=True, metavar='NAME_OR_DIR', help='Vision Transformer of timm, e.g. vit_base_patch16_224')
    add('--random', action='store_true', help='use random weights instead of pretrained ones')
    add('--seed', type=whole_number, default=0, metavar='N', help='random seed of weights and noise')
    add('--out', default='locality.png', metavar='FILE', help='path to the output picture, .png or .svg')


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    """Print the table and draw the figure."""
    if Path(args.out).suffix not in ('.png', '.svg'):
        raise InputError(f'out must end in .png or .svg, got {args.out}')
    if Path(args.out).is_dir():
        raise InputError(f'out must be a file, got the folder {args.out}')
    if args.random and Path(args.model).is_dir():
        raise InputError(f'model must be a name with --random, got the folder {args.model}')
    torch.manual_seed(args.seed)
    if args.random:
        check_name(args.model)
        model = timm.create_model(args.model).eval()
    else:
        model = load_model(args.model)
    data_config = resolve_data_config({}, model=model)
    transform = image_transform(data_config)
    height, width = data_config['input_size'][1:]
    noise = Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8).numpy())
    images = [load_image(path) for path in args.images] or [noise]
    try:
        ratios = []
        for image in images:
            x = transform(image)[None]
            grid, prefix = patch_grid(model, x)
            ratios.append(torch.stack([locality(a, grid, prefix)[0] for a in capture_self_attention(model, x)]))
    except ValueError as e:
        raise InputError(f'model {args.model} has no locality ratio: {e}') from e
    mean = torch.stack(ratios).mean(0)  # (layers, heads)
    what = f'{args.model}, {"random" if args.random else "pretrained"} weights, ' + (
        f'{len(images)} images' if args.images else 'one image of noise')
    print(f'{what}\nlayer    mean  of the heads')
    for layer, heads in enumerate(mean, 1):
        print(f'{layer:5}  {heads.mean():.4f}  {heads.min():.4f} to {heads.max():.4f}')
    print(f'uniform attention has {uniform_locality(grid):.4f}')
    draw_locality(mean, uniform_locality(grid), what, args.out)
    print(f'picture    {args.out}')
