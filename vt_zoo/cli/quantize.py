"""Quantize an ONNX file of `vt-zoo export` to int8, for CPUs.

The ranges of the activations are measured on images, which need no labels and are prepared as the file says. The int8
file is compared with the float32 file on these images before it is written under its name.
"""
import argparse
from pathlib import Path

from vt_zoo.export.int8 import DEFAULT_LIMIT, quantize

from .arguments import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add('file', metavar='FILE', help='path to a file of `vt-zoo export --format onnx`')
    add('--images', required=True, metavar='DIR', help='folder of images like those that the model will see')
    add('--out', default=argparse.SUPPRESS, metavar='OUT',
        help='file to write (default: NAME_int8.onnx beside NAME.onnx)')
    add('--overwrite', action='store_true', help='replace OUT if it exists')
    add('--limit', type=positive_int, default=DEFAULT_LIMIT, metavar='N',
        help='maximum number of images to calibrate on, drawn with a fixed seed')


def run(args: argparse.Namespace) -> None:
    """Quantise, and print what was written."""
    file = Path(args.file)
    out = Path(getattr(args, 'out', None) or file.with_name(f'{file.stem}_int8.onnx'))
    quantized = quantize(file, args.images, out, args.limit, overwrite=args.overwrite)
    nodes = ', '.join(f'{chosen} of {total} {op}' for op, (chosen, total) in quantized.nodes.items())
    print(f'in int8    {nodes}')
    print(f'same class {100 * quantized.agreement:.2f} %, on the {quantized.num_images} images')
    print(f'difference {quantized.mean_difference:.1e} of the largest output, in the worst image '
          f'{quantized.largest_difference:.1e}')
    before, after = (Path(path).stat().st_size for path in (file, out))
    print(f'file       {out}, {after} bytes, {before / after:.1f} times smaller')
