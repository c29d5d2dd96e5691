"""Write an int8 file, for CPUs, of an ONNX file of `vt-zoo export`.

The ranges of activations are measured on images, which need no labels; what the file says of the model decides how they
are prepared. Before the int8 file gets its name it is compared with the float32 file on these images.
"""
import argparse
from pathlib import Path

from vt_zoo.quantize import DEFAULT_LIMIT, quantize

from .arguments import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add('file', metavar='FILE', help='file of `vt-zoo export --format onnx`')
    add('--images', required=True, metavar='FOLDER', help='images such as the model will see, in subfolders or not')
    add('--out', required=True, metavar='FILE', help='file to write, which must not be there')
    add('--limit', type=positive_int, default=DEFAULT_LIMIT, metavar='N', help='take at most so many of the images')


def run(args: argparse.Namespace) -> None:
    """Quantise, and print what was written."""
    quantized = quantize(args.file, args.images, args.out, args.limit)
    nodes = ', '.join(f'{chosen} of {total} {op}' for op, (chosen, total) in quantized.nodes.items())
    print(f'in int8    {nodes}')
    print(f'same class {100 * quantized.agreement:.2f} %, on the {quantized.num_images} images')
    print(f'difference {quantized.mean_difference:.1e} of the largest output, in the worst image '
          f'{quantized.largest_difference:.1e}')
    before, after = (Path(path).stat().st_size for path in (args.file, args.out))
    print(f'file       {args.out}, {after} bytes, {before / after:.1f} times smaller')
